"""What each tensor's bits are worth: the KL of a model's output when it alone is lowered. Measures nothing itself.

Two things are measured of a tensor, and the rest is scaled. Measured: the mean KL with it alone stored as its *probe*
type, and for every type the squared error of its weights, each column weighted by its importance. Scaled: the KL of
another type is the probe's times the ratio of their errors, because near the original the KL is quadratic in the error.
Damages add up over tensors as if their errors did not meet, which a whole file is then measured against.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from edgelora.errors import FileFormatError

VERSION = 1  # of what is measured: a change makes cached measurements void


@dataclass(frozen=True)
class Sensitivity:
    """Of one tensor: its `kl` (nats, mean over positions) as `probe`, and the weighted error of each type it may have.

    `errors` may come from a sample of its rows; only their ratios count.
    """

    probe: str
    kl: float
    errors: Mapping[str, float]

    def damage(self, kind: str) -> float:
        """The KL that storing this tensor alone as `kind` costs. Raises KeyError for a type that was not tried."""
        error, probed = self.errors[kind], self.errors[self.probe]
        return self.kl * error / probed if probed > 0 else 0.0


@dataclass(frozen=True)
class Cost:
    """What measuring takes before it starts: evaluations of a part of the model, and seconds by one that was timed."""

    evaluations: int
    seconds: float

    def __str__(self) -> str:
        return f"{self.evaluations} evaluations, about {self.seconds:.0f} s by one that was timed"


def predicted(found: Mapping[str, Sensitivity], types: Mapping[str, str]) -> float:
    """The KL of a file with these types, if damages add up. Tensors of `types` that were not measured cost nothing."""
    return sum(found[name].damage(kind) for name, kind in types.items() if name in found)


def cache_key(**parts: Any) -> str:
    """One name for everything that decides the measurement: digests of the weights, the tokens and the importance."""
    text = json.dumps({"version": VERSION, **parts}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def as_json(found: Mapping[str, Sensitivity]) -> str:
    """What `from_json` reads, by tensor name."""
    return json.dumps({name: asdict(one) for name, one in found.items()}, indent=1) + "\n"


def from_json(text: str, where: str) -> dict[str, Sensitivity]:
    """What `as_json` wrote. Raises FileFormatError, naming `where` it came from."""
    try:
        return {name: Sensitivity(**one) for name, one in json.loads(text).items()}
    except (ValueError, TypeError, AttributeError) as e:
        raise FileFormatError(
            what=f"{where}: no measured sensitivities ({e})",
            why="the file was cut short, or another program wrote it",
            fix="delete it: it is measured again",
        ) from e


def as_line(name: str, one: Sensitivity) -> str:
    """One tensor, to be appended to those before it."""
    return json.dumps({name: asdict(one)}) + "\n"


def from_lines(text: str) -> dict[str, Sensitivity]:
    """What `as_line` appended; a line that was cut short is of a tensor that is not measured yet."""
    found: dict[str, Sensitivity] = {}
    for line in text.splitlines():
        with contextlib.suppress(FileFormatError):
            found |= from_json(line, "a log")
    return found
