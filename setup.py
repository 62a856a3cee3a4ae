"""What pyproject.toml cannot say: how the C code of edgelora/kernels is compiled, for the machine at hand.

Where it cannot be compiled edgelora works without it: torch then does all the work.
"""

import importlib.util
import platform
from pathlib import Path

from setuptools import Extension, setup

spec = importlib.util.spec_from_file_location("load", Path(__file__).parent / "edgelora/kernels/load.py")
load = importlib.util.module_from_spec(spec)
spec.loader.exec_module(load)

# Apple's Pythons compile for both of its processors at once: NEON needs no flag there
tuned = ["-Xarch_x86_64", "-march=haswell"] if platform.system() == "Darwin" else ["-march=native"]
files = [str(path.relative_to(Path(__file__).parent.resolve())) for path in load.sources()]

setup(
    ext_modules=[
        Extension(
            "edgelora.kernels.native",
            sources=[name for name in files if name.endswith(".c")],
            depends=[name for name in files if name.endswith(".h")],
            define_macros=[("KERNELS_DIGEST", f'"{load.digest()}"')],
            extra_compile_args=["-O3", *tuned],
            optional=True,
        )
    ]
)
