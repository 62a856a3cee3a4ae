"""What `--method` can be, in words: the table of methods as rows for people and programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgelora.config import Method
from edgelora.invocation import command
from edgelora.peft.methods import METHODS

LIVE = ("adapter", "soft prompt")  # the doors of what comes and goes over a loaded base


def described() -> list[dict[str, Any]]:
    """name, paper, trains, leaves_as (`adapter`, `patched`, `merged`, `soft prompt`) and file_ranks of every method, in
    the table's order."""
    return [
        {
            "name": method.name, "paper": method.paper, "trains": method.trains, "leaves_as": list(method.exits),
            "file_ranks": method.file_ranks,
        }
        for method in METHODS.values()
    ]  # fmt: skip


def what_comes_next(method: Method, base: Path, adapter: Path) -> str:
    """The command to run behind a training: that which makes a file for llama.cpp, or where none can, the score. What
    is live over a base is checked over that as a GGUF."""
    exits, out = METHODS[method].exits, Path(f"{adapter}.gguf")
    if not exits:
        return command("eval", base, "--adapter", adapter, "--in", "torch", "--data", "test.jsonl")
    if base.is_dir() and exits[0] in LIVE:
        gguf = Path(f"{base}.gguf")
        first, second = command("convert", base, "--out", gguf), command("export", gguf, adapter, "--out", out)
        return f"{first} && {second}"
    given = ("merge", base, "--adapter", adapter) if exits == ("merged",) else ("export", base, adapter)
    return command(*given, "--out", out)
