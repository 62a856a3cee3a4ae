"""Write the generated parts of README.md: the list of commands, and the table of the last recorded quickstart.

    python benchmarks/readme.py

`benchmarks/results/quickstart.json` and `.md` are what `python benchmarks/quickstart.py` recorded.
"""

from __future__ import annotations

import re
from pathlib import Path

from typer.models import CommandInfo

ROOT = Path(__file__).resolve().parent.parent


def commands() -> str:
    """One line for each command: its name and the first line of its help."""
    from edgelora.cli import app

    lines = [_line("", command) for command in app.registered_commands]
    for group in app.registered_groups:
        assert group.typer_instance is not None
        lines += [_line(f"{group.name} ", command) for command in group.typer_instance.registered_commands]
    return "\n".join(["| command | what it does | example |", "|---|---|---|", *lines])


def _line(group: str, command: CommandInfo) -> str:
    assert command.callback is not None
    text = [line.strip() for line in (command.callback.__doc__ or "").splitlines() if line.strip()]
    example = next(line for line in text if line.startswith("Example: "))
    name = group + (command.name or command.callback.__name__)
    return f"| `{name}` | {text[0]} | {example.removeprefix('Example: ')} |"


def table() -> str:
    """The recorded report, without its title."""
    text = (ROOT / "benchmarks" / "results" / "quickstart.md").read_text(encoding="utf-8")
    return text.split("\n", 1)[1].strip()


def generated(readme: str) -> str:
    """README's text with its generated parts made anew."""
    for name, text in (("commands", commands()), ("quickstart", table())):
        pattern = rf"(<!-- {name} -->).*?(<!-- end -->)"
        readme, n = re.subn(pattern, lambda m, text=text: f"{m[1]}\n{text}\n{m[2]}", readme, flags=re.S)
        assert n == 1, name
    return readme


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(generated(path.read_text(encoding="utf-8")), encoding="utf-8")
