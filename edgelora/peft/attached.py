"""A trained adapter on a linear layer: whatever change it is, as what the layer computes in torch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgelora.nn.linear import Delta, Weight, product
from edgelora.peft.change import Change
from edgelora.peft.dora import DoraDelta
from edgelora.peft.full import FullDelta
from edgelora.peft.glora import GloraDelta, Path
from edgelora.peft.houlsby import HoulsbyDelta
from edgelora.peft.lora import LoraDelta
from edgelora.peft.lors import LorsDelta
from edgelora.peft.molora import MoLoraDelta
from edgelora.peft.of_input import Bottleneck, OfInput
from edgelora.peft.of_weight import InPlaceOf, OfWeight, TimesAndPlus, WhereNotZero


class ChangedDelta(nn.Module):
    """y = rows ∘ (P + whole) (columns ∘ x), and of the bias rows ∘ c + bias, or bias in the place of c: a `Change`, and
    nothing is trained of it.

    `inner` computes P x, None W x. rows, bias (d_out,), columns (d_in,), whole (d_out, d_in), all float32.
    """

    factors = None
    rows: Tensor | None
    columns: Tensor | None
    whole: Tensor | None
    bias: Tensor | None

    def __init__(self, inner: Delta | None, change: Change) -> None:
        super().__init__()
        self.inner, self.keeps_bias = inner, not isinstance(change.bias, InPlaceOf)
        bias = change.bias.values if isinstance(change.bias, InPlaceOf) else change.bias
        parts = {"rows": change.rows, "columns": change.columns, "whole": change.whole, "bias": bias}
        for part, values in parts.items():
            assert values is None or isinstance(values, np.ndarray)
            self.register_buffer(part, _tensor(values), persistent=False)

    def forward(self, x: Tensor, weight: Weight) -> Tensor:
        """x (T, d_in) → (T, d_out)."""
        if self.columns is not None:
            x = (x * self.columns).to(x.dtype)
        y = product(x, weight, self.inner)
        if self.whole is not None:
            y = y + F.linear(x, self.whole.to(x.dtype))
        return y if self.rows is None else (y * self.rows).to(x.dtype)

    def of_bias(self, bias: Tensor | None) -> Tensor | None:
        if not self.keeps_bias:
            return self.bias
        if bias is not None and self.rows is not None:
            bias = bias * self.rows
        return bias if self.bias is None else self.bias if bias is None else bias + self.bias

    def tensors(self) -> dict[str, Tensor]:
        """Nothing: it was read from its file, and is not saved again."""
        return {}


def delta_of(change: Change, weight: Weight) -> Delta:
    """The change as what a linear layer over `weight` computes."""
    if change.of_input is not None:
        return _of_input(change.of_input)
    inner: Delta | None = None
    if change.pair is not None:
        a, b = torch.from_numpy(change.pair.a), torch.from_numpy(change.pair.b)
        magnitude = _tensor(change.pair.magnitude)
        inner = LoraDelta(a, b, 1.0) if magnitude is None else DoraDelta(a, b, 1.0, magnitude, weight)
    elif change.whole is not None:
        inner, change = _of_whole(change.whole, weight), replace(change, whole=None)
    alone = all(part is None for part in (change.rows, change.columns, change.whole, change.bias))
    return inner if alone and inner is not None else ChangedDelta(inner, change)


def _of_whole(whole: np.ndarray | OfWeight, weight: Weight) -> Delta:
    if isinstance(whole, np.ndarray):
        return FullDelta(torch.from_numpy(whole))
    if isinstance(whole, InPlaceOf):
        own = weight.dequantize()
        return FullDelta(torch.from_numpy(whole.values).to(own.device) - own)
    if isinstance(whole, WhereNotZero):
        return LorsDelta(torch.from_numpy(whole.pair.a), torch.from_numpy(whole.pair.b), 1.0)
    assert isinstance(whole, TimesAndPlus)
    return GloraDelta(*(Path(torch.from_numpy(p.b), torch.from_numpy(p.a)) for p in (whole.times, whole.plus)))


def _of_input(found: OfInput) -> Delta:
    if isinstance(found, Bottleneck):
        parts = found.down, found.down_bias, found.up, found.up_bias
        return HoulsbyDelta(*(torch.from_numpy(part) for part in parts))
    a, b, router = (torch.from_numpy(part) for part in (found.pair.a, found.pair.b, found.router))
    return MoLoraDelta(a, b, router, 1.0)


def _tensor(values: np.ndarray | None) -> Tensor | None:
    return None if values is None else torch.from_numpy(values)
