"""THE TABLE of what a cell is measured by: what each figure is about, which way is better, how it is paired."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from edgelora.errors import FileFormatError
from edgelora.evaluate import paired
from edgelora.evaluate.cells import Measure


@dataclass(frozen=True)
class Kind:
    """`about`: the user's task, the fidelity to a reference, or general ability (what the adapter may have cost)."""

    title: str
    about: Literal["task", "fidelity", "general"]
    better: Literal[1, -1]
    """1: higher is better."""
    write: Callable[[float], str]
    rows: str
    """What Measure.rows and Measure.weights hold."""
    is_share: bool = False
    """Of right rows, of which McNemar's test is made."""
    in_nats: bool = False
    """Whether a difference of its rows' means is one of nats a token."""
    scale: Callable[[float], float] = float
    """From its value to the mean of its rows."""


def _percent(share: float) -> str:
    return f"{share:.1%}"


MEASURES: dict[str, Kind] = {
    "right": Kind("right answers", "task", 1, _percent, "1 or 0 of each row", is_share=True),
    "loss": Kind("held-out loss", "task", -1, "{:.3f}".format, "−log p of each row's answer; its tokens", in_nats=True),
    "kl": Kind("KL to the reference", "fidelity", -1, "{:.4f}".format, "KL of each window; its tokens", in_nats=True),
    "same_top": Kind("same top", "fidelity", 1, _percent, "equal tops of each window; its tokens"),
    "perplexity": Kind(
        "perplexity",
        "general",
        -1,
        "{:.3f}".format,
        "−log p of each window; its scored tokens",
        in_nats=True,
        scale=math.log,
    ),
    "bits_per_byte": Kind("bits per byte", "general", -1, "{:.4f}".format, "bits of each window; its bytes"),
    "choice": Kind("multiple choice", "general", 1, _percent, "1 or 0 of each question", is_share=True),
}


def kind_of(key: str) -> Kind:
    """Of a measure's name, with or without a part: `choice/arc-easy` → `choice`. Raises FileFormatError for another."""
    name = key.partition("/")[0]
    if name not in MEASURES:
        raise FileFormatError(
            what=f"{key}: there is no measure of that name",
            why=f"a report has {', '.join(MEASURES)}, and parts of them",
            fix="make the report again with this version",
        )
    return MEASURES[name]


def title_of(key: str) -> str:
    """`choice/arc-easy` → `multiple choice: arc-easy`."""
    _, _, part = key.partition("/")
    return kind_of(key).title + (f": {part}" if part else "")


@lru_cache(maxsize=1024)
def difference(key: str, a: Measure, b: Measure) -> paired.Difference | None:
    """b − a over the same rows; of perplexity the ln of its ratio (nats). None where the rows are not the same ones.

    Kept: a page asks for the same pair in several places, and 10,000 draws take a moment.
    """
    if not a.rows or len(a.rows) != len(b.rows) or a.weights != b.weights:
        return None
    if kind_of(key).is_share:
        return paired.of_shares([row > 0 for row in a.rows], [row > 0 for row in b.rows])
    return paired.of_means(a.rows, b.rows, a.weights or None)
