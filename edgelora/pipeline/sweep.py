"""A sweep done: each trial trains to where `training.sweep` sends it, in a child process; the best becomes --out."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgelora.child import run_in_child
from edgelora.config import TrainConfig
from edgelora.errors import ConfigError, EdgeloraError, EngineError
from edgelora.files.atomic import remove, staged
from edgelora.invocation import command
from edgelora.peft.adapter import refuse_to_write
from edgelora.pipeline.sweep_folder import Record, SweepFolder
from edgelora.pipeline.trainee import Trainee, require_trainable
from edgelora.progress import OnProgress, finite, silent
from edgelora.training import curve
from edgelora.training.folder import RunFolder
from edgelora.training.interrupt import Interrupt, Stopped, asked_by, interruptible
from edgelora.training.sweep import Result, Standing, Trial, first_rung, successive_halving, trials_of, work


@dataclass(frozen=True)
class Sweep:
    """standings: of all trials, the best first; its adapter is at `out`."""

    out: Path
    folder: Path
    standings: list[Standing]


@dataclass(frozen=True)
class SweepListeners:
    """Who hears of a sweep: `on_say` each trial that has come as far as it was sent, `on_note` what is odd."""

    on_progress: OnProgress = silent
    on_say: Callable[[str], None] = lambda _: None
    on_note: Callable[[str], None] = lambda _: None


def run_sweep(config: TrainConfig, words: Sequence[str], heard: SweepListeners | None = None) -> Sweep:
    """Train every combination of `words` (`rank=4,8`) as far as it is worth, and make the best adapter config.out.

    Trials are ranked by held-out loss; they and `sweep.json` stand in OUT.sweep. Asked to stop (Ctrl-C, SIGTERM), it
    raises Stopped, and with config.resume goes on there. Raises EdgeloraError for every fault of the input before the
    first step.
    """
    heard = heard or SweepListeners()
    _refuse(config)
    folder = SweepFolder(config.out)
    earlier = folder.earlier(config)
    refuse_to_write(config.out, config.overwrite or earlier is not None)
    asked = config if earlier is None else earlier.with_wishes(config)
    trials = trials_of(asked, words)
    names = [trial.name for trial in trials]
    record = earlier or Record(asked=config.model_dump(mode="json", exclude_unset=True), trials=names)
    record.require_trials(names)
    run_in_child(require_trainable, trials, with_torch=True)
    heard.on_say(
        f"{len(trials)} trials train as much as {work(len(trials)):.1f} whole runs; the first half of them stops at "
        f"{first_rung(len(trials)):.0%}"
    )
    trainee = Trainee(heard.on_progress, heard.on_note)
    with folder.held(anew=earlier is None), interruptible(trainee.answer) as interrupt:
        runner = _Runner(folder, record, heard, interrupt, trainee, _again(asked, words))
        folder.write(record)
        standings: list[Standing] = []
        for standing in successive_halving(trials, runner.train):
            standings.insert(0, standing)
            checkpoints = RunFolder(standing.trial.config.out).checkpoints
            if standing.share < 1 and checkpoints.exists():
                remove(checkpoints)  # it never goes on, and they are the largest part of it
        record.ranking = [as_row(standing) for standing in standings]
        folder.write(record)
        _draw(folder.picture, asked, standings)
        _take(standings[0], config.out)
    return Sweep(config.out, folder.path, standings)


def as_row(standing: Standing) -> dict[str, Any]:
    """A trial in the ranking, as JSON can hold it. stopped_at: the share of its run; null for one that ended."""
    result = standing.result
    return {
        "trial": standing.trial.name, "settings": standing.trial.settings, "steps": result.step,
        "steps_of_a_run": result.total, "held_out_loss": finite(standing.loss), "seconds": round(result.seconds, 1),
        "stopped_at": None if result.ended else round(result.step / result.total, 4), "fault": result.fault,
    }  # fmt: skip


@dataclass
class _Runner:
    """Trains trials one after the other, and writes down after each how far it came."""

    folder: SweepFolder
    record: Record
    heard: SweepListeners
    interrupt: Interrupt
    trainee: Trainee
    again: str
    noted: set[str] = field(default_factory=set)

    def train(self, trial: Trial, share: float) -> Result:
        """Bring it there, unless it is there already."""
        before = self.record.results.get(trial.name)
        if before is not None and before.reached(share):
            return before
        self._stop_if_asked(trial)
        try:
            leg = self.trainee.train(trial.config, share, lambda: self.interrupt.asked is not None)
        except (Stopped, EngineError):
            self._stop_if_asked(trial)
            raise
        for note in leg.notes:
            if before is None and note not in self.noted:
                self.heard.on_note(note)
            self.noted.add(note)
        self.record.require_same(leg.digests)
        self.record.results[trial.name] = leg.result
        self.folder.write(self.record)
        self._tell(trial, leg.result, share)
        return leg.result

    def _tell(self, trial: Trial, result: Result, share: float) -> None:
        did = result.fault or f"held-out loss {result.loss_at(share):.4f}"
        self.heard.on_say(f"{trial.name}: {did}, step {result.step} of {result.total}, {result.seconds:.0f} s")
        if len(self.record.results) == 1:
            whole = result.seconds / result.step * result.total * work(len(self.record.trials))
            self.heard.on_say(f"at this pace the whole sweep takes about {max(whole / 60, 1):.0f} min")

    def _stop_if_asked(self, trial: Trial) -> None:
        if self.interrupt.asked is not None:
            raise Stopped(
                what=f"stopped at the trial {trial.name}; nothing is lost",
                why=asked_by(self.interrupt.exit_code),
                fix=f"go on with: {self.again}",
                exit_code=self.interrupt.exit_code,
            )


def at_once(config: TrainConfig, words: Sequence[str], exit_code: int = 130) -> Stopped:
    """What a second signal left, or one before the first trial: what its trials had saved, or nothing."""
    why, folder = asked_by(exit_code), SweepFolder(config.out)
    if not folder.record.exists():
        return Stopped("stopped at once: nothing was saved", why, "give the same command again", exit_code)
    return Stopped(
        f"stopped at once; what the trials had saved by then is in {folder.path}", why,
        f"go on with: {_again(config, words)}", exit_code,
    )  # fmt: skip


def _refuse(config: TrainConfig) -> None:
    if config.valid is None:
        raise ConfigError(
            what="--sweep without --valid",
            why="trials are ranked by the loss of rows that none of them has learned",
            fix="pass --valid ROWS, with rows that are not in the data",
        )
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError(
            what="--sweep under torchrun",
            why="trials train one after the other, each in a process of its own",
            fix="start the sweep without torchrun, and train with it what the sweep finds",
        )


def _again(config: TrainConfig, words: Sequence[str]) -> str:
    swept = [part for word in words for part in ("--sweep", word)]
    assert config.valid is not None
    rows = map(str, config.data)
    return command("train", config.base, *rows, "--valid", config.valid, "--out", config.out, *swept, "--resume")


def _draw(path: Path, config: TrainConfig, standings: Sequence[Standing]) -> None:
    lines = []
    for standing in standings:
        held_out = [(step, math.nan if loss is None else loss) for step, loss in standing.result.held_out]
        lines.append(curve.Trial(standing.trial.name, held_out, standing.loss, stopped=not standing.result.ended))
    title = f"{config.base.name} · {config.data[0].path.name} · {len(standings)} trials"
    curve.sweep_plot(path, lines, title, config.objective)


def _take(best: Standing, out: Path) -> None:
    """Copy the adapter of the best trial to `out`, in one step."""
    if best.result.fault is not None:
        raise EdgeloraError(
            what="no trial of the sweep came to its end",
            why=f"the best one, {best.trial.name}: {best.result.fault}",
            fix="sweep lower learning rates, with --overwrite",
        )
    with staged(out, folder=True, overwrite=True) as draft:
        for file in sorted(best.trial.config.out.iterdir()):
            shutil.copyfile(file, draft / file.name)
