"""What a CUDA card keeps for the backward pass waits in the machine's memory, and travels while the card computes."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

SMALLEST = 1 << 20  # bytes: what is smaller stays


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """On which everything travels."""
    return torch.cuda.Stream(device)


_free: dict[int, list[Tensor]] = {}


def _page_locked(size_bytes: int) -> Tensor:
    """Memory of at least so many bytes. To lock fresh memory takes the system longer than a layer takes the card."""
    size = 1 << (size_bytes - 1).bit_length()  # rows come in many lengths
    free = _free.setdefault(size, [])
    return free.pop() if free else torch.empty(size, dtype=torch.uint8, pin_memory=True)


class _Away:
    """A tensor of the card in page-locked memory. `before`: the one that left before it, and is needed after it.

    Its memory on the card comes from the stream that computes, which waits for the copy before it gives it back: so
    no more than two of them are ever on the card, however far ahead of it Python is.
    """

    def __init__(self, x: Tensor, before: _Away | None) -> None:
        self._here: Tensor | None = x
        self.before = before
        self._memory = _page_locked(x.nbytes)
        self._host = self._memory[: x.nbytes].view(x.dtype).view(x.shape)
        self._device, side = x.device, _stream(x.device)
        side.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(side):
            self._host.copy_(x, non_blocking=True)
        self._done = side.record_event()

    def leave(self) -> None:
        """Give its memory on the card back."""
        torch.cuda.current_stream(self._device).wait_event(self._done)
        self._here = None

    def come(self) -> None:
        """Set off for the card, if it is not there."""
        if self._here is not None:
            return
        side = _stream(self._device)
        self._here = torch.empty(self._host.shape, dtype=self._host.dtype, device=self._device)
        side.wait_stream(torch.cuda.current_stream(self._device))  # whatever had this memory before
        with torch.cuda.stream(side):
            self._here.copy_(self._host, non_blocking=True)
        self._done = side.record_event()

    def get(self) -> Tensor:
        """The tensor, on the card."""
        self.come()
        torch.cuda.current_stream(self._device).wait_event(self._done)
        value, self._here = self._here, None
        assert value is not None
        return value

    def __del__(self) -> None:
        # whoever has it next writes to it on the same stream, behind what still reads it
        _free[len(self._memory)].append(self._memory)


class Offload(torch.autograd.graph.saved_tensors_hooks):
    """What is saved for a backward pass in here leaves the card as it is saved, and comes back one ahead of its use.

    smallest: bytes from which on it does.
    """

    def __init__(self, smallest: int | None = None) -> None:
        super().__init__(self._pack, self._unpack)
        self._last: _Away | None = None
        self._smallest = SMALLEST if smallest is None else smallest

    def __exit__(self, *args: object) -> None:
        super().__exit__(*args)
        if self._last is not None and torch.cuda.is_current_stream_capturing():
            self._last.leave()  # a graph ends when all of its streams have come together, and keeps nothing on the card

    def _pack(self, x: Tensor) -> Any:
        if not x.is_cuda or x.nbytes < self._smallest:
            return x
        if self._last is not None:
            self._last.leave()
        self._last = _Away(x.detach(), self._last)
        return self._last

    def _unpack(self, packed: Any) -> Tensor:
        if not isinstance(packed, _Away):
            kept: Tensor = packed
            return kept
        value = packed.get()
        if packed.before is not None:
            packed.before.come()
            packed.before = None
        return value
