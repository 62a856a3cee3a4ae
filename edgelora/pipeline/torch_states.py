"""What torch computes for a check: final hidden states, of one model after the other, in a child process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from edgelora.base.model import Base, open_base
from edgelora.data.encode import Example
from edgelora.data.pack import IGNORE, Batch, pack, unshared
from edgelora.device import choose_products, compute_threads, computing
from edgelora.peft.adapter import Adapter, read_adapter
from edgelora.progress import OnProgress, Pace, Progress

TOKENS_AT_ONCE = 1024  # in a packed row; each takes a layer out of its storage once


@dataclass(frozen=True)
class Reference:
    """What a file was made from: a base, the adapter folders merged into it at their scales, a template chosen."""

    base: Path
    adapters: tuple[tuple[Path, float], ...] = ()
    template: str | None = None

    def open(self) -> tuple[Base, list[tuple[Adapter, float]]]:
        """The base, speaking by the template of its adapters or the chosen one, and these at their scales."""
        base = open_base(self.base, self.template)
        adapters = [(read_adapter(path, base.layers, may_wait=True), scale) for path, scale in self.adapters]
        for adapter, _ in adapters:
            base = base.as_trained(adapter.contract)
        return base, adapters


def torch_states(models: Sequence[Reference], examples: Sequence[Example], on_progress: OnProgress) -> list[np.ndarray]:
    """Of each model float32 (n, d): the states that predict the n learned tokens of the examples, in their order."""
    from edgelora.base.layerwise import hidden_states
    from edgelora.peft.blend import awake_of, blend_layers

    opened, batches = [model.open() for model in models], [pack(group) for group in _packed(examples)]
    if any(adapter.invocation for _, adapters in opened for adapter, _ in adapters):
        batches = [unshared(batch) for batch in batches]  # what they begin with may sleep in one, and not in another
    pace = Pace(sum(base.config.num_hidden_layers for base, _ in opened))
    tokens = sum(map(len, examples))

    def step() -> None:
        _, eta = pace.step(tokens)
        on_progress(Progress("check", pace.done, pace.total, eta_s=eta))

    with computing(choose_products(), compute_threads()):
        found = []
        for base, adapters in opened:
            awake = awake_of(adapters)
            adapt = partial(blend_layers, adapters=adapters, awake=awake)
            found.append(hidden_states(base, batches, adapt, step, awake))
    return [np.concatenate([_predicting(x, batch) for x, batch in zip(s, batches, strict=True)]) for s in found]


def _packed(examples: Sequence[Example]) -> Iterator[list[Example]]:
    group: list[Example] = []
    for example in examples:
        if group and sum(map(len, group)) + len(example) > TOKENS_AT_ONCE:
            yield group
            group = []
        group.append(example)
    yield group


def _predicting(states: np.ndarray, batch: Batch) -> np.ndarray:
    chosen: np.ndarray = states[batch.labels != IGNORE]
    return chosen
