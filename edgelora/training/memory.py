"""The memory plan: what a run will take, and the settings left open chosen so that it fits, each with its reason."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from edgelora.config import TrainConfig
from edgelora.device import Choice
from edgelora.errors import ConfigError
from edgelora.peft.methods import METHODS
from edgelora.training.adapter_footprint import virtual_tokens
from edgelora.training.base_footprint import Model
from edgelora.training.footprint import Footprint, Load, footprint

# Sizes of a micro-batch, the best first. Every frozen weight is dequantized for each, and products of more rows are
# faster: on two cores 768 tokens at once are 14 % faster than 512 and take a tenth more memory; 1024 are 2 to 3 %
# faster still, and take another tenth. A graphics card computes more at once.
SIZES = {"cpu": (768, 512, 256), "cuda": (4096, 2048, 1024, 512), "mps": (1024, 512)}
SMALLER = (256, 128, 64)  # where even a recomputed layer is too large
SHARE = 0.9  # of the free memory that is planned with: the rest is what a prediction may be off by
LENGTH_STEP = 64  # max_length is chosen in steps of these

Recompute = Literal["off", "full"]


@dataclass(frozen=True)
class Machine:
    """Where a run computes. budget: bytes it may take in all, None where the system does not say.

    process: bytes it takes already; None to reckon with what a run takes before it reads a weight.
    """

    device: str
    budget: int | None
    process: int | None = None

    @property
    def kind(self) -> str:
        """The device without its number: cpu, cuda, mps."""
        return self.device.partition(":")[0]

    @property
    def room(self) -> int | None:
        """Bytes that are planned with."""
        return None if self.budget is None else int(self.budget * SHARE)


@dataclass(frozen=True)
class Plan:
    """The settings that fit, why they were taken, and where the memory goes.

    parts: at the peak of a step over `load`; at_max_length: over the longest row that max_length allows.
    """

    config: TrainConfig
    choices: dict[str, Choice]
    load: Load
    parts: Footprint
    at_max_length: Footprint
    budget: int | None


def plan(model: Model, config: TrainConfig, machine: Machine, context: int, longest: int | None = None) -> Plan:
    """`config` with micro_batch_tokens, max_length, recompute and offload settled.

    config.dtype, base_dtype and rank must be; `context`: the most tokens that the base sees, virtual ones among them;
    `longest`: tokens of the longest row, where rows are known. Raises ConfigError if nothing fits, with the numbers and
    what would.
    """
    context -= _before(config, context)
    _check_offload(config, machine)
    room = machine.room
    tried: list[tuple[TrainConfig, Load, Footprint]] = []
    for recompute, size in _ways(config, machine):
        row = min(longest or config.max_length or size, context)
        load = Load(max(size, row), max(row, min(size, context)), recompute == "full")
        settled = config.model_copy(update={"recompute": recompute, "micro_batch_tokens": size})
        tried.append((settled, load, footprint(model, settled, load, machine.kind, machine.process)))
        if room is None or tried[-1][2].total <= room:
            return _fitting(model, config, machine, context, tried)
    raise _too_large(model, config, machine, tried[-1])


def over_rows(found: Plan, model: Model, load: Load) -> Plan:
    """The same plan, of the largest micro-batch that the rows of a run make, once they are known."""
    c, kind = found.config, found.config.device.partition(":")[0]
    assert c.micro_batch_tokens is not None
    there = footprint(model, c, load, kind)
    with_tokens = ("scratch", "logits", "activations", "offloaded")
    parts = replace(found.parts, **{name: getattr(there, name) for name in with_tokens})
    choices = dict(found.choices)
    if "micro_batch_tokens" in choices:
        choices["micro_batch_tokens"] = _of_size(c.micro_batch_tokens, kind, parts, found.budget)
    return replace(found, load=load, parts=parts, choices=choices)


def _before(config: TrainConfig, context: int) -> int:
    """How many virtual tokens stand before every row. Raises ConfigError where they leave none of the context."""
    n = virtual_tokens(config)
    if n < context:
        return n
    raise ConfigError(
        what=f"--num-virtual-tokens {n}: this base sees {context} tokens in all",
        why="they stand before every prompt, and leave no room for one",
        fix="leave it out: 20 do nearly as well as more",
    )


def _ways(config: TrainConfig, machine: Machine) -> Iterator[tuple[Recompute, int]]:
    """What may be tried, the fastest first: a layer computed again takes a third longer, a small micro-batch less."""
    asked = None if config.micro_batch_tokens is None else (config.micro_batch_tokens,)
    if config.recompute != "full" and not config.offload:
        yield from (("off", size) for size in asked or SIZES[machine.kind])
        if config.recompute == "off":
            yield from (("off", size) for size in (() if asked else SMALLER))
            return
    yield from (("full", size) for size in asked or (*SIZES[machine.kind], *SMALLER))


def _fitting(
    model: Model, asked: TrainConfig, machine: Machine, context: int, tried: list[tuple[TrainConfig, Load, Footprint]]
) -> Plan:
    """The plan of the last that was tried."""
    config, load, parts = tried[-1]
    size, most = config.micro_batch_tokens, tried[0][2].total
    assert size is not None
    choices: dict[str, Choice] = {}
    if asked.micro_batch_tokens is None:
        choices["micro_batch_tokens"] = _of_size(size, machine.kind, parts, machine.budget)
    if asked.recompute == "auto":
        why = "all activations fit, and computing them again would take a third longer"
        if asked.offload:
            why = "offload moves the inputs of layers that are computed again"
        elif config.recompute == "full":
            why = f"with all activations kept a step would take {most / 1e9:.2f} GB{_of(machine.budget)}"
        choices["recompute"] = Choice(config.recompute, why)
    length = min(asked.max_length or _longest_row(model, config, machine, context), context)
    at_longest = footprint(model, config, _row(length, size, load.recompute), machine.kind, machine.process)
    if length != asked.max_length:
        why = _why_that_length(asked, length, context)
        choices["max_length"] = Choice(str(length), f"{why}; one of that length takes {at_longest.total / 1e9:.2f} GB")
    return Plan(config.model_copy(update={"max_length": length}), choices, load, parts, at_longest, machine.budget)


def _of_size(size: int, kind: str, parts: Footprint, budget: int | None) -> Choice:
    """Why micro-batches are as large as they are."""
    why = f"a step takes {parts.total / 1e9:.2f} GB{_of(budget)}"
    if size == SIZES[kind][0]:
        why += "; with larger ones it would take more and be hardly faster"
    return Choice(str(size), why)


def _of(budget: int | None) -> str:
    return "" if budget is None else f" of {budget / 1e9:.1f} GB"


def _why_that_length(asked: TrainConfig, length: int, context: int) -> str:
    """Why rows are no longer: the base, which may see less than was asked for, or the memory."""
    if length < context:
        return "a longer row would not fit"
    virtual = virtual_tokens(asked)
    whole = f"the base's context is {context + virtual}" + (f", {virtual} of it virtual tokens" if virtual else "")
    return whole if asked.max_length is None else f"{asked.max_length} was asked for, and {whole}"


def _row(length: int, size: int, recompute: bool) -> Load:
    """A row longer than a micro-batch is one by itself."""
    return Load(max(length, size), length, recompute)


def _longest_row(model: Model, config: TrainConfig, machine: Machine, context: int) -> int:
    """The most tokens that a row may have (a multiple of LENGTH_STEP, or the context)."""
    size, again, room = config.micro_batch_tokens, config.recompute == "full", machine.room
    assert size is not None

    def fits(length: int) -> bool:
        taken = footprint(model, config, _row(length, size, again), machine.kind, machine.process)
        return room is None or taken.total <= room

    if fits(context):
        return context
    low, high = min(size, context) // LENGTH_STEP, context // LENGTH_STEP  # low fits, high does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * LENGTH_STEP) else (low, middle)
    return max(low * LENGTH_STEP, min(size, context))


def _check_offload(config: TrainConfig, machine: Machine) -> None:
    if not config.offload:
        return
    if machine.kind != "cuda":
        raise ConfigError(
            what=f"--offload on {machine.device}",
            why="it moves activations from a graphics card to the machine's memory; here they are there already",
            fix="leave --offload out; --recompute full saves memory anywhere",
        )
    if config.recompute == "off":
        raise ConfigError(
            what="--offload with --recompute off",
            why="what is moved are the inputs of layers that are computed again; the rest would keep the card waiting",
            fix="leave --recompute out",
        )


def _too_large(
    model: Model, config: TrainConfig, machine: Machine, last: tuple[TrainConfig, Load, Footprint]
) -> ConfigError:
    settled, load, parts = last
    assert machine.budget is not None
    return ConfigError(
        what=f"a step over {load.tokens} tokens takes {parts.total / 1e9:.2f} GB, {SHARE:.0%} of "
        f"{machine.budget / 1e9:.2f} GB may be planned with",
        why=f"in MB: {parts.in_words()}",
        fix=what_would_fit(model, config, settled, load, machine),
    )


def what_would_fit(model: Model, config: TrainConfig, settled: TrainConfig, load: Load, machine: Machine) -> str:
    """The mildest change of settings that fits, as options."""
    room = machine.room or 0
    four_bit = "nf4" if machine.kind == "cuda" else "q4_k"
    small = {"max_length": min(load.tokens, 512), "micro_batch_tokens": min(load.tokens, 256)}
    changes: list[dict[str, object]] = [{"recompute": "full"}, {"recompute": "full", **small}]
    if (row := METHODS[settled.method]).dense:
        lighter = [{"optimizer": "adafactor"}] if row.trains_weights and not row.projects else []
        changes += [{**changes[-1], **change} for change in (*lighter, {"method": "lora"})]
    else:
        changes.append({"recompute": "full", "base_dtype": four_bit, **small})
        changes.append({**changes[-1], "rank": min(settled.rank or 8, 8)})
    for change in changes:
        other = settled.model_copy(update=change)
        tokens = max(other.micro_batch_tokens or 0, min(load.longest, other.max_length or load.longest))
        if footprint(model, other, Load(tokens, tokens, True), machine.kind, machine.process).total <= room:
            told = {name: value for name, value in change.items() if getattr(config, name) != value}
            return "pass " + " ".join(f"--{name.replace('_', '-')} {value}" for name, value in told.items())
    return "use a smaller base, or a machine with more memory"


def resident_bytes() -> int | None:
    """What this process has in memory now, or None where the system does not say (only Linux does)."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return None
    return pages * resource.getpagesize()
