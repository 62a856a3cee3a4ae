"""What would be prose on stderr under --json, as events: wrong usage, and Python's own warnings (docs/events.md)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import typer

from edgelora.errors import EdgeloraError

# click's class of whatever a command line can be refused with: typer has it from click, or of late as its own
Refused = cast("type[typer.BadParameter]", typer.BadParameter.__mro__[2])


def wrong_usage(refused: typer.BadParameter) -> EdgeloraError:
    """Three lines of what typer would draw in a box: what is wrong, what the command takes, where it says more."""
    what = " ".join(refused.format_message().split())
    if (context := getattr(refused, "ctx", None)) is None:
        return EdgeloraError(what, "a command takes what its help lists", "see `edgelora --help`")
    return EdgeloraError(what, " ".join(context.get_usage().split()), f"see `{context.command_path} --help`")


@contextmanager
def warnings_as_notes() -> Iterator[None]:
    """In this block, what Python would warn of in prose is a note: `FutureWarning: ... (lazy.py, line 12)`."""
    from edgelora.cli.display import JsonLines

    events, before = JsonLines(), warnings.showwarning

    def show(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any) -> None:
        events.note(f"{category.__name__}: {message} ({Path(filename).name}, line {lineno})")

    warnings.showwarning = show  # type: ignore[assignment]
    try:
        yield
    finally:
        warnings.showwarning = before
