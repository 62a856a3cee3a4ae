"""One training run, from its first step on: base + rows → an adapter folder with its contract."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgelora.base.decoder import COMPUTE, build_decoder
from edgelora.base.device_memory import grow_in_place, hold_to
from edgelora.config import Method, TrainConfig
from edgelora.data.encode import encode_text
from edgelora.device import Choice, computing, peak_memory_bytes
from edgelora.errors import FileFormatError
from edgelora.files.atomic import require_space
from edgelora.nn.decoder import Decoder
from edgelora.peft.adapter import Adapter, write_adapter, write_folder
from edgelora.peft.inject import adapter_config, collect, inject, kept_beside
from edgelora.peft.orthogonal import start_orthogonally
from edgelora.peft.soft_prompt import SAVED
from edgelora.peft.virtual_tokens import begin_as, saved
from edgelora.progress import OnProgress, Progress, silent
from edgelora.training.avoided import avoided
from edgelora.training.base_footprint import Model
from edgelora.training.certified import contract_of
from edgelora.training.checkpoint import checkpoint_path, read_checkpoint
from edgelora.training.distributed import Processes, choose_threads, joined
from edgelora.training.exhausted import explained
from edgelora.training.folder import RunFolder
from edgelora.training.interrupt import SIGNALS, STOPPING, Interrupt, interruptible, stopped
from edgelora.training.job import Job
from edgelora.training.launches import RECORDED, longest_row
from edgelora.training.loop import not_finite, train
from edgelora.training.measure import averaged
from edgelora.training.metrics import read_metrics
from edgelora.training.objectives import objective_of
from edgelora.training.original import Originals
from edgelora.training.ready import Listeners, Ready, make_ready
from edgelora.training.recorder import About, Recorder, Silent
from edgelora.training.sample import Sampler
from edgelora.training.sharding import shard
from edgelora.training.state import Best, State
from edgelora.training.where import where_of
from edgelora.training.world import World


@dataclass(frozen=True)
class Run:
    """What a run ended in: the adapter, and what it measured on the way.

    step: whose adapter it is; method: what kind. losses: of each of the `n_steps`, mean over what it learned (of the
    last ones, where metrics.jsonl was deleted on the way). held_out_loss: of this adapter; best: the lowest of all
    steps; base_loss: the base's. seconds and peak_bytes: of all processes that worked on it, this one from its start
    and those before it at their steps.
    """

    out: Path
    folder: Path
    step: int
    method: Method
    n_steps: int
    losses: list[float]
    held_out_loss: float | None
    skipped_steps: int
    tokens_per_s: float
    choices: dict[str, Choice]
    n_rows: int
    seconds: float
    peak_bytes: int
    best: Best | None = None
    base_loss: float | None = None


def run_training(
    config: TrainConfig,
    on_progress: OnProgress = silent,
    on_choice: Callable[[str, Choice], None] = lambda *_: None,
    on_note: Callable[[str], None] = lambda _: None,
    stop_when: Callable[[Progress], bool] | None = None,
) -> Run:
    """Train and write the adapter to config.out (PEFT's format and `edgelora.json`), the run's own files beside it.

    Raises EdgeloraError for every fault of the input before the first step. Asked to stop (Ctrl-C, SIGTERM, SIGHUP), it
    ends the step, saves and raises Stopped; with config.resume it goes on there, on a CPU bit for bit. `stop_when` is
    asked behind each step and stops the run in the same way. The adapter's folder stands only when the run has ended
    well.
    """
    with joined() as world:
        heard = Listeners(on_progress, on_choice, on_note, stop_when) if world.rank == 0 else Listeners()
        return _run(config, heard, world)


def _run(config: TrainConfig, heard: Listeners, world: World) -> Run:
    started, folder, writes = time.perf_counter(), RunFolder(config.out), world.rank == 0
    with folder.held_if_there() if writes else nullcontext():
        ready = make_ready(config, folder, heard, world)
        with (
            folder.held() if writes else nullcontext(),
            computing(ready.choices["products"], int(choose_threads(world).value)),
            explained(Model.of(ready.base), ready.config, int(ready.rows.train.lengths.max())),
        ):
            return _trained(ready, world, started)


def _trained(ready: Ready, world: World, started: float) -> Run:
    """From the first step, or where the earlier run stands, to the adapter."""
    writes = world.rank == 0
    job, state = _build(ready, world)
    if ready.earlier is not None:
        state.restore(ready.earlier.snapshot)
        started -= state.seconds
    with (
        interruptible(lambda: ready.heard.on_note(STOPPING)) as interrupt,
        _recorder(ready, job, state, interrupt) if writes else Silent(interrupt) as recorder,
    ):
        whole = train(job, state, recorder)
        if not whole:
            recorder.draw()
            _agree(interrupt, world)
            recorder.raise_lost()
            raise stopped(ready.asked, state.step, job.total, interrupt)
        run = world.first(lambda: _keep(ready, job, state, started))
        recorder.draw()
    if writes:
        ready.folder.write_facts({**ready.facts, "result": _result(run)})
    return run


def _recorder(ready: Ready, job: Job, state: State, interrupt: Interrupt) -> Recorder:
    """Who writes the run down. What can be refused has been when the folder is emptied for it."""
    c = ready.config
    _require_space(ready.folder, state, job)
    title = f"{ready.base.path.name} · {c.method} r {c.rank} · {c.data[0].path.name}"
    about = About(c, ready.facts, title, None if ready.earlier is None else state.step)
    recorder = Recorder(ready.folder, about, ready.heard, interrupt)
    if not c.resume:
        ready.folder.empty()
    ready.folder.write_facts(ready.facts)
    return recorder


def _agree(interrupt: Interrupt, world: World) -> None:
    """The signal that any process got is what stopped them all."""
    counts = world.sum([float(interrupt.asked is number) for number in SIGNALS])
    interrupt.asked = next((number for number, count in zip(SIGNALS, counts, strict=True) if count), None)


def _build(ready: Ready, world: World) -> tuple[Job, State]:
    """What is trained, as it starts, the same in all processes; and what its steps will change."""
    c, rows = ready.config, ready.rows
    decoder = _decoder(ready, world)
    asks = bool(c.samples) and world.rank == 0
    sampler = Sampler(c.samples, ready.base, rows.train.system) if asks else None
    job = Job(decoder, objective_of(c), rows.train, rows.order(c), c, rows.valid, sampler, world)
    beside = kept_beside(decoder)
    start = beside | {name: parameter.detach() for name, parameter in decoder.named_parameters()}
    # an SVD may have other signs on another machine
    for name, computed in world.first(lambda: {key: tensor.cpu() for key, tensor in start.items()}).items():
        start[name].copy_(computed)
    return job, State(decoder.named_parameters(), c, beside)


def _decoder(ready: Ready, world: World) -> Decoder:
    """The base on its device, or this process's part of it, with a fresh adapter on it."""
    c = ready.config
    assert c.rank is not None
    assert c.alpha is not None
    grow_in_place(c.device)
    if c.max_gpu_memory is not None:
        hold_to(c.max_gpu_memory, c.device)
    if c.shard_base and isinstance(world, Processes):
        decoder = build_decoder(ready.base, c.base_dtype, COMPUTE[c.dtype])
        shard(decoder, world)
    else:
        decoder = build_decoder(ready.base, c.base_dtype, COMPUTE[c.dtype], c.device)
    decoder.recompute, decoder.offload = c.recompute == "full", c.offload
    # what a run that goes on began from stands in its checkpoint
    original = None if ready.original is None or ready.earlier is not None else Originals(ready.original)
    inject(decoder, c.method, c.rank, c.alpha, c.seed, where_of(c), original)
    if ready.earlier is None:
        start_orthogonally(decoder, avoided(c, ready.base))
        if c.prompt_tuning_init_text is not None:
            begin_as(decoder, encode_text(c.prompt_tuning_init_text, ready.base.tokenizer))
    decoder.to(c.device)
    if "launches" in ready.choices and ready.choices["launches"].value == RECORDED:
        decoder.record_passes(longest_row(c, ready.rows.train.lengths))
    return decoder


def _require_space(folder: RunFolder, state: State, job: Job) -> None:
    """For the checkpoints that will stand there at once: the kept ones, the best, and the one being written.

    No more are kept than there are steps, however many one asked for. Those of a run that goes on stand there already,
    and make room one after the other: behind each that was written.
    """
    copies = 4 + (job.config.ema_decay > 0)  # weights, two moments, a gradient in the midst of a step
    one = copies * sum(parameter.nbytes for parameter in state.parameters.values())
    one += sum(tensor.nbytes for tensor in state.beside.values())
    needed = (min(job.config.keep_checkpoints, job.total) + 2) * one
    require_space(folder.path, max(needed - folder.checkpoint_bytes, one), "the checkpoints")


def _keep(ready: Ready, job: Job, state: State, started: float) -> Run:
    """Write the adapter: that of the last step, or the best one where it was asked for or the run was to stop at it."""
    c, metrics, n_steps, skipped = ready.config, read_metrics(ready.folder.metrics), state.step, state.skipped
    if skipped == n_steps:
        raise not_finite("in any step", c.learning_rate)
    losses = [m.loss for m in metrics if m.loss is not None]
    held_out = next((m.held_out_loss for m in reversed(metrics) if m.held_out_loss is not None), None)
    step, held_out = _back_at_the_best(ready, state) or (state.step, held_out)
    speed = next((m.tokens_per_s for m in reversed(metrics) if m.tokens_per_s is not None), 0.0)
    peak_bytes = max([peak_memory_bytes(c.device), *(m.peak_bytes or 0 for m in metrics)])
    run = Run(
        c.out, ready.folder.path, step, c.method, n_steps, losses, held_out, skipped, speed, ready.choices,
        len(ready.rows.train), time.perf_counter() - started, peak_bytes, state.best, state.base_loss,
    )  # fmt: skip
    with averaged(state):
        _write(ready, job.decoder, _result(run))
    return run


def _back_at_the_best(ready: Ready, state: State) -> Best | None:
    """Put `state` back to the best step, if its adapter is to be kept; None where it stays as it is."""
    best, c = state.best, ready.config
    if c.patience is None and c.keep_adapter == "last":
        return None
    if best is None:
        ready.heard.on_note("no held-out loss was measured: the adapter of the last step is written")
    if best is None or best.step == state.step:
        return None
    try:
        snapshot = read_checkpoint(checkpoint_path(ready.folder.checkpoints, best.step))
    except FileFormatError as e:
        ready.heard.on_note(f"{e.what} ({e.why}): the adapter of the last step is written instead of the best one")
        return None
    state.restore(snapshot)
    return best


def _write(ready: Ready, decoder: Decoder, result: dict[str, Any]) -> None:
    """The adapter that is on `decoder`, with its contract, at config.out."""
    c = ready.config
    assert c.rank is not None
    assert c.alpha is not None
    described = adapter_config(decoder, c.method, c.rank, c.alpha, str(ready.base.path), where_of(c))
    contract = contract_of(c, ready.base, ready.rows, ready.choices, result)
    replaces = c.overwrite or c.resume
    if decoder.before is not None:
        write_folder(c.out, described, {SAVED: saved(decoder)}, contract, overwrite=replaces)
    else:
        write_adapter(c.out, Adapter(described, collect(decoder), contract), overwrite=replaces)


def _result(run: Run) -> dict[str, Any]:
    """For run.json and the contract."""
    return {
        "steps": run.n_steps, "adapter_of_step": run.step, "skipped_steps": run.skipped_steps,
        "seconds": round(run.seconds, 1), "peak_bytes": run.peak_bytes, "tokens_per_s": round(run.tokens_per_s, 1),
        "last_loss": run.losses[-1] if run.losses and run.losses[-1] == run.losses[-1] else None,
        "held_out_loss": run.held_out_loss,
    }  # fmt: skip
