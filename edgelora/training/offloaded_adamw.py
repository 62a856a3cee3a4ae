"""AdamW whose moments wait in the machine's memory and visit the card for each step: two floats for each trained one.

They travel at once, 16 GB/s or more; bitsandbytes' paged moments move a page at a time when memory is short.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")
_step = torch.optim.Adam.step.__wrapped__  # type: ignore[attr-defined]  # see optim._without_the_compiler


class OffloadedAdamW(torch.optim.AdamW):
    """torch's own fused AdamW over parameters of one CUDA card. Between steps its moments are page-locked tensors."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._host: Tensor | None = None
        """All moments, flat: first those of every parameter's exp_avg. None: they are on the card, or not there yet."""
        self._at_home: list[Tensor] = []
        """Each of them in it."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None
        here = self._come()
        _step(self)
        self._go(here)

    def wait(self) -> None:
        """Until what the last step left is in the machine's memory."""
        if self._host is not None:
            _stream(self._parameters()[0].device).synchronize()

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)
        self._host = None  # torch puts the moments beside their parameters

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _come(self) -> Tensor | None:
        """The moments on the card, for this step; None where they are there."""
        if self._host is None:
            return None
        device = self._parameters()[0].device
        torch.cuda.current_stream(device).wait_stream(_stream(device))
        here = torch.empty(self._host.shape, device=device)
        here.copy_(self._host, non_blocking=True)
        self._hand_out(self._each(here))
        return here

    def _go(self, here: Tensor | None) -> None:
        """Send the moments home, while the card goes on."""
        device = self._parameters()[0].device
        if here is None:
            here = torch.cat([self.state[p][name].view(-1) for name in MOMENTS for p in self._parameters()])
            self._host = torch.empty(here.shape, pin_memory=True)
            self._at_home = self._each(self._host)
        assert self._host is not None
        side = _stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            self._host.copy_(here, non_blocking=True)
        here.record_stream(side)
        self._hand_out(self._at_home)

    def _each(self, flat: Tensor) -> list[Tensor]:
        """The moments that lie in `flat`."""
        parameters = self._parameters() * len(MOMENTS)
        parts = torch.split(flat, [parameter.numel() for parameter in parameters])
        return [part.view(parameter.shape) for part, parameter in zip(parts, parameters, strict=True)]

    def _hand_out(self, moments: list[Tensor]) -> None:
        parameters = self._parameters()
        for at, name in enumerate(MOMENTS):
            for parameter, moment in zip(parameters, moments[at * len(parameters) :], strict=False):
                self.state[parameter][name] = moment


_streams: dict[torch.device, torch.cuda.Stream] = {}


def _stream(device: torch.device) -> torch.cuda.Stream:
    """On which moments go home."""
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return _streams[device]
