"""A start that earlier adapters do not meet: A's rows in the complement of theirs (O-LoRA, arXiv:2310.14152, 3.2).

The rows of A are all that a LoRA sees of x. Where those of the new one are orthogonal to those of earlier ones, what
it learns first changes nothing on what they look at; B is zero, so that it does nothing yet. A start only: no term of
the loss holds A there while it is trained.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from edgelora.errors import AdapterError, ConfigError
from edgelora.nn.decoder import Decoder
from edgelora.peft.adapter import Adapter
from edgelora.peft.dropout import bare
from edgelora.peft.saved import is_adapted, within

VANISHING = 1e-6  # of the largest singular value: rows so far apart from it span nothing more


def start_orthogonally(decoder: Decoder, adapters: Sequence[Adapter]) -> None:
    """Turn the fresh A of every layer away from the rows of all `adapters` there, each row as long as it was drawn.

    Raises ConfigError for a method that does not start with a random A and B at zero, or where the others leave fewer
    directions than its rank; AdapterError for adapters that look at all of x.
    """
    if adapters and not any(is_adapted(linear.delta) for linear in decoder.linears.values()):
        raise _no_random_a("any layer")
    for name, linear in decoder.linears.items():
        if not is_adapted(linear.delta):
            continue
        earlier = [rows for adapter in adapters if name in adapter.tensors and len(rows := _rows(adapter, name))]
        if earlier:
            a = _fresh_a(name, bare(within(linear.delta)))
            with torch.no_grad():
                a.copy_(complement(name, a, torch.cat(earlier)))


def complement(name: str, a: Tensor, earlier: Tensor) -> Tensor:
    """`a` (r, d_in) without its share in the row space of `earlier` (n, d_in), each row as long as it was."""
    _, values, basis = torch.linalg.svd(earlier.double(), full_matrices=False)
    basis = basis[values > VANISHING * values[0]]  # (k, d_in), orthonormal; empty for rows of zeros
    free = a.shape[1] - len(basis)
    if free < len(a):
        raise ConfigError(
            what=f"--rank {len(a)}: the adapters of --orthogonal-to leave {free} of {a.shape[1]} directions in {name}",
            why="the rows of A are to be orthogonal to all of theirs",
            fix=f"pass at most --rank {free}, or name fewer adapters" if free else "name fewer adapters",
        )
    turned = a.detach().double().cpu()
    for _ in range(2):  # the second time takes away what rounding left
        turned = turned - turned @ basis.T @ basis
    lengths = a.detach().double().cpu().norm(dim=1) / turned.norm(dim=1)
    as_long: Tensor = (turned * lengths[:, None]).to(a)
    return as_long


def _rows(adapter: Adapter, module: str) -> Tensor:
    """(n, d_in): what a LoRA looks at in a layer; nothing of x where it trains its bias alone."""
    change = adapter.change(module)
    pair = change.pair if adapter.kind.saves else adapter.pair(module)
    if change.whole is not None or (pair is not None and pair.magnitude is not None):
        whole = pair is None
        raise AdapterError(
            what=f"{module}: {'a layer that is saved whole' if whole else 'a DoRA'} leaves nothing to be orthogonal to",
            why=f"it {'changes all' if whole else 'scales whole rows'} of W, and so looks at all of x",
            fix="name LoRAs in --orthogonal-to",
        )
    return torch.from_numpy(pair.a) if pair is not None else torch.empty(0)


def _fresh_a(name: str, delta: nn.Module | object) -> nn.Parameter:
    """The A of a delta that is a random A and a B of zeros."""
    a, b = getattr(delta, "lora_A", None), getattr(delta, "lora_B", None)
    if not isinstance(a, nn.Parameter) or not isinstance(b, nn.Parameter) or bool(b.any()):
        raise _no_random_a(name)
    return a


def _no_random_a(where: str) -> ConfigError:
    return ConfigError(
        what=f"--orthogonal-to: this method does not start with a random A in {where}",
        why="it has none, or one that is taken from the weights or shared by all layers: to turn that is to lose it",
        fix="pass --method lora, rslora, loraplus, dora, dylora, alora, longlora, lors or molora",
    )
