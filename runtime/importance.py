"""An importance matrix by llama.cpp's eval callback: what goes into each of a model's products, adapters live.

Any GGUF that llama.cpp runs will do. Which tensors are watched is the caller's choice; how they are counted is
llama-imatrix's: a token once for each matrix that it is multiplied with, for experts only those it is sent to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np

from edgelora.base.activations import ActivationSums
from edgelora.device import compute_threads
from edgelora.errors import EngineError
from edgelora.progress import OnProgress, Pace, Progress, silent
from runtime.binding import Context, Entry, Lora, Model, Product, Watch


def collect_importance(
    path: Path,
    adapters: Sequence[tuple[Path, float]],
    sequences: Sequence[np.ndarray],
    matrices: Mapping[str, int],
    on_progress: OnProgress = silent,
) -> ActivationSums:
    """Evaluate each sequence of ids (n,) by itself and sum what the tensors `matrices` (see ActivationSums) see.

    adapters: checked GGUF adapters and their scales. Raises BaseModelError for activations that are not numbers,
    EngineError where llama.cpp refuses the model, an adapter or the length.
    """
    sums, longest = ActivationSums(matrices), max(map(len, sequences))
    with closing(Model(path)) as model:
        if longest > model.n_ctx_train:
            raise EngineError(
                what=f"a context of {longest} tokens",
                why=f"{path.name} was trained on {model.n_ctx_train} and computes noise beyond",
                fix=f"pass --context {model.n_ctx_train}",
            )
        loras = [(Lora(model, adapter), scale) for adapter, scale in adapters]
        with closing(
            Context(model, n_ctx=longest, n_sequences=1, threads=compute_threads(), n_batch=longest, watch=_watch(sums))
        ) as context:
            context.set_adapters(loras)
            pace = Pace(len(sequences))
            for ids in sequences:
                context.clear()
                # all logits are wanted: llama.cpp drops the other tokens inside the last layer
                context.decode([Entry(token, i, 0, True) for i, token in enumerate(ids.tolist())])
                speed, eta = pace.step(len(ids))
                on_progress(Progress("imatrix", pace.done, pace.total, tokens_per_s=speed, eta_s=eta))
    return sums


def _watch(sums: ActivationSums) -> Watch:
    """Adds the inputs of every product with a wanted tensor."""

    def watch(product: Product, ask: bool) -> bool:
        if ask:
            return product.weight in sums.matrices and product.operation in ("MUL_MAT", "MUL_MAT_ID")
        x = product.input()
        if x is not None:
            add = _add_experts if product.operation == "MUL_MAT_ID" else _add
            add(sums, product, x)
        return True

    return watch


def _add(sums: ActivationSums, product: Product, x: np.ndarray) -> None:
    """x (n3, n2, T, columns): of a weight of several matrices, each has its own part of n2 (attention in a latent)."""
    tensor, columns = product.weight, x.shape[-1]
    n = sums.matrices[tensor]
    parts = x.reshape(1, -1, columns) if n == 1 else x.reshape(-1, n, x.shape[2], columns).swapaxes(0, 1)
    for matrix, part in enumerate(parts):
        rows = part.reshape(-1, columns)
        sums.add(tensor, np.einsum("ij,ij->j", rows, rows), len(rows), matrix)


def _add_experts(sums: ActivationSums, product: Product, x: np.ndarray) -> None:
    """x (1, T, k, columns), or (1, T, 1, columns) where all experts of a token see the same."""
    tensor, experts = product.weight, product.experts()  # (T, k)
    x = np.broadcast_to(x[0], (*experts.shape, x.shape[-1]))
    for expert in range(sums.matrices[tensor]):
        rows = x[experts == expert]  # (n, columns)
        sums.add(tensor, np.einsum("ij,ij->j", rows, rows), len(rows), expert)
