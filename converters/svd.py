"""The nearest LoRA of a rank to an adapter that is none, one tensor at a time. Imports no torch.

ΔW over this very base is cut to its R largest singular values, which no LoRA of rank R comes nearer to (Eckart and
Young, 1936); what that loses is known of every tensor. In memory are one ΔW, its W, and what the SVD of it takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from converters.task_tensors import leading, truncated
from edgelora.base import ggml
from edgelora.base.model import Base
from edgelora.errors import ExportError
from edgelora.peft.adapter import Adapter, only_in_torch
from edgelora.peft.lora_config import StoredPair, adapter_of
from edgelora.progress import OnProgress, Pace, Progress, silent


@dataclass(frozen=True)
class Nearest:
    """The LoRA, and of every linear layer ‖ΔW − B A‖ / ‖ΔW‖ (Frobenius)."""

    adapter: Adapter
    errors: Mapping[str, float]
    whole: float
    """The same of all of them together."""


def nearest_lora(base: Base, adapter: Adapter, rank: int, on_progress: OnProgress = silent) -> Nearest:
    """The LoRA of `rank`, or of a layer's smaller side, over `base`. Raises ExportError for what is no change of
    weights: norms, biases, and what no weight can hold."""
    _require_weights(adapter, rank)
    pairs, errors, squares, pace = dict[str, StoredPair](), dict[str, float](), [0.0, 0.0], Pace(len(adapter.linears))
    for module in adapter.linears:
        change = adapter.change(module)
        if change.is_pair and change.pair is not None:
            cut = truncated(change.pair, min(rank, *base.linears[module]))
        else:
            cut = leading(change.change(_weight(base, module)), min(rank, *base.linears[module]))
        pairs[module] = StoredPair(cut.pair.a, cut.pair.b, cut.pair.rank)
        errors[module] = (cut.lost / cut.whole) ** 0.5 if cut.whole else 0.0
        squares = [squares[0] + cut.lost, squares[1] + cut.whole]
        _, eta = pace.step(0)
        on_progress(Progress("svd", pace.done, pace.total, eta_s=eta))
    whole = (squares[0] / squares[1]) ** 0.5 if squares[1] else 0.0
    return Nearest(adapter_of(pairs, base.linears, str(base.path)), errors, whole)


def _weight(base: Base, module: str) -> np.ndarray:
    """W (d_out, d_in) float32, in HF's order of rows."""
    stored = base.tensors.matrix(f"{module}.weight")
    return ggml.dequantize(np.ascontiguousarray(stored.rows), stored.kind, stored.columns)


def _require_weights(adapter: Adapter, rank: int) -> None:
    if adapter.kind.of_input:
        raise only_in_torch(adapter, f"--svd-rank {rank}")
    more = [f"{len(adapter.norms)} norms"] if adapter.norms else []
    more += ["all rows of the embedding or the head"] if adapter.vocabularies else []
    biased = sum(adapter.change(module).bias is not None for module in adapter.linears)
    more += [f"{biased} biases"] if biased else []
    if more or adapter.invocation:
        raise ExportError(
            what=f"--svd-rank {rank}: {adapter.kind.one} changes {' and '.join(more) or 'some tokens alone'}",
            why="singular values are those of weights, and the rest would be lost",
            fix="leave it out: `--plan` says which door keeps all of it",
        )
