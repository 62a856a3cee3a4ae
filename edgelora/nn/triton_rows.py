"""What lies between a layer's products, on an NVIDIA GPU: each in one pass over memory, computed in float32.

Norms, gated units, rotation and cross-entropy are bound by memory there, and torch would read and write their tensors
several times over. Rows may be views of wider ones. Imported only where there is a GPU to run it, or by tests, which
have Triton's interpreter run it.
"""

# What stands in a kernel is Triton's language; mypy can check only what launches it.
# mypy: allow-untyped-decorators, allow-untyped-calls
# mypy: disable-error-code="import-untyped, import-not-found, no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from edgelora.nn.triton_launch import launch

COLUMNS = 1024  # of a gated unit, in one program
LOGITS = 4096  # of a row, at a time


def _flat(x: Tensor) -> Tensor:
    """(…, d) as rows (n, d), which may lie apart."""
    return x.reshape(-1, x.shape[-1]) if x.stride(-1) == 1 else x.contiguous().view(-1, x.shape[-1])


def _warps(columns: int) -> int:
    return min(max(triton.next_power_of_2(columns) // 512, 1), 8)


# -- RMSNorm


@triton.jit
def _rms_norm(x, w, y, inverse_rms, x_stride, columns, eps, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = column < columns
    wide = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(wide * wide) / columns + eps)
    weight = tl.load(w + column, mask=inside, other=0.0)
    tl.store(y + row * columns + column, (wide * inverse * weight).to(y.dtype.element_ty), mask=inside)
    tl.store(inverse_rms + row, inverse)


@triton.jit
def _rms_norm_backward(
    dy, kept, w, inverse_rms, dx, dy_stride, kept_stride, columns, IS_OUTPUT: tl.constexpr, BLOCK: tl.constexpr
):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = column < columns
    grad = tl.load(dy + row * dy_stride + column, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(w + column, mask=inside, other=1.0)
    normed = tl.load(kept + row * kept_stride + column, mask=inside, other=0.0).to(tl.float32)
    inverse = tl.load(inverse_rms + row)
    normed = normed / weight if IS_OUTPUT else normed * inverse
    grad *= weight
    out = (grad - normed * (tl.sum(grad * normed) / columns)) * inverse
    tl.store(dx + row * columns + column, out.to(dx.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, w: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x (…, d), w float32 (d,) → the normed rows in `dtype`, and 1 / rms of each, float32 (…, 1)."""
    rows, columns = _flat(x), x.shape[-1]
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    inverse_rms = torch.empty((*x.shape[:-1], 1), device=x.device)
    arguments = rows, w, y, inverse_rms, rows.stride(0), columns, eps
    launch(_rms_norm, (len(rows),), arguments, (triton.next_power_of_2(columns),), _warps(columns))
    return y, inverse_rms


def rms_norm_backward(
    dy: Tensor, kept: Tensor, w: Tensor, inverse_rms: Tensor, dtype: torch.dtype, is_output: bool
) -> Tensor:
    """The gradient of x (…, d) in its dtype, from x, or from the output where that was kept and no weight is 0."""
    grads, rows, columns = _flat(dy), _flat(kept), kept.shape[-1]
    dx = torch.empty(kept.shape, dtype=dtype, device=kept.device)
    arguments = grads, rows, w, inverse_rms, dx, grads.stride(0), rows.stride(0), columns
    constants = is_output, triton.next_power_of_2(columns)
    launch(_rms_norm_backward, (len(rows),), arguments, constants, _warps(columns))
    return dx


# -- gated units


@triton.jit
def _act(gate, GELU: tl.constexpr):
    """act(gate) and its derivative."""
    if GELU:  # by tanh, which is 2 σ(2x) − 1
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        t = 2 * tl.sigmoid(2 * inner) - 1
        slope = 0.7978845608028654 * (1 + 3 * 0.044715 * gate * gate)
        return 0.5 * gate * (1 + t), 0.5 * (1 + t) + 0.5 * gate * (1 - t * t) * slope
    s = tl.sigmoid(gate)
    return gate * s, s * (1 + gate * (1 - s))


@triton.jit
def _gated(gate, up, out, gate_stride, up_stride, columns, GELU: tl.constexpr, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    g = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    value, _ = _act(g, GELU)
    tl.store(out + row * columns + column, (value * u).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gated_backward(
    dy, gate, up, d_gate, d_up, dy_stride, gate_stride, up_stride, columns, GELU: tl.constexpr, BLOCK: tl.constexpr
):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    d = tl.load(dy + row * dy_stride + column, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    value, slope = _act(g, GELU)
    at = row * columns + column
    tl.store(d_gate + at, (d * u * slope).to(d_gate.dtype.element_ty), mask=inside)
    tl.store(d_up + at, (d * value).to(d_up.dtype.element_ty), mask=inside)


def gated(gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
    """act(gate) · up (…, ff), act being SiLU, or GELU by tanh."""
    gates, ups, columns = _flat(gate), _flat(up), gate.shape[-1]
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    arguments = gates, ups, out, gates.stride(0), ups.stride(0), columns
    launch(_gated, (len(gates), triton.cdiv(columns, COLUMNS)), arguments, (gelu, COLUMNS))
    return out


def gated_backward(dy: Tensor, gate: Tensor, up: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up (…, ff)."""
    grads, gates, ups, columns = _flat(dy), _flat(gate), _flat(up), gate.shape[-1]
    d_gate, d_up = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
    arguments = grads, gates, ups, d_gate, d_up, grads.stride(0), gates.stride(0), ups.stride(0), columns
    launch(_gated_backward, (len(gates), triton.cdiv(columns, COLUMNS)), arguments, (gelu, COLUMNS))
    return d_gate, d_up


# -- rotation


@triton.jit
def _rotary(
    x, cos, sin, out, token_stride, head_stride, heads, dim, half, sign, HEADS: tl.constexpr, HALF: tl.constexpr,
    REST: tl.constexpr,
):  # fmt: skip
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, HALF)[None, :]
    inside, turned = head < heads, (head < heads) & (column < half)
    c = tl.load(cos + token * half + column, mask=column < half, other=0.0)
    s = tl.load(sin + token * half + column, mask=column < half, other=0.0) * sign
    source, to = x + token * token_stride + head * head_stride, out + (token * heads + head) * dim
    first = tl.load(source + column, mask=turned, other=0.0).to(tl.float32)
    second = tl.load(source + half + column, mask=turned, other=0.0).to(tl.float32)
    tl.store(to + column, (first * c - second * s).to(out.dtype.element_ty), mask=turned)
    tl.store(to + half + column, (second * c + first * s).to(out.dtype.element_ty), mask=turned)
    if REST > 0:  # what does not rotate
        rest = 2 * half + tl.arange(0, REST)[None, :]
        tl.store(to + rest, tl.load(source + rest, mask=inside & (rest < dim)), mask=inside & (rest < dim))


def rotary(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    """x (T, H, d) with its first 2 · half columns rotated; cos and sin float32 (T, 1, half), contiguous."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    (n_tokens, heads, dim), half = x.shape, cos.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    at_once = min(triton.next_power_of_2(heads), 16)
    rest = triton.next_power_of_2(dim - 2 * half) if dim > 2 * half else 0
    arguments = x, cos, sin, out, x.stride(0), x.stride(1), heads, dim, half, sign
    launch(_rotary, (n_tokens, triton.cdiv(heads, at_once)), arguments, (at_once, triton.next_power_of_2(half), rest))
    return out


# -- cross-entropy


@triton.jit
def _cross_entropy(z, labels, nll, d_z, vocabulary, d_stride, BLOCK: tl.constexpr):
    """The gradient p − 1[label] may take the first half of the row's own memory, as numbers half as wide."""
    row = tl.program_id(0).to(tl.int64)
    z += row * vocabulary
    label = tl.load(labels + row)
    top, total = -float("inf"), 0.0
    for first in range(0, vocabulary, BLOCK):
        column = first + tl.arange(0, BLOCK)
        part = tl.load(z + column, mask=column < vocabulary, other=-float("inf"))
        new = tl.maximum(top, tl.max(part))
        total = total * tl.exp(top - new) + tl.sum(tl.exp(part - new))
        top = new
    lse = top + tl.log(total)
    tl.store(nll + row, lse - tl.load(z + label))
    tl.debug_barrier()
    for first in range(0, vocabulary, BLOCK):
        column = first + tl.arange(0, BLOCK)
        part = tl.load(z + column, mask=column < vocabulary, other=-float("inf"))
        grad = tl.exp(part - lse) - tl.where(column == label, 1.0, 0.0)
        tl.debug_barrier()  # all have read what is written over
        tl.store(d_z + row * d_stride + column, grad.to(d_z.dtype.element_ty), mask=column < vocabulary)


def cross_entropy(z: Tensor, labels: Tensor, narrow: bool) -> tuple[Tensor, Tensor]:
    """Logits float32 (P, V), contiguous, and labels int64 (P,) → −log p(label) (P,), and its gradient (P, V).

    The gradient takes the memory of the logits; `narrow`: as bfloat16. No label is checked to be in [0, V).
    """
    nll = torch.empty(len(z), device=z.device)
    d_z = z.view(torch.bfloat16)[:, : z.shape[1]] if narrow else z
    arguments = z, labels.contiguous(), nll, d_z, z.shape[1], d_z.stride(0)
    launch(_cross_entropy, (len(z),), arguments, (LOGITS,), warps=8)
    return nll, d_z
