"""`edgelora train --sweep`."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgelora.config import TrainConfig

if TYPE_CHECKING:
    from edgelora.pipeline.sweep import Sweep

SETTING = re.compile(r"[A-Za-z][\w-]*=.*")


def taken_apart(
    words: Sequence[str], base: Path | None, data: Sequence[str] | None
) -> tuple[list[str], Path | None, list[str]]:
    """`--sweep rank=4,8 lr=1e-4,5e-4` gives the option one word, and the arguments the rest: all words, base and data.

    What stands among the arguments as NAME=VALUES and is no file belongs to the sweep.
    """
    arguments = [*([] if base is None else [str(base)]), *(data or [])]
    swept = [word for word in arguments if SETTING.fullmatch(word) and not _is_there(word)]
    rest = [word for word in arguments if word not in swept]
    return [*words, *swept], Path(rest[0]) if rest else None, rest[1:]


def sweep(config: TrainConfig, words: Sequence[str], as_json: bool) -> None:
    """Run it, and print the ranking."""
    from edgelora.cli.display import listener
    from edgelora.pipeline.methods import what_comes_next
    from edgelora.pipeline.sweep import SweepListeners, as_row, at_once, run_sweep
    from edgelora.training.interrupt import exit_code_of

    with listener(as_json) as display:
        try:
            found = run_sweep(config, words, SweepListeners(display.show, display.say, display.note))
        except (KeyboardInterrupt, SystemExit) as e:  # a second signal, or one before the first trial
            raise at_once(config, words, exit_code_of(e)) from e
        best = found.standings[0].trial
        display.say(f"{found.out}: the adapter of {best.name}; all trials are in {found.folder}")
        display.say(f"next: {what_comes_next(best.config.method, config.base, found.out)}")
    if as_json:
        ranking = [as_row(standing) for standing in found.standings]
        print(json.dumps({"out": str(found.out), "folder": str(found.folder), "ranking": ranking}, allow_nan=False))
    else:
        _print(found)


def _print(found: Sweep) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from edgelora.cli.display import output
    from edgelora.pipeline.sweep import as_row

    titles = ("trial", "steps", "held-out loss", "seconds", "stopped at")
    table = Table(*titles, header_style="bold", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for column in table.columns[1:]:
        column.justify, column.no_wrap = "right", True
    for row in (as_row(standing) for standing in found.standings):
        table.add_row(row["trial"], f"{row['steps']}/{row['steps_of_a_run']}", *_numbers(row))
    output().print(table)


def _numbers(row: dict[str, Any]) -> tuple[str, str, str]:
    loss = "not finite" if row["held_out_loss"] is None else f"{row['held_out_loss']:.4f}"
    return loss, f"{row['seconds']:.0f}", "the end" if row["stopped_at"] is None else f"{row['stopped_at']:.0%}"


def _is_there(word: str) -> bool:
    """A file or folder of that name, perhaps with `:weight` behind it."""
    return Path(word).exists() or Path(word.rpartition(":")[0] or word).exists()
