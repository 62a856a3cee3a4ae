"""`metrics.jsonl`: what every step of a run measured, a line each, exactly once however often the run was stopped."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from edgelora.errors import FileFormatError, OutputError
from edgelora.progress import Progress, Sample, finite


@dataclass(frozen=True)
class Metrics:
    """One line. Step 0 is the base before the first step: it has a held-out loss and no other.

    loss: mean −log p over the tokens of the step, in nats. tokens: of this step; seconds: of the run so far, those
    before it was stopped included. numbers: what the objective says beside its loss, by TRL's names. None where
    something was not measured.
    """

    step: int
    epoch: float
    loss: float | None = None
    held_out_loss: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    tokens: int | None = None
    tokens_per_s: float | None = None
    seconds: float | None = None
    peak_bytes: int | None = None
    skipped_steps: int = 0
    samples: tuple[Sample, ...] = ()
    numbers: Mapping[str, float] = field(default_factory=dict)
    held_out_numbers: Mapping[str, float] = field(default_factory=dict)


EXACT = ("loss", "held_out_loss")


def metrics_of(p: Progress, tokens: int, seconds: float) -> Metrics:
    """What a finished step of a training said of itself, with its tokens and the seconds of the run so far."""
    return Metrics(
        p.step, p.epoch or 0.0, p.loss, p.held_out_loss, p.learning_rate, p.grad_norm, tokens, p.tokens_per_s,
        seconds, p.peak_bytes, p.skipped_steps or 0, p.samples, p.numbers, p.held_out_numbers,
    )  # fmt: skip


def as_line(metrics: Metrics) -> str:
    """A line of JSON. A loss stands there twice: for people, and as the very bits, which JSON has no way to say."""
    fields: dict[str, Any] = {}
    for name, value in asdict(metrics).items():
        if value not in (None, (), {}):
            fields[name] = finite(value)
        if name in EXACT and value is not None:
            fields[f"{name}_hex"] = value.hex()
    return json.dumps(fields, ensure_ascii=False, allow_nan=False) + "\n"


def _metrics(line: bytes) -> Metrics:
    """The inverse of `as_line`. Raises ValueError, KeyError or TypeError."""
    fields = json.loads(line)
    exact = {name: float.fromhex(fields.pop(f"{name}_hex")) for name in EXACT if f"{name}_hex" in fields}
    samples = tuple(Sample(**sample) for sample in fields.pop("samples", []))
    if type(fields["step"]) is not int:
        raise ValueError(f"step {fields['step']!r}")
    return Metrics(**{**fields, **exact}, samples=samples)


def read_metrics(path: Path) -> list[Metrics]:
    """Every whole line. A last one without an end is what a killed process was writing, and is left out.

    Raises FileFormatError for any other line that is not one of ours, naming them all.
    """
    return [metrics for metrics, _ in _lines(path)]


def _lines(path: Path) -> list[tuple[Metrics, int]]:
    """Each line, and how many bytes of the file end with it."""
    try:
        data = path.read_bytes()
    except OSError as e:
        raise _unreadable(path, e.strerror or "unreadable") from e
    found, faults, at = [], [], 0
    for number, line in enumerate(data.splitlines(keepends=True), 1):
        at += len(line)
        if not line.endswith(b"\n"):
            break  # torn
        try:
            found.append((_metrics(line), at))
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            faults.append(f"line {number} ({e})")
    if faults:
        raise _unreadable(path, ", ".join(faults))
    return found


def _unreadable(path: Path, what: str) -> FileFormatError:
    return FileFormatError(
        what=f"{path}: cannot be read: {what}",
        why="it is not what a training wrote there, or it was changed since",
        fix="restore the file, or delete it: the run goes on, and its curve begins where it goes on",
    )


class MetricsLog:
    """The file, open for the rest of a run that goes on behind step `after` (None: for a new run); a context.

    Lines of later steps are cut: the run that wrote them was stopped before their checkpoint, and they come again.
    Raises OutputError if the disk refuses, FileFormatError as `read_metrics` does.
    """

    def __init__(self, path: Path, after: int | None) -> None:
        self._path = path
        before = [] if after is None or not path.exists() else _lines(path)
        kept = [end for metrics, end in before if after is not None and metrics.step <= after]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab")
            self._file.truncate(max(kept, default=0))
        except OSError as e:
            raise self._refused(e) from e

    def append(self, metrics: Metrics) -> None:
        """Write a line and hand it to the system: it outlives this process, whatever ends it."""
        try:
            self._file.write(as_line(metrics).encode())
            self._file.flush()
        except OSError as e:
            raise self._refused(e) from e

    def sync(self) -> None:
        """Bring it to the disk. Before each checkpoint, so that no line is missing where a run goes on."""
        try:
            os.fsync(self._file.fileno())
        except OSError as e:
            raise self._refused(e) from e

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        with contextlib.suppress(OSError):  # every line was handed over before; a full disk was reported then
            self._file.close()

    def _refused(self, e: OSError) -> OutputError:
        return OutputError(
            what=f"{self._path}: could not be written ({e.strerror})",
            why="the disk refused; the checkpoints that stand are untouched",
            fix="free some space, then run the command again with --resume",
        )
