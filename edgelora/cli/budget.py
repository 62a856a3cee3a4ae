"""`edgelora quantize --target-size` and `--target-kl`: how a target is asked for, and what is said of the result."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from edgelora.words import size

if TYPE_CHECKING:
    from edgelora.cli.display import Listener
    from edgelora.pipeline.budget import Reached


UNITS = {"mb": 10**6, "mib": 1 << 20, "gb": 10**9, "gib": 1 << 30}
SIZE = re.compile(rf"(\d+(?:\.\d+)?)\s*({'|'.join(UNITS)})", re.IGNORECASE)


@dataclass(frozen=True)
class Asked:
    """The options of `edgelora quantize` that a target takes."""

    source: Path
    out: Path | None
    size: str | None
    kl: float | None
    data: Path | None
    text: Path | None
    imatrix: Path | None
    save_plan: Path | None
    repair: int | None
    allow_requantize: bool
    overwrite: bool

    def is_target(self, others: Mapping[str, object]) -> bool:
        """Whether a target is asked for. Raises typer.BadParameter for options that do not go with it, or only with it.

        others: what chooses types otherwise, by the names of the options.
        """
        if self.size is not None or self.kl is not None:
            if wrong := [name for name, value in others.items() if value]:
                raise typer.BadParameter(
                    "a target chooses the types itself, and is measured on --data or --text", param_hint=wrong
                )
            return True
        if wrong := [n for n, value in {"--text": self.text, "--repair": self.repair}.items() if value is not None]:
            raise typer.BadParameter("it goes with --target-size or --target-kl", param_hint=wrong)
        return False


def size_bytes(text: str) -> int:
    """`90MB`, `90 mb` or `1.5 GiB` in bytes. Raises typer.BadParameter for anything else, and for nothing."""
    found = SIZE.fullmatch(text.strip())
    size = int(float(found[1]) * UNITS[found[2].lower()]) if found else 0
    if size == 0:
        raise typer.BadParameter(
            f"{text} is no size of a file: write a number above 0 and MB, GB, MiB or GiB, such as 90MB",
            param_hint="--target-size",
        )
    return size


def run(asked: Asked, *, as_json: bool) -> None:
    """Reach the target and say what was reached."""
    from edgelora.cli.display import listener
    from edgelora.pipeline.budget import BudgetOptions, Target, quantize_to

    if asked.out is None:
        raise typer.BadParameter("name the file to write", param_hint="OUT")
    target = Target(None if asked.size is None else size_bytes(asked.size), asked.kl)
    options = BudgetOptions(
        asked.data, asked.text, asked.imatrix, asked.save_plan, asked.repair, asked.overwrite, asked.allow_requantize
    )
    with listener(as_json) as display:
        reached = quantize_to(
            asked.source, asked.out, target, options,
            on_cost=lambda cost: display.say(f"what the bits of each tensor are worth: {cost}; kept for next time"),
            on_progress=display.show,
        )  # fmt: skip
        _say(reached, asked.source.name, display)
    if as_json:
        print(json.dumps(reached.as_dict()))


def _say(reached: Reached, source: str, display: Listener) -> None:
    for tried in reached.attempts:
        if tried is not reached.taken:
            display.say(f"a plan of {size(tried.file_bytes)} has a KL of {tried.measured.kl_mean:.4g}: not taken")
    last = reached.taken
    kinds = Counter(kind.name for kind in reached.plan.types.values()).most_common()
    display.say(
        f"{reached.path}: {size(reached.size_bytes)}, mean KL {reached.kl:.4g} to {source} on "
        f"{last.measured.n_tokens:,} held-out tokens ({last.predicted_kl:.4g} predicted)"
    )
    display.say("tensors: " + ", ".join(f"{n} {kind}" for kind, n in kinds))
    display.say(reached.certificate.sentence)
    if reached.repair is not None:
        display.say(str(reached.repair))
        if reached.repair.kept:
            display.say(f"use both: edgelora chat {reached.path} --adapter {reached.repair.path}")
    for note in reached.notes:
        display.note(note)
