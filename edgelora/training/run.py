"""One training run: base + rows → an adapter folder with its contract. What can be refused is refused first."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from edgelora.base.decoder import COMPUTE, build_decoder
from edgelora.base.device_memory import hold_to
from edgelora.base.model import Base, open_base
from edgelora.config import Method, TrainConfig
from edgelora.data.order import Order
from edgelora.device import Choice, choose_products, computing, peak_memory_bytes, processor_name
from edgelora.errors import DataError, FileFormatError
from edgelora.files.atomic import require_space
from edgelora.peft.adapter import Adapter, refuse_to_write, write_adapter, write_folder
from edgelora.peft.inject import adapter_config, chosen, collect, inject, kept_beside
from edgelora.peft.orthogonal import start_orthogonally
from edgelora.peft.soft_prompt import SAVED
from edgelora.peft.virtual_tokens import begin_as, saved
from edgelora.progress import OnProgress, Progress, silent
from edgelora.training.avoided import avoided, avoided_sha256
from edgelora.training.base_footprint import Model
from edgelora.training.certified import contract_of
from edgelora.training.checkpoint import checkpoint_path, read_checkpoint
from edgelora.training.distributed import Processes, choose_threads, joined
from edgelora.training.exhausted import explained
from edgelora.training.folder import RunFolder
from edgelora.training.interrupt import SIGNALS, Interrupt, Stopped, how_to_go_on, interruptible
from edgelora.training.job import Job
from edgelora.training.loop import not_finite, train
from edgelora.training.measure import averaged
from edgelora.training.metrics import read_metrics
from edgelora.training.objectives import objective_of
from edgelora.training.original import Originals, original_of
from edgelora.training.recorder import Recorder, Silent
from edgelora.training.resume import FREE, PATHS, Earlier, earlier_run, settings
from edgelora.training.rows import Rows, load_rows
from edgelora.training.sample import Sampler
from edgelora.training.settle import choose_attention, settle
from edgelora.training.sharding import shard
from edgelora.training.state import State
from edgelora.training.where import require_place, where_of
from edgelora.training.world import World
from edgelora.versions import revision, versions


@dataclass(frozen=True)
class Run:
    """What a run ended in: the adapter, and what it measured on the way.

    step: whose adapter it is; method: what kind. losses: of each step, mean over what it learned. seconds and
    peak_bytes: of this process.
    """

    out: Path
    folder: Path
    step: int
    method: Method
    losses: list[float]
    held_out_loss: float | None
    skipped_steps: int
    tokens_per_s: float
    choices: dict[str, Choice]
    n_rows: int
    seconds: float
    peak_bytes: int

    @property
    def n_steps(self) -> int:
        return len(self.losses)


@dataclass(frozen=True)
class Listeners:
    """Who hears of a run: `on_choice` what was chosen and why, before the first step; `on_note` what is odd.

    stop_when: asked behind each step; True stops the run there.
    """

    on_progress: OnProgress = silent
    on_choice: Callable[[str, Choice], None] = lambda *_: None
    on_note: Callable[[str], None] = lambda _: None
    stop_when: Callable[[Progress], bool] | None = None


@dataclass(frozen=True)
class Ready:
    """A run before its first step: everything that could be refused was."""

    asked: TrainConfig
    config: TrainConfig
    base: Base
    rows: Rows
    choices: dict[str, Choice]
    digests: dict[str, str]
    earlier: Earlier | None
    original: Base | None = None
    facts: dict[str, Any] = field(default_factory=dict)


def run_training(
    config: TrainConfig,
    on_progress: OnProgress = silent,
    on_choice: Callable[[str, Choice], None] = lambda *_: None,
    on_note: Callable[[str], None] = lambda _: None,
    stop_when: Callable[[Progress], bool] | None = None,
) -> Run:
    """Train and write the adapter to config.out (PEFT's format and `edgelora.json`), the run's own files beside it.

    Raises EdgeloraError for every fault of the input before the first step. Asked to stop (Ctrl-C, SIGTERM), it ends
    the step, saves and raises Stopped; with config.resume it goes on there, bit for bit. `stop_when` is asked behind
    each step and stops the run in the same way. The adapter's folder stands only when the run has ended well.
    """
    with joined() as world:
        heard = Listeners(on_progress, on_choice, on_note, stop_when) if world.rank == 0 else Listeners()
        return _run(config, heard, world)


def _run(config: TrainConfig, heard: Listeners, world: World) -> Run:
    started, folder, writes = time.perf_counter(), RunFolder(config.out), world.rank == 0
    with folder.held_if_there() if writes else nullcontext():
        ready = _make_ready(config, folder, heard, world)
        with (
            folder.held(ready.asked) if writes else nullcontext(),
            computing(ready.choices["products"], int(choose_threads(world).value)),
            explained(Model.of(ready.base), ready.config, int(ready.rows.train.lengths.max())),
        ):
            return _trained(ready, folder, heard, world, started)


def _trained(ready: Ready, folder: RunFolder, heard: Listeners, world: World, started: float) -> Run:
    """From the first step, or where the earlier run stands, to the adapter."""
    writes = world.rank == 0
    job, state = _build(ready, world)
    if ready.earlier is not None:
        state.restore(ready.earlier.snapshot)
    if writes:
        _require_space(folder, state, job)
        folder.write_facts(ready.facts)
    with _recorder(folder, ready, state, writes) as recorder, interruptible() as interrupt:
        recorder.interrupt = interrupt
        if isinstance(recorder, Recorder):
            recorder.on_progress, recorder.on_note = heard.on_progress, heard.on_note
            recorder.stop_when = heard.stop_when
        whole = train(job, state, recorder)
        if not whole:
            recorder.draw()
            _agree(interrupt, world)
            raise _stopped(ready.asked, state, job, interrupt)
        run = world.first(lambda: _keep(ready, job, state, folder, started, heard.on_note))
        recorder.draw()
    if writes:
        folder.write_facts({**ready.facts, "result": _result(run)})
    return run


def _recorder(folder: RunFolder, ready: Ready, state: State, writes: bool) -> Recorder | Silent:
    if not writes:
        return Silent()
    c = ready.config
    title = f"{ready.base.path.name} · {c.method} r {c.rank} · {c.data[0].path.name}"
    return Recorder(folder, c, ready.facts, title, None if ready.earlier is None else state.step)


def _agree(interrupt: Interrupt, world: World) -> None:
    """The signal that any process got is what stopped them all."""
    counts = world.sum([float(interrupt.asked is number) for number in SIGNALS])
    interrupt.asked = next((number for number, count in zip(SIGNALS, counts, strict=True) if count), None)


def _make_ready(config: TrainConfig, folder: RunFolder, heard: Listeners, world: World) -> Ready:
    """Read, choose and check. Writes nothing."""
    refuse_to_write(config.out, config.overwrite or (config.resume and folder.is_begun))
    folder.refuse_a_run(config)
    earlier = world.first(lambda: earlier_run(folder, heard.on_note)) if config.resume else None
    asked = config if earlier is None else earlier.with_wishes(config)
    objective_of(asked)  # refuses settings that contradict each other
    base = open_base(asked.base)
    if asked.chat_template is not None:
        base = base.with_template(asked.chat_template)
    chosen(asked.method, base.linears, base.norms, where_of(asked))
    if earlier is None:
        # by the memory that is free there
        planned = world.first(lambda: settle(asked, base, None, world.size, world.local_size))
        settled, choices = planned.config, planned.choices
    else:
        settled = earlier.settled.model_copy(update={name: getattr(asked, name) for name in FREE | PATHS})
        choices = {name: Choice(**choice) for name, choice in earlier.choices.items() if name != "processes"}
        heard.on_note(f"going on behind step {earlier.snapshot.step}")
    here = world.first(lambda: _computed_by(settled, base, world))
    changed = [] if earlier is None else earlier.differences(here, versions())
    for difference in changed:
        heard.on_note(difference)
    choices = choices | here
    require_place(settled, base)
    world.use(settled.device)
    rows = load_rows(settled, base, heard.on_note)
    digests = {"base": base.base_file.sha256, "rows": rows.train.sha256, "held-out rows": rows.valid_sha256}
    if (original := original_of(settled, base)) is not None:
        digests["original"] = original.base_file.sha256
    if settled.orthogonal_to:
        digests["adapters of --orthogonal-to"] = avoided_sha256(settled)
    if earlier is not None:
        earlier.require_same(digests)
    if world.any(world.first(lambda: digests) != digests):  # here all have come so far before one writes
        raise DataError(
            what="the base or the rows are not the same for all processes of this run",
            why="they are read on each machine, and each process takes its part of the same steps",
            fix="give every machine the same files",
        )
    for name, choice in choices.items():  # behind all that can be refused: an error stands alone
        heard.on_choice(name, choice)
    facts = {
        "asked": settings(asked),
        "settled": settings(settled),
        "choices": {name: asdict(choice) for name, choice in choices.items()},
        "digests": digests,
        "versions": versions(),
        "processor": processor_name(),
        "changed": changed if earlier is None else earlier.changed_until_now(changed),
        "revision": revision(),
    }
    return Ready(asked, settled, base, rows, choices, digests, earlier, original, facts)


def _computed_by(config: TrainConfig, base: Base, world: World) -> dict[str, Choice]:
    """What rounds each step, and is this machine's, not the run's: chosen anew wherever a run goes on."""
    here = {
        "products": choose_products(config.device),
        "attention": choose_attention(base.config.head_dim, config.device, config.dtype),
        "threads": choose_threads(world),
    }
    if world.size > 1:
        held = f"1/{world.size} of each layer" if config.shard_base else "the whole base"
        here["processes"] = Choice(str(world.size), f"torchrun started them; each holds {held}")
    return here


def _build(ready: Ready, world: World) -> tuple[Job, State]:
    c = ready.config
    assert c.rank is not None
    assert c.alpha is not None
    if c.max_gpu_memory is not None:
        hold_to(c.max_gpu_memory, world.local_rank)
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
            begin_as(decoder, _text_ids(c.prompt_tuning_init_text, ready.base))
    decoder.to(c.device)
    asks = bool(c.samples) and world.rank == 0
    sampler = Sampler(c.samples, ready.base, ready.rows.train.system) if asks else None
    order = Order(ready.rows.train.counts, c.batch_rows, c.seed, [source.weight for source in c.data])
    job = Job(decoder, objective_of(c), ready.rows.train, order, c, ready.rows.valid, sampler, world)
    beside = kept_beside(decoder)
    start = beside | {name: parameter.detach() for name, parameter in decoder.named_parameters()}
    # an SVD may have other signs on another machine
    for name, computed in world.first(lambda: {key: tensor.cpu() for key, tensor in start.items()}).items():
        start[name].copy_(computed)
    return job, State(decoder.named_parameters(), c, beside)


def _text_ids(text: str, base: Base) -> list[int]:
    """As PEFT's tokenizer gives them: what the base puts before every text is in front."""
    ids: list[int] = base.tokenizer.encode(text).ids
    bos = base.tokenizer.bos_id if base.tokenizer.add_bos else None
    return ids if bos is None else [bos, *ids]


def _require_space(folder: RunFolder, state: State, job: Job) -> None:
    """For the checkpoints that will stand there at once: the kept ones, the best, and the one being written.

    No more are kept than there are steps, however many one asked for.
    """
    copies = 4 + (job.config.ema_decay > 0)  # weights, two moments, a gradient in the midst of a step
    one = copies * sum(parameter.nbytes for parameter in state.parameters.values())
    one += sum(tensor.nbytes for tensor in state.beside.values())
    require_space(folder.path, (min(job.config.keep_checkpoints, job.total) + 2) * one, "the checkpoints")


def _keep(
    ready: Ready, job: Job, state: State, folder: RunFolder, started: float, on_note: Callable[[str], None]
) -> Run:
    """Write the adapter: that of the last step, or the best one where the run was to stop at it."""
    c, metrics = ready.config, read_metrics(folder.metrics)
    if all(m.step == 0 or m.skipped_steps == m.step for m in metrics):
        raise not_finite("in any step", c.learning_rate)
    losses = [m.loss for m in metrics if m.loss is not None]
    step, held_out = state.step, next((m.held_out_loss for m in reversed(metrics) if m.held_out_loss is not None), None)
    if c.patience is not None and state.best is not None and state.best.step != state.step:
        try:
            best = read_checkpoint(checkpoint_path(folder.checkpoints, state.best.step))
        except FileFormatError as e:
            on_note(f"{e.what} ({e.why}): the adapter of the last step is written instead of the best one")
        else:
            step, held_out = state.best
            state.restore(best)
    skipped = metrics[-1].skipped_steps
    speed = metrics[-1].tokens_per_s or 0.0
    run = Run(
        c.out, folder.path, step, c.method, losses, held_out, skipped, speed, ready.choices, len(ready.rows.train),
        time.perf_counter() - started, peak_memory_bytes(),
    )  # fmt: skip
    assert c.rank is not None
    assert c.alpha is not None
    described = adapter_config(job.decoder, c.method, c.rank, c.alpha, str(ready.base.path), where_of(c))
    contract = contract_of(c, ready.base, ready.rows, ready.choices, _result(run))
    replaces = c.overwrite or c.resume
    with averaged(state):
        if job.decoder.before is not None:
            write_folder(c.out, described, {SAVED: saved(job.decoder)}, contract, overwrite=replaces)
        else:
            write_adapter(c.out, Adapter(described, collect(job.decoder), contract), overwrite=replaces)
    return run


def _result(run: Run) -> dict[str, Any]:
    return {
        "steps": run.n_steps, "adapter_of_step": run.step, "skipped_steps": run.skipped_steps,
        "seconds": round(run.seconds, 1), "peak_bytes": run.peak_bytes, "tokens_per_s": round(run.tokens_per_s, 1),
        "last_loss": run.losses[-1] if run.losses and run.losses[-1] == run.losses[-1] else None,
        "held_out_loss": run.held_out_loss,
    }  # fmt: skip


def _stopped(config: TrainConfig, state: State, job: Job, interrupt: Interrupt) -> Stopped:
    return Stopped(
        what=f"stopped behind step {state.step} of {job.total}; nothing is lost",
        why="Ctrl-C" if interrupt.exit_code == 130 else f"the signal {getattr(interrupt.asked, 'name', 'SIGTERM')}",
        fix=how_to_go_on(config),
        exit_code=interrupt.exit_code,
    )
