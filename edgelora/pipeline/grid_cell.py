"""One cell of a report, part by part, each in a child process: speed, text, task, multiple choice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from edgelora.base.model import open_base
from edgelora.child import run_in_child
from edgelora.errors import EdgeloraError
from edgelora.evaluate.cells import CellResult, UsedFile
from edgelora.evaluate.taken import choice_measure, task_measures, text_measures
from edgelora.pipeline.engines import LLAMA_CPP, TORCH
from edgelora.pipeline.evaluate import Cell, adapter_files, measure_speed, score_choice, score_task
from edgelora.pipeline.grid import Grid, Place, digest
from edgelora.pipeline.grid_files import Shipped, Workshop
from edgelora.pipeline.perplexity import Run, measure
from edgelora.progress import OnProgress

UNFINISHED = "it was stopped before its end"


@dataclass(frozen=True)
class CellJob:
    """What it takes to measure a place. `reference`: predictions to compare with, None for none. `folder`: the
    report's, from which paths are told. `keep` is given the cell after each part."""

    grid: Grid
    place: Place
    reference: Path | None
    folder: Path
    keep: Callable[[CellResult], None]
    on_progress: OnProgress

    @property
    def engine(self) -> str:
        return TORCH if self.place.way == "torch" else LLAMA_CPP


def measure_cell(job: CellJob, workshop: Workshop, before: CellResult | None = None) -> CellResult:
    """Build what is missing and measure what `before` lacks. A fault is the cell's `why`, and no other's business."""
    place = job.place
    try:
        shipped = workshop.shipped(place)
        cell = _begun(job, shipped, before)
    except EdgeloraError as e:
        return CellResult(place.way, place.quant, "failed", _why(e))
    for name, take in _parts(job, shipped, cell):
        try:
            cell = take(cell)
        except EdgeloraError as e:
            failed = not cell.speed.peak_bytes and not cell.measures
            return replace(cell, status="failed" if failed else "partial", why=f"{name}: {_why(e)}")
        job.keep(cell)
    return replace(cell, status="ok", why=_why_in_torch(job.grid) if job.engine == TORCH else "")


def _parts(
    job: CellJob, shipped: Shipped, cell: CellResult
) -> Iterator[tuple[str, Callable[[CellResult], CellResult]]]:
    """What is still to be measured: its name, and what adds it to a cell."""
    grid, asked = job.grid, job.grid.asked

    def of(data: Path, metric: str = "exact", pattern: str | None = None) -> Cell:
        return Cell(
            job.place.name, shipped.model, data, shipped.adapter, shipped.scale, asked.allow_unverified, metric,
            pattern, job.engine,
        )  # fmt: skip

    if job.engine == LLAMA_CPP and not cell.speed.peak_bytes:
        yield (
            "speed",
            lambda cell: replace(cell, speed=run_in_child(measure_speed, of(Path()), on_progress=job.on_progress)),
        )
    if asked.text is not None and "perplexity" not in cell.measures:
        # the base is to differ from the fine-tune, and an adapter of its own is another one
        is_other = job.place.way == "trained" or (job.place.way == "base" and asked.adapter is not None)
        against = None if is_other else job.reference
        yield "text", lambda cell: _with_text(cell, _text_run(job, shipped, against), job.on_progress)
    task = grid.task
    if task is not None and "right" not in cell.measures:
        scored = of(task.path, task.metric, asked.pattern)
        yield "task", lambda cell: _with_task(cell, scored, task.shown, job.on_progress)
    for name, path in grid.choices.items():
        if f"choice/{name}" not in cell.measures:
            yield name, lambda cell, name=name, path=path: _with_choice(cell, name, of(path), job.on_progress)  # type: ignore[misc]


def _text_run(job: CellJob, shipped: Shipped, against: Path | None) -> Run:
    asked = job.grid.asked
    adapter = None if shipped.adapter is None else (shipped.adapter, shipped.scale)
    return Run(
        shipped.model, asked.text, adapter, against, context=asked.context, chunks=asked.windows,
        allow_unverified=asked.allow_unverified, engine=job.engine,
    )  # fmt: skip


def _with_text(cell: CellResult, run: Run, on_progress: OnProgress) -> CellResult:
    return replace(cell, measures=cell.measures | text_measures(measure(run, on_progress).by_window))


def _with_task(cell: CellResult, scored: Cell, shown: list[int], on_progress: OnProgress) -> CellResult:
    found = run_in_child(score_task, scored, with_torch=scored.in_torch, on_progress=on_progress)
    samples = tuple(found.answers[i] for i in shown)
    return replace(cell, measures=cell.measures | task_measures(found), samples=samples)


def _with_choice(cell: CellResult, name: str, scored: Cell, on_progress: OnProgress) -> CellResult:
    found = run_in_child(score_choice, scored, with_torch=scored.in_torch, on_progress=on_progress)
    return replace(cell, measures=cell.measures | {f"choice/{name}": choice_measure(found)})


def _begun(job: CellJob, shipped: Shipped, before: CellResult | None) -> CellResult:
    """The cell with its files and types, and whatever was measured before of the very same file."""
    model = open_base(shipped.model)
    sha256 = model.base_file.sha256
    files = [UsedFile("model", told(shipped.model, job.folder), sha256, shipped.model.stat().st_size)]
    for role, path in (("adapter", shipped.adapter), ("imatrix", shipped.imatrix)):
        if path is not None:
            own = adapter_files(path)
            files.append(UsedFile(role, told(path, job.folder), digest(own), sum(f.stat().st_size for f in own)))
    to_ship = ("", "") if job.engine == TORCH else (files[0].path, sha256)
    cell = CellResult(
        job.place.way, job.place.quant, "partial", UNFINISHED, *to_ship, shipped.size_bytes,
        tensor_types={name: info.type.name for name, info in model.file.tensors.items()}, files=tuple(files),
    )  # fmt: skip
    if before is None or before.files != cell.files:
        return cell
    return replace(cell, measures=before.measures, speed=before.speed, samples=before.samples)


def _why_in_torch(grid: Grid) -> str:
    why = f" ({grid.live.why})" if grid.live.why else ""
    return f"computed in torch over this very file{why}: speed and memory would be torch's, and are not measured"


def told(path: Path, folder: Path) -> str:
    """A path inside the report's folder from there, any other as it was given."""
    try:
        return path.absolute().relative_to(folder.absolute()).as_posix()
    except ValueError:
        return str(path)


def _why(error: EdgeloraError) -> str:
    return f"{error.what} ({error.why})"
