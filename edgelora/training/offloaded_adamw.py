"""AdamW whose moments wait in the machine's memory and visit the card for each step: two floats for each trained one.

They travel at 16 GB/s or more, a piece at a time: while one is on its way in, the one before is computed with and goes
home. So the card has two pieces of them at most. bitsandbytes' paged moments move a page when memory is short.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

MOMENTS = ("exp_avg", "exp_avg_sq")
PIECE = 2 << 20  # parameters whose moments travel together, 16 MiB of them; more where one matrix has more

VISITING = 2 * 2 * 4 * PIECE  # bytes of moments on the card at once


class OffloadedAdamW(torch.optim.AdamW):
    """torch's own fused AdamW over parameters of one CUDA card. Between steps its moments are page-locked tensors."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._pieces: list[_Piece] = []
        """None of them: the moments are beside their parameters, or nowhere yet."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None
        self._pieces = self._pieces or [*self._cut()]
        device = self._pieces[0].visitors.device
        here, (coming, going) = torch.cuda.current_stream(device), _streams(device)
        coming.wait_stream(going)  # what the last step sent home
        for piece in self._pieces:
            with torch.cuda.stream(coming):
                if piece.before is not None and piece.before.gone is not None:
                    coming.wait_event(piece.before.gone)  # its place is free
                piece.visitors.copy_(piece.home, non_blocking=True)
            here.wait_stream(coming)
            piece.update()
            going.wait_stream(here)
            with torch.cuda.stream(going):
                piece.home.copy_(piece.visitors, non_blocking=True)
            piece.gone = going.record_event()

    def wait(self) -> None:
        """Until what the last step left is in the machine's memory."""
        if self._pieces:
            _streams(self._pieces[0].visitors.device)[1].synchronize()

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)
        self._pieces = []  # torch puts the moments beside their parameters

    def _cut(self) -> Iterator[_Piece]:
        """Have all moments in the machine's memory, and a place on the card for two pieces of them."""
        cut = [(group, parameters) for group in self.param_groups for parameters in pieces(group["params"])]
        device = cut[0][1][0].device
        largest = max(sum(parameter.numel() for parameter in parameters) for _, parameters in cut)
        places = [torch.empty(2 * largest, device=device) for _ in cut[:2]]
        made: list[_Piece] = []
        for number, (group, parameters) in enumerate(cut):
            size = 2 * sum(parameter.numel() for parameter in parameters)
            home = torch.zeros(size, pin_memory=device.type == "cuda")
            for parameter, *moments in zip(parameters, *_moments(home, parameters), strict=True):
                state = self.state[parameter]
                state.setdefault("step", torch.zeros((), device=device))
                for name, moment in zip(MOMENTS, moments, strict=True):
                    if name in state:
                        moment.copy_(state[name])
                    state[name] = moment
            steps = [self.state[parameter]["step"] for parameter in parameters]
            before = made[number - 2] if number > 1 else None
            made.append(_Piece(group, parameters, steps, home, places[number % 2][:size], before))
            yield made[-1]


@dataclass
class _Piece:
    """Parameters of one group whose moments travel together. before: the piece that is in their place before them."""

    group: dict[str, Any]
    parameters: list[nn.Parameter]
    steps: list[Tensor]
    home: Tensor
    visitors: Tensor
    before: _Piece | None
    gone: Any = None
    """The event behind which they are at home again."""

    def __post_init__(self) -> None:
        self._moments = _moments(self.visitors, self.parameters)

    def update(self) -> None:
        """A step of these parameters, with the moments that are on the card."""
        group, (beta1, beta2) = self.group, self.group["betas"]
        learned = [i for i, parameter in enumerate(self.parameters) if parameter.grad is not None]
        averages, squares = ([moments[i] for i in learned] for moments in self._moments)
        adamw(
            [self.parameters[i] for i in learned], [self.parameters[i].grad for i in learned],  # type: ignore[misc]
            averages, squares, [], [self.steps[i] for i in learned], fused=True, amsgrad=False, beta1=beta1,
            beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
        )  # fmt: skip


def pieces(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters in a row, cut where their moments fill a piece."""
    piece: list[nn.Parameter] = []
    for parameter in parameters:
        if piece and sum(one.numel() for one in piece) + parameter.numel() > PIECE:
            yield piece
            piece = []
        piece.append(parameter)
    yield piece


def _moments(flat: Tensor, parameters: list[nn.Parameter]) -> list[list[Tensor]]:
    """Those that lie in `flat`: first the averages of all parameters, then those of their squares."""
    sizes = [parameter.numel() for parameter in parameters]
    return [
        [part.view(parameter.shape) for part, parameter in zip(half.split(sizes), parameters, strict=True)]
        for half in flat.view(2, -1)
    ]


@cache
def _streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    """On which moments come and go."""
    coming, going = (torch.cuda.Stream(device) for _ in range(2))  # type: ignore[no-untyped-call]
    return coming, going
