"""What was measured: one CellResult for each file and way to run it, and the Report that holds them, as JSON.

`report.json` is this and nothing else; docs/report.md is its schema. Imports no torch and runs no model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, TypeAdapter, ValidationError, WithJsonSchema

from edgelora.errors import FileFormatError
from edgelora.evaluate.protocols import Speed

FORMAT = 1
WAYS = {
    "base": "base alone",
    "live": "adapter live",
    "patched": "patched base",
    "merged": "merged",
    "imatrix": "merged, imatrix",
    "trained": "trained on it",
    "torch": "adapter in torch",
}
"""THE TABLE of ways to run a fine-tune, in the order that they are shown in. All are llama.cpp's but the last, which is
only compared with."""
Way = Literal["base", "live", "patched", "merged", "imatrix", "trained", "torch"]
Status = Literal["ok", "partial", "failed"]
RATES = ("prompt_tokens_per_s", "generation_tokens_per_s", "load_seconds")  # of Speed: NaN where not measured
Number = Annotated[
    float,
    BeforeValidator(lambda value: math.nan if value is None else value),
    WithJsonSchema({"type": ["number", "null"]}),
]
"""JSON has no NaN: it is written as null, and read back."""


def _with_nan(speed: Any) -> Any:
    if not isinstance(speed, dict):
        return speed
    return {key: math.nan if value is None and key in RATES else value for key, value in speed.items()}


_DOCUMENTED = ConfigDict(use_attribute_docstrings=True, extra="forbid")


@dataclass(frozen=True)
class Measure:
    """One figure of a cell, with what a paired comparison needs of each row."""

    __pydantic_config__ = _DOCUMENTED

    value: Number
    """In the measure's unit (MEASURES); null where it is not a number."""
    interval_95: tuple[Number, Number] | None = None
    """By resampling rows or windows."""
    rows: tuple[Number, ...] = ()
    """Of each row or window, as MEASURES says: 1 or 0 for right and wrong, else a sum over its tokens, in nats."""
    weights: tuple[Number, ...] = ()
    """What each of `rows` is a sum over, such as its tokens; empty where each counts alike."""
    chance: float | None = None
    """What guessing would reach, of multiple choice."""


@dataclass(frozen=True)
class UsedFile:
    """A file that a result rests on."""

    __pydantic_config__ = _DOCUMENTED

    role: str
    """`base`, `adapter`, `calibration`, `model`, `imatrix`; of data: `task`, `text`, `choice`."""
    path: str
    """As it was given, or inside the report's folder."""
    sha256: str
    size_bytes: int


NOT_MEASURED = Speed(math.nan, math.nan, math.nan, 0)


@dataclass(frozen=True)
class CellResult:
    """One way at one level of quantization. What a partial cell lacks is absent; a failed one says why."""

    __pydantic_config__ = _DOCUMENTED

    way: Way
    quant: str
    """Such as Q4_K_M; that of the base where an adapter is live."""
    status: Status = "ok"
    why: str = ""
    """Of a failed or partial cell: what happened. Of one in torch: why it is not llama.cpp's."""
    path: str = ""
    """The file to ship: the model; a live adapter stands in `files` beside it. Empty where nothing can be shipped."""
    sha256: str = ""
    """Of the file at `path`."""
    size_bytes: int = 0
    """Of all that it takes: the model, and its adapter where that is not in it."""
    measures: dict[str, Measure] = field(default_factory=dict)
    """By a name of MEASURES, with `/` and a part behind it where there are several: `right`, `right/known`,
    `choice/arc-easy`."""
    speed: Annotated[Speed, BeforeValidator(_with_nan)] = NOT_MEASURED
    """Rates in tokens/s, times in seconds, the peak of resident memory in bytes; null or 0: not measured."""
    samples: tuple[str, ...] = ()
    """Its answers to the report's `samples`, in their order."""
    tensor_types: dict[str, str] = field(default_factory=dict)
    """GGUF's name of each tensor → its type, such as Q4_K."""
    files: tuple[UsedFile, ...] = ()

    @property
    def name(self) -> str:
        """`Q4_K_M merged`: the level, and the way as WAYS calls it."""
        return f"{self.quant} {WAYS[self.way]}"

    @property
    def ships(self) -> bool:
        """Whether it is something to ship: what torch computed is not."""
        return self.way != "torch"

    def measure(self, key: str) -> Measure | None:
        """None where it was not taken, or came out as no number: that is never ranked."""
        found = self.measures.get(key)
        return found if found is not None and math.isfinite(found.value) else None


@dataclass(frozen=True)
class Sample:
    """A row whose answers are shown side by side."""

    __pydantic_config__ = _DOCUMENTED

    prompt: str
    reference: str


@dataclass(frozen=True)
class Provenance:
    """What it takes to repeat the report."""

    __pydantic_config__ = _DOCUMENTED

    command: str
    created: str
    """ISO 8601, UTC."""
    cpu: str
    threads: int
    seeds: tuple[int, ...]
    versions: dict[str, str]
    """Of Python and the packages, and of edgelora's checkout (`revision`)."""
    data: tuple[UsedFile, ...]
    """What was scored. Reports of different data are not compared."""
    files: tuple[UsedFile, ...] = ()
    """What the cells were built from."""
    settings: dict[str, str | int | float | bool | None] = field(default_factory=dict)
    """Of the measurement: the metric, the context, the number of windows, flash attention, the KV cache's type …"""


@dataclass(frozen=True)
class Report:
    """All cells of one base, adapter and data."""

    __pydantic_config__ = _DOCUMENTED

    title: str
    cells: tuple[CellResult, ...]
    provenance: Provenance
    samples: tuple[Sample, ...] = ()
    format: Literal[1] = 1
    """Of this file; another number is another schema."""

    def to_json(self) -> str:
        return _REPORT.dump_json(self, indent=1).decode()


_CELL, _REPORT = TypeAdapter(CellResult), TypeAdapter(Report)


def cell_to_json(cell: CellResult) -> str:
    """What `cell_from_json` reads."""
    return _CELL.dump_json(cell, indent=1).decode()


def cell_from_json(text: str | bytes, name: str) -> CellResult:
    """Raises FileFormatError, which calls the file `name`."""
    try:
        return _CELL.validate_json(text)
    except ValidationError as e:
        raise _broken(name, "cell of a report", e) from e


def report_from_json(text: str | bytes, name: str) -> Report:
    """Raises FileFormatError, which calls the file `name`."""
    try:
        return _REPORT.validate_json(text)
    except ValidationError as e:
        raise _broken(name, "report", e) from e


def in_order(cells: Sequence[CellResult]) -> list[CellResult]:
    """Way by way as WAYS has them, the smallest first, as they came where neither tells."""
    ways = list(WAYS)
    return sorted(cells, key=lambda cell: (ways.index(cell.way), cell.size_bytes))


def _broken(name: str, kind: str, error: ValidationError) -> FileFormatError:
    first, *others = error.errors(include_url=False, include_input=False)
    where = ".".join(str(part) for part in first["loc"]) or "the file"
    return FileFormatError(
        what=f"{name}: this is no {kind} of format {FORMAT}",
        why=f"{where}: {first['msg']}" + (f", and {len(others)} faults more" if others else ""),
        fix="pass a report.json that `edgelora report` wrote, of this version",
    )
