"""`edgelora report`: every cell of a grid measured, kept as it comes, and written as a page to decide from.

Each cell is a file below the report's folder, named by everything that its figures rest on: whatever stops a report,
the same command goes on where it was, and what has changed since is measured again.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType

from edgelora.child import run_in_child
from edgelora.device import physical_cores, processor_name
from edgelora.errors import ConfigError, EdgeloraError, FileFormatError
from edgelora.evaluate.cells import CellResult, Report, cell_from_json, cell_to_json
from edgelora.evaluate.recommend import Choice, Limits
from edgelora.files.atomic import sweep, write_text
from edgelora.files.lock import locked
from edgelora.pipeline.evaluate import Cell, measure_speed
from edgelora.pipeline.grid import Asked, Grid, Place
from edgelora.pipeline.grid_cell import UNFINISHED, CellJob, measure_cell
from edgelora.pipeline.grid_files import Survey, Workshop
from edgelora.pipeline.grid_provenance import provenance
from edgelora.pipeline.page import write_page
from edgelora.progress import OnProgress, Progress, silent
from edgelora.training.interrupt import Stopped, asked_by
from edgelora.words import count, size

CELLS, FILES, LOCK = "cells", "files", "lock"
CHILD_SECONDS = 2.0  # to start a process and load a model, four or more times a cell: what is said before one was timed
AT_ONCE = 3.0  # how much faster answers side by side are than one by one, on a CPU


@dataclass(frozen=True)
class Heard:
    """Who wants to know what happens."""

    on_progress: OnProgress = silent
    on_say: Callable[[str], None] = lambda _: None
    on_note: Callable[[str], None] = lambda _: None


@dataclass(frozen=True)
class Made:
    """The report, where it stands and what it recommends."""

    report: Report
    folder: Path
    choice: Choice


def make_report(asked: Asked, command: str, limits: Limits | None = None, heard: Heard | None = None) -> Made:
    """Build what is missing, measure every cell that is not kept from an earlier time, and write the page.

    command: as a person would type it again. Raises what `Grid.plan` raises, OutputError for a full disk, and Stopped
    after Ctrl-C or SIGTERM: the page then has what there was, the rest marked partial.
    """
    heard = heard or Heard()
    grid = Grid.plan(asked)
    if limits is not None and limits.min_quality is not None and grid.task is None:
        raise ConfigError(
            what=f"--min-quality {limits.min_quality:g}: there is no task",
            why="it is the least share of right answers",
            fix="pass rows to answer with --data, or leave the limit out",
        )
    with locked(asked.out / LOCK):
        sweep(asked.out / CELLS)
        run = _Run(grid, command, heard)
        run.tell_cost()
        try:
            with _stopped_by_sigterm():
                run.measure()
        except (KeyboardInterrupt, SystemExit) as e:
            write_page(run.report(), asked.out, limits)
            raise _stopped(run, e) from e
        report = run.report()
        return Made(report, asked.out, write_page(report, asked.out, limits))


@dataclass
class _Run:
    """Goes from cell to cell. `cells`: what is known of each place so far."""

    grid: Grid
    command: str
    heard: Heard
    cells: dict[Place, CellResult] = field(default_factory=dict)
    began: float = 0.0
    forecast: float = 0.0
    """Seconds of one cell, before the first was timed."""
    seconds: list[float] = field(default_factory=list)
    """Of those that were measured."""

    def __post_init__(self) -> None:
        self.folder = self.grid.asked.out
        self.workshop = Workshop(self.grid, self.folder / FILES)
        for place in self.grid.places:
            if (kept := self._kept(place)) is not None:
                self.cells[place] = kept

    @property
    def left(self) -> list[Place]:
        """What is not whole yet; what failed is tried again."""
        return [p for p in self.grid.places if p not in self.cells or self.cells[p].status != "ok"]

    def tell_cost(self) -> None:
        """Say how much there is to do, what it takes of the disk, and about how long."""
        survey = Survey(self.grid, self.folder / FILES)
        needed, n_places, n_left = survey.require_space(), len(self.grid.places), len(self.left)
        kept = f", {n_places - n_left} of them measured before" if n_left < n_places else ""
        room = f", {size(needed)} at most" if survey.missing else ""
        self.heard.on_say(f"{n_places} cells{kept}; {count(len(survey.missing), 'file')} to build{room}")
        if not n_left:
            return
        self.forecast = self._forecast()
        if self.forecast:
            minutes = max(self.forecast * n_left / 60, 1)
            self.heard.on_say(
                f"to measure {n_left} cells takes about {minutes:.0f} min by the base's speed, which was timed; "
                "building comes on top"
            )

    def _forecast(self) -> float:
        """Seconds of a cell, by the speed of the base as it was given; 0 for one that llama.cpp cannot run yet."""
        grid = self.grid
        if not grid.base.is_gguf:
            return 0.0
        with suppress(EdgeloraError):  # the cells will say why
            speed = run_in_child(measure_speed, Cell("base", grid.base.file.path, Path()))
            read, written = grid.n_text_tokens, 0
            if grid.task is not None:
                tokens = [len(grid.base.tokenizer.encode(row.answer).ids) for row in grid.task.rows]
                asked = [len(grid.base.tokenizer.encode(row.messages[-2].content or "").ids) for row in grid.task.rows]
                read, written = read + sum(tokens) + sum(asked), sum(tokens)
            read += grid.n_choice_tokens
            parts = 1 + (grid.n_text_tokens > 0) + (grid.task is not None) + len(grid.choices)
            return (
                read / speed.prompt_tokens_per_s + written / (AT_ONCE * speed.generation_tokens_per_s)
                + parts * CHILD_SECONDS
            )  # fmt: skip
        return 0.0

    def measure(self) -> None:
        """Measure every place that is left."""
        if not self.left:
            return
        reference = self._reference()
        for place in self.left:
            self.began = time.perf_counter()
            self.workshop.on_progress = self._hear(place.name)
            job = CellJob(
                self.grid, place, reference, self.folder, lambda cell, place=place: self._keep(place, cell),  # type: ignore[misc]
                self._hear(place.name),
            )  # fmt: skip
            cell = measure_cell(job, self.workshop, self.cells.get(place))
            self._keep(place, cell)
            self.seconds.append(time.perf_counter() - self.began)
            self._tell(cell)

    def _reference(self) -> Path | None:
        """Without it the cells have no KL, and everything else."""
        self.began = time.perf_counter()
        self.workshop.on_progress = self._hear("reference")
        try:
            return self.workshop.reference()
        except EdgeloraError as e:
            self.heard.on_note(f"no KL to the reference, which could not be made: {e.what} ({e.why})")
            return None

    def _tell(self, cell: CellResult) -> None:
        from edgelora.evaluate.report import COLUMNS

        told = {"size_mb", "right", "loss", "kl", "perplexity"}
        figures = [
            f"{column.title} {column.write(value)}" for column in COLUMNS
            if column.key in told and (value := column.of(cell)) is not None
        ]  # fmt: skip
        n = sum(one.status == "ok" for one in self.cells.values())
        if cell.status == "ok":
            self.heard.on_say(f"{cell.name}: {', '.join(figures)} ({n} of {len(self.grid.places)})")
        else:
            self.heard.on_note(f"{cell.name} {cell.status}: {cell.why}")

    def _hear(self, name: str) -> OnProgress:
        def hear(progress: Progress) -> None:
            self.heard.on_progress(replace(progress, stage=f"{name}: {progress.stage}", eta_s=self._eta(progress)))

        return hear

    def _eta(self, now: Progress) -> float | None:
        """Seconds to the end of all cells; of the one in work no less than what it is at takes (a file to build)."""
        each = sum(self.seconds) / len(self.seconds) if self.seconds else self.forecast
        if not each:
            return None
        of_this = max(each - (time.perf_counter() - self.began), now.eta_s or 0.0, 1.0)
        return of_this + each * max(len(self.left) - 1, 0)

    # -- what is kept -----------------------------------------------------------------------------------------------

    def _path(self, place: Place) -> Path:
        grid, asked = self.grid, self.grid.asked
        key = grid.key(
            place.way, place.quant, grid.rests_on(place), asked.windows, asked.context,
            grid.task and grid.task.metric, asked.pattern, processor_name(), physical_cores(),
        )  # fmt: skip
        return self.folder / CELLS / f"{place.way}-{place.quant}-{key}.json"

    def _kept(self, place: Place) -> CellResult | None:
        """As it was measured before; partial if a file of it is gone, which is then built again."""
        path = self._path(place)
        try:
            cell = cell_from_json(path.read_bytes(), str(path))
            gone = [
                file.path for file in cell.files if not ((self.folder / file.path).exists() or Path(file.path).exists())
            ]
            return replace(cell, status="partial", why=f"{gone[0]} is gone") if gone else cell
        except FileNotFoundError:
            return None
        except FileFormatError as e:
            self.heard.on_note(f"{e.what} ({e.why}): measured again")
            return None

    def _keep(self, place: Place, cell: CellResult) -> None:
        self.cells[place] = cell
        write_text(self._path(place), cell_to_json(cell), overwrite=True)

    # -- the report -------------------------------------------------------------------------------------------------

    def report(self) -> Report:
        """As far as it is."""
        grid, task = self.grid, self.grid.task
        unknown = [CellResult(p.way, p.quant, "partial", UNFINISHED) for p in grid.places if p not in self.cells]
        adapter = f"{grid.asked.adapter[0].resolve().name} on " if grid.asked.adapter else ""
        title = f"{adapter}{grid.base.base_file.name.removesuffix('.gguf')}"
        cells = [self.cells[place] for place in grid.places if place in self.cells]
        return Report(title, (*cells, *unknown), provenance(grid, self.command), task.samples if task else ())


def _stopped(run: _Run, signal_: KeyboardInterrupt | SystemExit) -> Stopped:
    exit_code = 130 if isinstance(signal_, KeyboardInterrupt) else 143
    n, total = len(run.grid.places) - len(run.left), len(run.grid.places)
    return Stopped(
        f"stopped with {n} of {total} cells measured; {run.folder / 'report.html'} shows them",
        asked_by(exit_code),
        f"go on with: {run.command}",
        exit_code,
    )


@contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """A polite kill ends the block as Ctrl-C does. Only the main thread can listen: elsewhere nothing is changed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise SystemExit(143)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
