"""SIGKILL at random moments of a training run: is a checkpoint ever corrupt, does every run go on, and is it the same?

    .venv/bin/python benchmarks/kill.py [--kills 200] [--base FILE] [--seed 0] [--out benchmarks/results/kill.json]

A child trains with a checkpoint every two steps and is killed; the same command with --resume goes on, is killed, and
so on until the adapter stands there. Its curve (every loss to the bit) and its tensors must then be those of a run that
nobody stopped. tests/test_resume.py does the same with fewer kills and a smaller model.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from edgelora.peft.adapter import CONFIG, TENSORS
from edgelora.training.checkpoint import read_checkpoint
from edgelora.training.metrics import read_metrics

ROOT = Path(__file__).resolve().parent.parent
IN_STARTUP = 0.2  # the share of kills before a first step: imports, opening the base, reading the checkpoint
STEPS_OF_A_LIFE = 6  # the others fall anywhere in so many steps, three checkpoints among them
POLL_S = 0.002


@dataclass
class Tally:
    """What happened. Everything but `corrupt` and `different` must be above 0, and those two must be 0."""

    kills: int = 0
    in_startup: int = 0
    resumed: int = 0
    """Children that went on behind a checkpoint."""
    finished: int = 0
    corrupt: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Job:
    """What is trained: the words of the command before `--out`, and the folder in which its runs stand."""

    command: Sequence[str]
    folder: Path

    def words(self, out: Path) -> list[str]:
        """The command that trains `out`, going on where it was."""
        return [*self.command, "--out", str(out), "--save-every", "2", "--resume"]

    def start(self, out: Path, log: Path) -> subprocess.Popen[bytes]:
        """A child that trains `out`; its talk goes to `log`."""
        with log.open("wb") as talk:
            return subprocess.Popen(self.words(out), cwd=ROOT, stdin=subprocess.DEVNULL, stdout=talk, stderr=talk)


@dataclass(frozen=True)
class Outcome:
    """What two runs of the same must have in common: losses to the bit, and the adapter's files."""

    curve: tuple[tuple[int, str, str], ...]
    adapter: tuple[str, ...]


def run_folder(out: Path) -> Path:
    return out.with_name(f"{out.name}.run")


def outcome(out: Path) -> Outcome:
    """Of a run that ended well."""
    lines = read_metrics(run_folder(out) / "metrics.jsonl")
    curve = tuple((line.step, exact(line.loss), exact(line.held_out_loss)) for line in lines)
    return Outcome(curve, tuple(hashlib.sha256((out / name).read_bytes()).hexdigest() for name in (TENSORS, CONFIG)))


def exact(loss: float | None) -> str:
    return "" if loss is None else loss.hex()


def uninterrupted(job: Job) -> tuple[Outcome, float, float]:
    """A run that nobody stops; the seconds to its first step, and those of a step."""
    out, log = job.folder / "whole", job.folder / "whole.log"
    started = time.monotonic()
    process = job.start(out, log)
    while not moved(out, None) and process.poll() is None:
        time.sleep(POLL_S)
    to_first_s = time.monotonic() - started
    if process.wait():
        raise SystemExit(f"the run that nobody stopped failed:\n{log.read_text(encoding='utf-8')}")
    found = outcome(out)
    return found, to_first_s, (time.monotonic() - started - to_first_s) / len(found.curve)


def moved(out: Path, before: tuple[int, int] | None) -> tuple[int, int] | None:
    """The state of the run's metrics.jsonl if it is there, has a line and is not as it was `before`."""
    try:
        found = (run_folder(out) / "metrics.jsonl").stat()
    except FileNotFoundError:
        return None
    now = (found.st_mtime_ns, found.st_size)
    return now if found.st_size and now != before else None


def kill_until(job: Job, kills: int, seed: int) -> Tally:
    """Train again and again, killing `kills` times in all; the last run is let to its end."""
    wanted, to_first_s, step_s = uninterrupted(job)
    draw, tally = random.Random(seed), Tally()
    while tally.kills < kills:
        out, newest, alive = job.folder / f"killed-{tally.finished}", -1, True
        while alive:
            alive = life(job, out, tally, draw if tally.kills < kills else None, to_first_s, step_s)
            found = whole_checkpoints(out, tally)
            if found < newest:
                tally.different.append(f"{out.name}: from step {newest} back to {found}")
            newest = found
        tally.finished += 1
        if outcome(out) != wanted:
            tally.different.append(f"{out.name}: another curve or adapter than the uninterrupted run's")
    return tally


def life(job: Job, out: Path, tally: Tally, draw: random.Random | None, to_first_s: float, step_s: float) -> bool:
    """Start a child and kill it at a moment that is drawn (None: never); whether there is more to do."""
    before, log, resumes = moved(out, None), out.with_suffix(".log"), list(checkpoints(out))
    in_startup = draw is not None and draw.random() < IN_STARTUP
    process = job.start(out, log)
    if draw is not None:
        if in_startup:
            wait(process, draw.random() * to_first_s)
        else:
            while not moved(out, before) and process.poll() is None:
                time.sleep(POLL_S)
            wait(process, draw.random() * STEPS_OF_A_LIFE * step_s)
        process.kill()
    code = process.wait()
    tally.resumed += bool(resumes)
    if code == 0:
        return False
    if draw is None or code != -9:
        raise SystemExit(f"{out.name}: the run did not go on:\n{log.read_text(encoding='utf-8')}")
    tally.kills += 1
    tally.in_startup += in_startup
    return True


def wait(process: subprocess.Popen[bytes], seconds: float) -> None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)


def checkpoints(out: Path) -> list[Path]:
    return sorted((run_folder(out) / "checkpoints").glob("step-*"))


def whole_checkpoints(out: Path, tally: Tally) -> int:
    """The step of the newest (-1: none). Each that stands must be whole, and so must the adapter."""
    newest = -1
    for path in checkpoints(out):
        try:
            newest = read_checkpoint(path).step
        except Exception as e:
            tally.corrupt.append(f"{out.name}: {e}")
    if out.exists() and not {CONFIG, TENSORS, "edgelora.json"} <= {p.name for p in out.iterdir()}:
        tally.corrupt.append(f"{out.name}: the adapter is not whole")
    return newest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--base", type=Path, help="default: the quickstart's model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "kill.json")
    given = parser.parse_args()
    if given.base is None:
        from edgelora.pipeline.quickstart import default_base

        given.base = default_base()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        tally = kill_until(small_job(given.base, Path(folder)), given.kills, given.seed)
    seconds = round(time.monotonic() - started)
    print(f"{'kills':>8} {'in startup':>11} {'resumed':>8} {'finished':>9} {'corrupt':>8} {'different':>10}")
    print(
        f"{tally.kills:>8} {tally.in_startup:>11} {tally.resumed:>8} {tally.finished:>9} {len(tally.corrupt):>8} "
        f"{len(tally.different):>10}"
    )
    given.out.write_text(json.dumps({"base": given.base.name, "seconds": seconds, **asdict(tally)}, indent=2) + "\n")
    sys.exit("\n".join([*tally.corrupt, *tally.different]) or 0)


def small_job(base: Path, folder: Path) -> Job:
    """24 steps of four short rows in two micro-batches or more, over three epochs, held-out loss every five steps."""
    rows = (ROOT / "examples" / "home" / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "train.jsonl").write_text("".join(rows[:32]), encoding="utf-8")
    (folder / "valid.jsonl").write_text("".join(rows[32:36]), encoding="utf-8")
    settings = {
        "valid": folder / "valid.jsonl", "rank": 4, "learning-rate": 5e-3, "epochs": 3, "batch-rows": 4,
        "micro-batch-tokens": 128, "warmup-steps": 2, "eval-every": 5,
    }  # fmt: skip
    options = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
    command = [sys.executable, "-m", "edgelora", "train", str(base), str(folder / "train.jsonl"), *options]
    return Job(command, folder)


if __name__ == "__main__":
    main()
