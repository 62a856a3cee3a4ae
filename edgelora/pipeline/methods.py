"""What `--method` can be, in words: the table of methods as rows for people and programs."""

from __future__ import annotations

from typing import Any

from edgelora.peft.methods import METHODS


def described() -> list[dict[str, Any]]:
    """name, paper, trains, leaves_as (`adapter`, `patched`, `merged`) and file_ranks of every method, in the table's
    order."""
    return [
        {
            "name": method.name, "paper": method.paper, "trains": method.trains, "leaves_as": list(method.exits),
            "file_ranks": method.file_ranks,
        }
        for method in METHODS.values()
    ]  # fmt: skip
