"""The gated units of an MLP, act(gate) · up (arXiv:2002.05202), as autograd functions that save only their inputs."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from edgelora.nn import compiled, gpu
from edgelora.nn.scratch import room_like


class SwiGLU(torch.autograd.Function):
    """silu(gate) · up, both (T, ff)."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return swiglu(gate, up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (dy,) = grads
        gate, up = ctx.saved_tensors
        if compiled.usable(dy, gate, up) and dy.shape == gate.shape == up.shape:
            dy, gate, up = dy.contiguous(), gate.contiguous(), up.contiguous()
            d_gate, d_up = room_like(gate), room_like(up)
            n_rows, columns, narrow = gate.numel() // gate.shape[-1], gate.shape[-1], compiled.NARROW[gate.dtype]
            compiled.over_rows("swiglu_backward", n_rows, columns, dy, gate, up, d_gate, d_up, columns, narrow)
            return d_gate, d_up
        if gpu.usable(dy, gate, up):
            found: tuple[Tensor, Tensor] = gpu.kernels().gated_backward(dy, gate, up, gelu=False)
            return found
        return torch.ops.aten.silu_backward(dy * up, gate), silu(gate).mul_(dy)


class GeGLU(torch.autograd.Function):
    """gelu(gate) · up with gelu's tanh approximation, both (T, ff)."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return geglu(gate, up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (dy,) = grads
        gate, up = ctx.saved_tensors
        if gpu.usable(dy, gate, up):
            found: tuple[Tensor, Tensor] = gpu.kernels().gated_backward(dy, gate, up, gelu=True)
            return found
        d_gate = torch.ops.aten.gelu_backward(dy * up, gate, approximate="tanh")
        return d_gate, F.gelu(gate, approximate="tanh").mul_(dy)


def silu(x: Tensor) -> Tensor:
    """x · σ(x), in fresh memory."""
    # in float32 torch's sigmoid is five times faster than its silu (CPU, 2.13); in bfloat16 it would round twice
    return F.silu(x) if x.dtype == torch.bfloat16 else torch.sigmoid(x).mul_(x)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU(gate) · up, in fresh memory; outside of any graph."""
    if compiled.usable(gate, up) and gate.shape == up.shape:
        gate, up = gate.contiguous(), up.contiguous()
        out = room_like(gate)
        sizes = gate.numel() // gate.shape[-1], gate.shape[-1]
        compiled.over_rows("swiglu_forward", *sizes, gate, up, out, gate.shape[-1], compiled.NARROW[gate.dtype])
        return out
    if gpu.usable(gate, up):
        hidden: Tensor = gpu.kernels().gated(gate, up, gelu=False)
        return hidden
    return silu(gate).mul_(up)


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """GELU(gate) · up with GELU's approximation by tanh, in fresh memory; outside of any graph."""
    if gpu.usable(gate, up):
        hidden: Tensor = gpu.kernels().gated(gate, up, gelu=True)
        return hidden
    return F.gelu(gate, approximate="tanh").mul_(up)


class Gate(NamedTuple):
    """A gated unit: with a place in the graph, and the same values without one."""

    function: type[torch.autograd.Function]
    plain: Any


# HF's `hidden_act` → the gated unit
GATES = {"silu": Gate(SwiGLU, swiglu), "gelu_pytorch_tanh": Gate(GeGLU, geglu)}
