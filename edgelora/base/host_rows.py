"""A vocabulary's rows that stay in the machine's memory while a CUDA card computes: a gigabyte of an 8B model's."""

from __future__ import annotations

import torch
from torch import Tensor

from edgelora.base.torch_blocks import DEQUANTIZE, DeviceBlocks
from edgelora.base.weights import Dense, GGUFBlocks, as_tensor


class HostRows:
    """A weight of which single rows are looked up: these travel to whoever asks, as they are stored.

    `size_bytes`: of the weight, none of them on a card.
    """

    def __init__(self, held: Dense | GGUFBlocks) -> None:
        self.held, self.shape, self.size_bytes = held, held.shape, held.size_bytes
        self._stored = held.values if isinstance(held, Dense) else as_tensor(held.blocks)

    def to(self, device: torch.device | str) -> HostRows:  # noqa: ARG002
        return self

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.held.dequantize(dtype)

    def rows(self, first: int, last: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.held.rows(first, last, dtype)

    def gather(self, ids: Tensor) -> Tensor:
        """float32 (len(ids), d_in) on the device of `ids`."""
        held, wanted = self.held, ids.cpu()
        if isinstance(held, Dense):
            return _sent(self._stored, wanted, ids.device).to(torch.float32)
        if held.kind not in DEQUANTIZE:
            return held.gather(wanted).to(ids.device)
        return DeviceBlocks(_sent(self._stored, wanted, ids.device), held.kind, self.shape[1]).dequantize()


def _sent(rows: Tensor, wanted: Tensor, device: torch.device) -> Tensor:
    """These of the rows on `device`: by way of page-locked memory, from which a copy keeps nobody waiting."""
    picked = torch.empty(len(wanted), rows.shape[1], dtype=rows.dtype, pin_memory=device.type == "cuda")
    return torch.index_select(rows, 0, wanted, out=picked).to(device, non_blocking=True)
