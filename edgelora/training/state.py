"""Everything of a run that changes with its steps: what a checkpoint keeps, and what it is put back from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from edgelora.config import TrainConfig
from edgelora.errors import FileFormatError
from edgelora.progress import Smoothed
from edgelora.training.checkpoint import Snapshot
from edgelora.training.ema import Ema
from edgelora.training.objectives.objective import Mean
from edgelora.training.optim import build_optimizer, flatten_state, load_state


class Best(NamedTuple):
    """The lowest held-out loss of any step so far, and the step after which it was measured."""

    step: int
    loss: float


class State:
    """step: optimizer steps done. micro: micro-batches of the next one whose gradients are summed already, `partial`
    the share of its loss that they came to, and `numbers` what the objective said beside it. skipped: steps that were
    not finite; in_a_row: the last ones. stale: measurements since the best one. seconds: of the run so far, in all the
    processes that worked on it. base_loss: the held-out loss before the first step, if it was measured.

    beside: tensors that are not trained, and that a resumed run must find as they were.
    """

    _partial: float
    _shares: list[Tensor]

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        config: TrainConfig,
        beside: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.parameters, self.beside = dict(named_parameters), dict(beside or {})
        self.optimizer = build_optimizer(self.parameters.items(), config)
        self.ema = Ema(self.parameters.items(), config.ema_decay) if config.ema_decay else None
        self.smoothed = Smoothed()
        self.best: Best | None = None
        self.base_loss: float | None = None
        self.step = self.micro = self.skipped = self.in_a_row = self.stale = 0
        self.partial = self.seconds = 0.0
        self.numbers: dict[str, Mean] = {}

    @property
    def partial(self) -> float:
        """The loss of the micro-batches so far. Waits for a card that still computes one of them."""
        for share in self._shares:
            self._partial += float(share)
        self._shares = []
        return self._partial

    @partial.setter
    def partial(self, loss: float) -> None:
        self._partial = loss
        self._shares = []

    def add(self, share: Tensor) -> None:
        """Of a micro-batch, whose gradients are summed: its share of the loss of the step. It is read later."""
        self._shares.append(share.detach())
        self.micro += 1

    def snapshot(self, facts: dict[str, Any]) -> Snapshot:
        """This moment, and `facts` of the run beside it. The tensors are the live ones: write them before the next."""
        tensors = _named("parameter", {name: p.detach() for name, p in self.parameters.items()})
        tensors |= _named("beside", self.beside)
        tensors |= _named("optimizer", flatten_state(self.optimizer))
        tensors |= _named("ema", self.ema.state() if self.ema else {})
        if self.micro:
            tensors |= _named("gradient", {n: p.grad for n, p in self.parameters.items() if p.grad is not None})
        counters = {name: getattr(self, name) for name in ("skipped", "in_a_row", "stale", "seconds")}
        best = None if self.best is None else [self.best.step, self.best.loss.hex()]
        numbers = {name: [mean.total.hex(), mean.count.hex()] for name, mean in self.numbers.items()}
        exact = {
            "partial": self.partial.hex(), "numbers": numbers, "smoothed": self.smoothed.state(), "best": best,
            "base_loss": None if self.base_loss is None else self.base_loss.hex(),
        }  # fmt: skip
        return Snapshot(self.step, self.micro, tensors, {**facts, "state": counters | exact})

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to that moment, bit for bit. Raises FileFormatError if it is one of another model or method."""
        groups: dict[str, dict[str, Tensor]] = {}
        for full, tensor in snapshot.tensors.items():
            group, _, name = full.partition(".")
            groups.setdefault(group, {})[name] = tensor
        try:
            for name, parameter in self.parameters.items():
                parameter.data.copy_(groups["parameter"][name])
                grad = groups.get("gradient", {}).get(name)
                parameter.grad = None if grad is None else grad.to(parameter.device)
            for name, tensor in self.beside.items():
                tensor.copy_(groups["beside"][name])
            load_state(self.optimizer, groups.get("optimizer", {}))
            if self.ema:
                self.ema.load(groups["ema"])
            self._count(snapshot)
        except torch.OutOfMemoryError:
            raise
        except (KeyError, ValueError, TypeError, RuntimeError) as e:
            raise FileFormatError(
                what=f"the checkpoint of step {snapshot.step} does not fit this run ({type(e).__name__}: {e})",
                why="it was kept by a run over another model, with another method, or by another version",
                fix="start anew with --overwrite",
            ) from e

    def _count(self, snapshot: Snapshot) -> None:
        facts = snapshot.facts["state"]
        self.step, self.micro = snapshot.step, snapshot.micro
        self.skipped, self.in_a_row, self.stale = (int(facts[name]) for name in ("skipped", "in_a_row", "stale"))
        self.partial, self.seconds = float.fromhex(facts["partial"]), float(facts["seconds"])
        self.numbers = {name: Mean(*map(float.fromhex, parts)) for name, parts in facts["numbers"].items()}
        self.smoothed.restore(facts["smoothed"])
        self.best = None if facts["best"] is None else Best(int(facts["best"][0]), float.fromhex(facts["best"][1]))
        base_loss = facts.get("base_loss")  # earlier versions did not keep it
        self.base_loss = None if base_loss is None else float.fromhex(base_loss)


def _named(group: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{group}.{name}": tensor for name, tensor in tensors.items()}
