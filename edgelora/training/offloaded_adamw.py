"""AdamW whose moments wait in the machine's memory and visit the card for each step: two floats for each trained one.

They travel at 16 GB/s or more, a piece at a time: while one is on its way in, the one before is computed with and goes
home. So the card has two pieces of them at most. bitsandbytes' paged moments move a page when memory is short.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

MOMENTS = ("exp_avg", "exp_avg_sq")
PIECE = 2 << 20  # parameters whose moments travel together, 16 MiB of them
PLACES = 2  # for pieces on the card
VISITING = PLACES * len(MOMENTS) * 4 * PIECE  # bytes of them


class OffloadedAdamW(torch.optim.AdamW):
    """torch's own fused AdamW over parameters of one CUDA card. Between steps its moments are page-locked tensors."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._pieces: list[_Piece] = []
        """None of them: the moments are as a checkpoint had them, or nowhere yet."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None
        self._pieces = self._pieces or self._cut()
        device = self._pieces[0].visitors[0].device
        here, (coming, going) = torch.cuda.current_stream(device), _streams(device)
        coming.wait_stream(going)  # what the last step sent home
        coming.wait_stream(here)
        for number, piece in enumerate(self._pieces):
            with torch.cuda.stream(coming):
                if number >= PLACES:
                    coming.wait_event(self._pieces[number - PLACES].gone)  # its place is free
                piece.come()
            here.wait_stream(coming)
            piece.update()
            going.wait_stream(here)
            with torch.cuda.stream(going):
                piece.go()
            piece.gone = going.record_event()

    def wait(self) -> None:
        """Until what the last step left is in the machine's memory."""
        if self._pieces:
            _streams(self._pieces[0].visitors[0].device)[1].synchronize()

    def load_state_dict(self, state_dict: Any) -> None:
        """As torch does, but that moments stay where they are: all of them need not fit on the card."""
        given, self._pieces = state_dict["state"], []
        rest = {n: {name: one for name, one in state.items() if name not in MOMENTS} for n, state in given.items()}
        super().load_state_dict({**state_dict, "state": rest})
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for n, state in given.items():
            self.state[parameters[n]] |= {name: state[name] for name in MOMENTS if name in state}

    def _cut(self) -> list[_Piece]:
        """Have all moments in the machine's memory, and places on the card for some of them."""
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        device, total = parameters[0].device, sum(parameter.numel() for parameter in parameters)
        home = [torch.zeros(total, pin_memory=device.type == "cuda") for _ in MOMENTS]
        of_parameters = (torch.split(flat, [parameter.numel() for parameter in parameters]) for flat in home)
        for parameter, *moments in zip(parameters, *of_parameters, strict=True):
            state = self.state[parameter]
            state.setdefault("step", torch.zeros((), device=device))
            for name, moment in zip(MOMENTS, moments, strict=True):
                if name in state:
                    moment.copy_(state[name].view(-1))
                state[name] = moment.view(parameter.shape)
        places = [torch.empty(len(MOMENTS), min(PIECE, total), device=device) for _ in range(PLACES)]
        cut, at = list[_Piece](), 0
        for group in self.param_groups:
            for parts in pieces(group["params"], PIECE):
                size = sum(part.size for part in parts)
                # a step counts what has been learned of a parameter: each part counts for itself
                steps = [self.state[part.of]["step"] for part in parts]
                steps = [step.clone() if part.begin else step for part, step in zip(parts, steps, strict=True)]
                place = places[len(cut) % PLACES][:, :size]
                cut.append(_Piece(group, parts, steps, [flat[at : at + size] for flat in home], [*place]))
                at += size
        return cut


class Part(NamedTuple):
    """The numbers [begin, begin + size) of a parameter."""

    of: nn.Parameter
    begin: int
    size: int

    def cut(self, x: Tensor) -> Tensor:
        """The same of x, which is shaped like the parameter; x itself where that is all."""
        return x if self.size == x.numel() else x.reshape(-1)[self.begin : self.begin + self.size]


@dataclass
class _Piece:
    """Parts of parameters of one group whose moments travel together: `home` and on the card, the flat tensors of each
    of MOMENTS."""

    group: dict[str, Any]
    parts: list[Part]
    steps: list[Tensor]
    home: list[Tensor]
    visitors: list[Tensor]
    gone: Any = None
    """The event behind which they are at home again."""

    def __post_init__(self) -> None:
        sizes = [part.size for part in self.parts]
        self._averages, self._squares = (
            [one.view(part.cut(part.of).shape) for one, part in zip(torch.split(flat, sizes), self.parts, strict=True)]
            for flat in self.visitors
        )

    def come(self) -> None:
        for there, here in zip(self.home, self.visitors, strict=True):
            here.copy_(there, non_blocking=True)

    def go(self) -> None:
        for there, here in zip(self.home, self.visitors, strict=True):
            there.copy_(here, non_blocking=True)

    def update(self) -> None:
        """A step of these parts, with the moments that are on the card."""
        group, (beta1, beta2) = self.group, self.group["betas"]
        learned = [i for i, part in enumerate(self.parts) if part.of.grad is not None]
        parts, grads = [self.parts[i] for i in learned], [self.parts[i].of.grad for i in learned]
        adamw(
            [part.cut(part.of) for part in parts],
            [part.cut(grad) for part, grad in zip(parts, grads, strict=True) if grad is not None],
            [self._averages[i] for i in learned], [self._squares[i] for i in learned], [],
            [self.steps[i] for i in learned], fused=True, amsgrad=False, beta1=beta1, beta2=beta2, lr=group["lr"],
            weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
        )  # fmt: skip


def pieces(parameters: Sequence[nn.Parameter], size: int) -> Iterator[list[Part]]:
    """All numbers of these parameters, one after the other, `size` of them in each piece but the last."""
    piece, room = list[Part](), size
    for parameter in parameters:
        begin, total = 0, parameter.numel()
        while begin < total:
            taken = min(room, total - begin)
            piece.append(Part(parameter, begin, taken))
            begin, room = begin + taken, room - taken
            if not room:
                yield piece
                piece, room = [], size
    if piece:
        yield piece


@cache
def _streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    """On which moments come and go."""
    coming, going = (torch.cuda.Stream(device) for _ in range(2))  # type: ignore[no-untyped-call]
    return coming, going
