"""What this machine's matrix products reach: the shapes of a step, and larger squares. One number for each, GFLOP/s."""

from __future__ import annotations

import time
from typing import Any

import torch

from peers.channel import Turnstile

SECONDS = 0.15  # of each shape; the best product counts
TYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


def shapes(tokens: int) -> list[tuple[int, int, int]]:
    """(M, K, N) of SmolLM2-135M: attention, MLP and head, and a square that no shape of a step should outrun."""
    return [(tokens, 576, 576), (tokens, 576, 1536), (tokens, 1536, 576), (128, 576, 49152), (2048, 2048, 2048)]


def best(shape: tuple[int, int, int], dtype: torch.dtype) -> float:
    """GFLOP/s of the fastest x @ W.T of this shape."""
    m, k, n = shape
    x, w, out = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype), torch.empty(m, n, dtype=dtype)
    torch.mm(x, w.T, out=out)
    fastest, until = float("inf"), time.perf_counter() + SECONDS
    while time.perf_counter() < until:
        start = time.perf_counter()
        torch.mm(x, w.T, out=out)
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * m * k * n / fastest / 1e9


def measure(asked: dict[str, Any]) -> dict[str, Any]:
    return {
        name: {"x".join(map(str, shape)): best(shape, dtype) for shape in shapes(asked["tokens"])}
        for name, dtype in TYPES.items()
    }


if __name__ == "__main__":
    turnstile = Turnstile()
    torch.set_float32_matmul_precision("medium")  # through oneDNN, the faster one here; still exact float32
    turnstile.handlers = {"measure": measure}
    turnstile.begin()
