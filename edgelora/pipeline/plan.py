"""Whether a run fits and how long it takes, before it starts: the memory plan, and a few steps over the real rows."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import torch

from edgelora.base.decoder import COMPUTE, build_decoder
from edgelora.base.device_memory import parse_size
from edgelora.base.model import Base, open_base
from edgelora.config import TrainConfig
from edgelora.data.dataset import Dataset
from edgelora.device import choose_device, choose_products, compute_threads, computing
from edgelora.nn.decoder import Decoder
from edgelora.peft.inject import inject
from edgelora.progress import Progress
from edgelora.training.base_footprint import Model
from edgelora.training.job import Job, Numbered, measurements
from edgelora.training.launches import RECORDED, choose_launches
from edgelora.training.loop import train
from edgelora.training.memory import Plan, over_rows
from edgelora.training.objectives import objective_of
from edgelora.training.objectives.objective import Objective, held_out
from edgelora.training.rows import load_rows
from edgelora.training.sample import MAX_TOKENS, Sampler
from edgelora.training.settle import settle
from edgelora.training.state import State
from edgelora.training.where import where_of
from edgelora.training.world import Alone

MEASURED_STEPS = 3
MEASURED_ROWS = 64  # of those held out
MEASURED_TOKENS = 8  # of each sample's answer


@dataclass(frozen=True)
class Estimate:
    """How long a run takes, checkpoints aside.

    steps: of the run, each as long as the median of those that were timed. measurements: made of the rows held out and
    with the samples, whose answers are reckoned at their full length; fewer steps and measurements where patience ends
    the run.
    """

    rows: int
    steps: int
    seconds_per_step: float
    tokens_per_s: float
    measurements: int = 0
    seconds_held_out: float = 0.0
    seconds_samples: float = 0.0

    @property
    def seconds(self) -> float:
        measured = self.measurements * (self.seconds_held_out + self.seconds_samples)
        return self.steps * self.seconds_per_step + measured


def plan_run(config: TrainConfig, memory: int | None = None, processes: int = 1) -> tuple[Base, Plan]:
    """The plan of the run that `config` asks for. memory: bytes it may take in all, whatever `config` says of a card;
    None for what is free, or for a card that is not here what it was to be held to.

    processes: how many torchrun would start on this machine; the plan is that of one of them. Raises ConfigError if
    nothing fits.
    """
    # a recipe has them, and no rows are held out yet
    config = config.model_copy(update={"patience": None, "keep_adapter": "last"})
    if memory is None and config.max_gpu_memory is not None:
        on_a_card = choose_device(config.device).value.startswith("cuda")
        memory = None if on_a_card else parse_size(config.max_gpu_memory)
    base = open_base(config.base, config.chat_template)
    return base, settle(config, base, memory, processes, processes)


def estimate(found: Plan, base: Base, on_note: Callable[[str], None] = lambda _: None) -> tuple[Plan, Estimate]:
    """The plan over the rows of the run, and its time.

    Has the loop do the first steps: one to warm up and MEASURED_STEPS more. Then measures as the run would: the loss of
    some rows held out, and the first tokens of the samples' answers.

    Nothing is written. `on_note` hears what is odd about the rows. Raises DataError for those that cannot be used, and
    NotFinite where nothing can be learned.
    """
    config = found.config
    assert config.rank is not None
    assert config.alpha is not None
    loaded, objective = load_rows(config, base, on_note), objective_of(config)
    rows = loaded.train
    sampler = Sampler(config.samples, base, rows.system, MEASURED_TOKENS) if config.samples else None
    order = loaded.order(config)
    total = order.n_steps(config.epochs, config.max_steps)
    Alone().use(config.device)
    with computing(choose_products(config.device), compute_threads()):
        decoder = build_decoder(base, config.base_dtype, COMPUTE[config.dtype], config.device)
        inject(decoder, config.method, config.rank, config.alpha, config.seed, where_of(config))
        decoder.to(config.device)
        decoder.recompute, decoder.offload = config.recompute == "full", config.offload
        watch = _StopWatch()
        # the loop measures nothing in between: that is timed by itself
        train(Job(decoder, objective, rows, order, config), State(decoder.named_parameters(), config), watch)
        passing = _seconds_held_out(decoder, objective, loaded.valid, config)
        answering = 0.0 if sampler is None else _seconds_samples(decoder, sampler, config.device)
    times = measurements(config, total) if passing or answering else 0
    seconds, tokens = watch.seconds[1:] or watch.seconds, watch.tokens[1:] or watch.tokens
    timed = Estimate(len(rows), total, median(seconds), sum(tokens) / sum(seconds), times, passing, answering)
    over = over_rows(found, Model.of(base), loaded.heaviest(config))
    if config.device.startswith("cuda"):
        launches = choose_launches(over, Model.of(base), over.choices["attention"].value == "flash")
        over = replace(over, choices=over.choices | {"launches": launches})
    return over, timed


class _StopWatch:
    """Watches the loop for a step to warm up and MEASURED_STEPS more, then stops it: how long each took, its tokens."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.tokens: list[int] = []
        self._before = time.perf_counter()

    def stepped(self, progress: Progress, tokens: int, seconds: float) -> None:  # noqa: ARG002
        now = time.perf_counter()
        self.seconds.append(now - self._before)
        self.tokens.append(tokens)
        self._before = now

    def save(self, state: State) -> None:
        """Nothing is kept."""

    def asked_to_stop(self) -> bool:
        return len(self.seconds) > MEASURED_STEPS

    def peak_bytes(self) -> int | None:
        return None


def _seconds_held_out(decoder: Decoder, objective: Objective[Any], rows: Numbered, config: TrainConfig) -> float:
    """Of one pass over all `rows`, by the tokens of at most MEASURED_ROWS of them, taken at equal distances."""
    if not isinstance(rows, Dataset):
        return 0.0
    taken = range(0, len(rows), -(-len(rows) // MEASURED_ROWS))
    assert config.micro_batch_tokens is not None
    started = time.perf_counter()
    held_out(objective, decoder, [rows[i] for i in taken], config, config.micro_batch_tokens)
    _finish(config.device)
    return (time.perf_counter() - started) * rows.n_tokens / float(rows.lengths[taken].sum())


def _seconds_samples(decoder: Decoder, sampler: Sampler, device: str) -> float:
    """Of answers at their full length, at the pace of their first tokens: more than most answers take."""
    started = time.perf_counter()
    sampler(decoder)
    _finish(device)
    return (time.perf_counter() - started) * MAX_TOKENS / MEASURED_TOKENS


def _finish(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def lines(found: Plan, timed: Estimate | None = None) -> list[tuple[str, str]]:
    """The plan as pairs of a name and what is said of it: choices, then parts, then sums, then the time."""
    told = [(name.replace("_", " "), f"{choice.value} ({choice.why})") for name, choice in found.choices.items()]
    told += [(name, f"{n / 1e6:,.0f} MB") for name, n in found.parts.as_dict().items() if n and name != "offloaded"]
    told.append((f"peak, {found.load.tokens} tokens", f"{found.parts.total / 1e9:.2f} GB"))
    told.append((f"peak, a row of {found.config.max_length}", f"{found.at_max_length.total / 1e9:.2f} GB"))
    if found.parts.offloaded:
        told.append(("in the machine's memory", f"{found.parts.offloaded / 1e6:,.0f} MB"))
    if found.budget is not None:
        told.append(("there are", f"{found.budget / 1e9:.2f} GB"))
    if timed is not None:
        each = f"{timed.steps} steps of {timed.seconds_per_step:.2f} s over {timed.rows} rows"
        launches = found.choices.get("launches")  # what is timed here is launched one by one
        at_most = "at most " * (launches is not None and launches.value == RECORDED)
        told.append(("time", f"{at_most}{timed.seconds / 60:.1f} minutes: {each}, {timed.tokens_per_s:.0f} tokens/s"))
        parts = ((timed.seconds_held_out, "for rows held out"), (timed.seconds_samples, "at most for samples"))
        if timed.measurements:
            taking = ", ".join(f"{seconds:.2f} s {what}" for seconds, what in parts if seconds)
            told.append(("of it measurements", f"{timed.measurements} of {taking}"))
    return told


def as_json(found: Plan) -> dict[str, object]:
    """The plan for programs."""
    return {
        "choices": {name: asdict(choice) for name, choice in found.choices.items()},
        "bytes": found.parts.as_dict(),
        "tokens": found.load.tokens,
        "peak_bytes": found.parts.total,
        "max_length": found.config.max_length,
        "peak_bytes_at_max_length": found.at_max_length.total,
        "budget_bytes": found.budget,
    }
