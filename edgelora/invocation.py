"""How a person would type a command of ours, where they stand: the program's path, short paths, quoted for a shell."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path


def command(*words: str | Path) -> str:
    """`command("train", base, data)` → `.venv/bin/edgelora train base.gguf data.jsonl`."""
    return shlex.join([*_program(), *(str(short(word)) if isinstance(word, Path) else word for word in words)])


def as_typed() -> str:
    """The command that this process was started with."""
    return shlex.join([*_program(), *sys.argv[1:]])


def _program() -> list[str]:
    beside, on_path = Path(sys.executable).with_name("edgelora"), shutil.which("edgelora")
    if on_path and Path(on_path).absolute() == beside.absolute():
        return ["edgelora"]
    return [str(short(beside))] if beside.exists() else [sys.executable, "-m", "edgelora"]


def short(path: Path) -> Path:
    """Relative to where one stands, if it lies below."""
    try:
        return path.absolute().relative_to(Path.cwd())
    except ValueError:
        return path
