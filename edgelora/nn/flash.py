"""Attention by the compiled code of kernels/attention.c: more than twice as fast as the same products through torch.

Where it cannot be used (`compiled.usable`), attention.py computes the same tile by tile.
"""

from __future__ import annotations

import ctypes
import itertools

import torch
from torch import Tensor

from edgelora import team
from edgelora.kernels import call, load
from edgelora.nn.compiled import NARROW
from edgelora.nn.scores import Scores
from edgelora.nn.scratch import room, scratch

WORTH_A_THREAD = 1 << 21  # products of a query's number with a key's, some 50 microseconds

_Pointer, _Size = ctypes.c_void_p, ctypes.c_int64


class _Attention(ctypes.Structure):
    """`Attention` of attention.c, field for field."""

    _fields_ = (
        *((name, _Pointer) for name in ("q", "k", "v", "out", "lse", "d_out", "dq", "dk", "dv")),
        *((name, _Pointer) for name in ("owners", "scratch", "borders")),
        *((name, _Size) for name in ("n_segments", "prefix", "tokens", "heads", "kv_heads", "dim", "window")),
        *((name, _Size) for name in ("scratch_floats", "threads")),
        ("scale", ctypes.c_float), ("softcap", ctypes.c_float), ("narrow", ctypes.c_int32),
    )  # fmt: skip


class Problem:
    """A packed row's attention: q (T, H, d), k and v (T, KV, d), contiguous, one dtype of NARROW.

    `borders`: of the segments, the first of which is the prefix if there is one.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, borders: list[int], prefix: int, how: Scores) -> None:
        found = load.library()
        assert found is not None
        self.shape, self.kv_heads, self.dtype = q.shape, k.shape[1], q.dtype
        longest = prefix + max((b - a for a, b in itertools.pairwise(borders)), default=0)
        self.threads = max(1, min(team.threads(), q.numel() * longest // WORTH_A_THREAD))
        floats = found.attention_scratch(longest, q.shape[-1])
        memory = scratch(self.threads, floats, use="attention")
        self._borders = (_Size * len(borders))(*borders)
        self._alive = [q, k, v, memory]
        self.c = _Attention(
            q=q.data_ptr(), k=k.data_ptr(), v=v.data_ptr(), scratch=memory.data_ptr(), scratch_floats=floats,
            borders=ctypes.addressof(self._borders), n_segments=len(borders) - 1, prefix=prefix, tokens=q.shape[0],
            heads=q.shape[1], kv_heads=k.shape[1], dim=q.shape[2], window=how.window or 0, scale=how.scale,
            softcap=how.softcap or 0.0, narrow=NARROW[q.dtype], threads=self.threads,
        )  # fmt: skip

    def forward(self) -> tuple[Tensor, Tensor]:
        """The output (T, H, d), and log Σ exp of each query's scores, float32 (T, H)."""
        out, lse = room(*self.shape, dtype=self.dtype), torch.empty(self.shape[:2])
        self.c.out, self.c.lse = out.data_ptr(), lse.data_ptr()
        self._run("attention_forward")
        return out, lse

    def backward(self, out: Tensor, lse: Tensor, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of q, k and v."""
        n_tokens, _, dim = self.shape
        slots = self.threads + self.kv_heads - 1
        parts = scratch(2 * slots, n_tokens * dim, use="attention gradients").view(2, slots, n_tokens, dim)
        owners = (_Size * slots)(*[-1] * slots)
        dq = room(*self.shape, dtype=self.dtype)
        self.c.out, self.c.lse, self.c.d_out, self.c.dq = (x.data_ptr() for x in (out, lse, d_out, dq))
        self.c.dk, self.c.dv, self.c.owners = *(part.data_ptr() for part in parts), ctypes.addressof(owners)
        self._run("attention_backward")
        total = torch.zeros(2, n_tokens, self.kv_heads, dim)
        for slot, head in enumerate(owners):
            if head >= 0:
                total[:, :, head] += parts[:, slot]
        dk, dv = total.to(self.dtype)
        return dq, dk, dv

    def _run(self, function: str) -> None:
        call.run(function, ctypes.addressof(self.c), self.threads, self.threads)
