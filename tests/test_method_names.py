"""A method is one file and one row: nobody else asks which one it is by its name."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from conftest import ROOT

from edgelora.peft.methods import METHODS

MAY_SAY_THEM = {
    "edgelora/config.py": "the names that --method takes, before anything heavy is imported",
    "edgelora/peft/methods.py": "the table",
    "edgelora/peft/kinds.py": "what files say of themselves, read without torch",
    "edgelora/peft/first_ranks.py": "the same of a contract",
    "edgelora/pipeline/import_adapter.py": "which method leaves a file that another program wrote",
    "edgelora/cli/": "commands that are to be run next",
    "converters/adapter_from_mlx.py": "MLX's words in its own settings",
}
ALSO_WORDS = {"lora", "full"}  # of llama.cpp and PEFT for a file, and of --recompute: names beside a method alone


def names(path: Path) -> Iterator[str]:
    """Every method's name in a file, as a string of its own."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    compared = {
        part
        for node in ast.walk(tree)
        if isinstance(node, ast.Compare) and "method" in ast.unparse(node)
        for part in ast.walk(node)
    }
    strings = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and node.value in tuple(METHODS)]
    yield from (str(node.value) for node in strings if node.value not in ALSO_WORDS or node in compared)


def test_no_name_of_a_method_stands_outside_the_table_and_its_own_file():
    found: dict[str, set[str]] = {}
    for house in ("edgelora", "converters", "runtime"):
        for path in sorted((ROOT / house).rglob("*.py")):
            own = {path.stem} if path.parent.name == "peft" else set()
            if said := set(names(path)) - own:
                found[path.relative_to(ROOT).as_posix()] = said
    assert {path: said for path, said in found.items() if not path.startswith(tuple(MAY_SAY_THEM))} == {}
    assert [one for one in MAY_SAY_THEM if not any(path.startswith(one) for path in found)] == []
