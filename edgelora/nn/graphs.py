"""The layers of a decoder as CUDA graphs: a pass through them is recorded once, and repeated by one call.

A step of an 8B model launches five thousand kernels, and Python takes longer to launch them than a large card takes to
run them; of a small model that is so on any card. A graph has its sizes and addresses for good, so rows are copied into
one of a few shapes (`shapes.py`).

Memory is the allocator's, in a pool of its own: all graphs run in the same, one after the other. Rows whose shape is
not recorded are launched, and need theirs beside it.
"""

from __future__ import annotations

import logging
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from edgelora.nn import card_pool
from edgelora.nn.gpu_attention import Borders, Places, Segments, places_of
from edgelora.nn.linear import Linear
from edgelora.nn.rotary import Tables
from edgelora.nn.shapes import Shape, multiple, step_of

# The time a shape comes at which it is recorded, which takes as long as three passes. Never the first: what a launched
# pass allocates once and for all must be there before.
OFTEN = 3
MOST = 32  # shapes whose graphs are kept

log = logging.getLogger(__name__)

Run = Callable[[Tensor, Tables, list[int]], Tensor]
"""x (T, d), tables and borders of a packed row → what the last layer gives (T, d)."""


class Graphs:
    """Runs a decoder's layers, by a graph where one fits. `run`: a pass through them without one.

    None of it is for what draws or looks at numbers: dropout, mixtures, an adapter that is no product (`stamp_of`). A
    pass backward adds to the gradients of parameters itself: ask for it by `torch.autograd.backward`, not by `grad`.

    lends: whether nothing is left on the card between a pass forward and the one backward but what the first one gave:
    what must be kept is elsewhere. longest_row: about how many tokens a row has at most.
    """

    def __init__(self, run: Run, layers: nn.Module, device: torch.device, lends: bool, longest_row: int) -> None:
        self._run, self._layers, self._device = run, layers, device
        self._linears = [module for module in layers.modules() if isinstance(module, Linear)]
        self._step, self._lends = step_of(longest_row), lends
        self._longest = multiple(longest_row + 1, self._step)
        self._stream = _stream(device) if device.type == "cuda" else None
        self.pool: Any = torch.cuda.MemPool() if device.type == "cuda" else None
        self._recorded: OrderedDict[Shape, Recorded] = OrderedDict()
        self._seen: Counter[Shape] = Counter()
        self._rows: tuple[Tensor, Tensor] | None = None
        """Where a row goes in, and where what comes of it goes out."""
        self._stamp: Stamp | None = None
        self._sums: _Sums | None = None
        self._open: weakref.ref[_Token] | None = None
        self._broken = False

    @property
    def count(self) -> int:
        """How many shapes are recorded."""
        return len(self._recorded)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Train in here: everything is on one stream, that of the recordings."""
        if self._stream is None:
            yield
            return
        outside = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(outside)
        try:
            with torch.cuda.stream(self._stream), card_pool.lends(self._spare):
                yield
        finally:
            outside.wait_stream(self._stream)

    def __call__(self, x: Tensor, tables: Tables, starts: list[int], prefix: int) -> Tensor | None:
        """What the layers make of x (T, d), or None where no graph does."""
        if self._broken or not torch.is_grad_enabled():
            return None
        if self._is_open():
            assert not self._lends, "a pass would take the machine's memory that one before it still needs"
            return None
        if (stamp := stamp_of(self._linears)) is None:
            return None
        if self._sums is None or stamp != self._stamp:  # what is recorded reads memory that is no longer theirs
            self._recorded.clear()
            self._stamp, self._sums = stamp, _Sums(list(self._layers.parameters()))
        self._sums.place()
        row = places_of([0, *starts] if prefix else starts, prefix)
        shape = Shape.of(row, x.requires_grad, self._step)
        self._seen[shape] += 1
        if shape not in self._recorded and self._seen[shape] >= OFTEN:
            self._record(shape, x, tables, row)
        if shape not in self._recorded:
            return None
        self._recorded.move_to_end(shape)
        recorded = self._recorded[shape]
        recorded.put(x, tables, row)
        token = _Token()
        self._open = weakref.ref(token)
        out: Tensor = _Repeated.apply(x, self._sums.parameters[0], recorded, self._sums, token)
        return out

    def _spare(self) -> Any:
        """The pool, where it can be used between passes."""
        return self.pool if self._lends and self._recorded else None

    def _is_open(self) -> bool:
        """Whether a pass forward still waits for the one backward, in the memory that another would take."""
        token = None if self._open is None else self._open()
        return token is not None and not token.over

    def _record(self, shape: Shape, x: Tensor, tables: Tables, row: Places) -> None:
        try:
            if self._rows is None or len(self._rows[0]) < shape.tokens:
                self._recorded.clear()  # they read and write where no row of this length fits
                place = x.new_empty(max(shape.tokens, self._longest), x.shape[1])
                # what went in has left the card, where it is offloaded: what comes out may take its place
                self._rows = place, place if self._lends else torch.empty_like(place)
            recorded = Recorded(self._run, shape, self._rows, tables)
            recorded.put(x.detach(), tables, row)
            why = recorded.record(self.pool, self._stream)
        except torch.OutOfMemoryError as e:
            why = str(e)
        if why:
            log.warning("layers are launched one kernel at a time: they could not be recorded as CUDA graphs (%s)", why)
            self._broken = True
            self._recorded.clear()
            self._rows = self.pool = None
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
            return
        if len(self._recorded) >= MOST:
            self._seen[self._recorded.popitem(last=False)[0]] = 0
        self._recorded[shape] = recorded


class _Token:
    """Alive as long as autograd's graph of a pass is; `over`: it has gone backward."""

    over = False


Stamp = tuple[tuple[int | float, ...], ...]
"""What recordings read beside their rows: other weights, adapters or scales need other recordings."""


def stamp_of(linears: Sequence[Linear]) -> Stamp | None:
    """None where an adapter is no product with two trained matrices, or there is none."""
    read: list[tuple[int | float, ...]] = []
    for linear in linears:
        if linear.delta is None:
            read.append((id(linear.weight),))
            continue
        pair = linear.delta.factors
        if pair is None or not isinstance(pair.a, nn.Parameter) or not isinstance(pair.b, nn.Parameter):
            return None
        read.append((id(linear.weight), pair.a.data_ptr(), pair.b.data_ptr(), pair.scale))
    return tuple(read) if any(len(one) > 1 for one in read) else None


class _Sums:
    """Where the gradients of a step are added up, always in the same place."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        sizes = [parameter.numel() for parameter in parameters]
        self._flat = torch.zeros(sum(sizes), device=parameters[0].device)
        parts = zip(self._flat.split(sizes), parameters, strict=True)
        self._views = [part.view(parameter.shape) for part, parameter in parts]

    def place(self) -> None:
        """Make them the gradients of their parameters, with what is in these already."""
        if all(parameter.grad is view for parameter, view in zip(self.parameters, self._views, strict=True)):
            return
        if all(parameter.grad is None for parameter in self.parameters):
            self._flat.zero_()
            for parameter, view in zip(self.parameters, self._views, strict=True):
                parameter.grad = view
            return
        for parameter, view in zip(self.parameters, self._views, strict=True):
            if parameter.grad is None:
                view.zero_()
            elif parameter.grad is not view:
                view.copy_(parameter.grad)
            parameter.grad = view


class Recorded:
    """A pass through all layers, forward and backward, over memory that stays where it is.

    rows: where x goes in, and what comes of it goes out; each at least as long as the shape.
    """

    def __init__(self, run: Run, shape: Shape, rows: tuple[Tensor, Tensor], tables: Tables) -> None:
        self._run, self._shape, device = run, shape, rows[0].device
        self.x, self.out = (row.detach()[: shape.tokens] for row in rows)
        self.x.requires_grad_(shape.learns)
        self._tables: Tables = {
            rope: (cos.new_zeros(shape.tokens, *cos.shape[1:]), sin.new_zeros(shape.tokens, *sin.shape[1:]))
            for rope, (cos, sin) in tables.items()
        }
        queries = torch.zeros(shape.segments + 1, dtype=torch.int32, device=device)
        keys = torch.zeros_like(queries) if shape.keys else queries
        of_keys = torch.zeros(shape.keys, dtype=torch.int64, device=device) if shape.keys else None
        self._places = Segments(queries, keys, shape.longest, shape.longest, of_keys)
        self._put: Places | None = None
        self._graph: Tensor | None = None
        """What `_forward` gave, with autograd's graph, until `_backward` has gone through it."""
        self.forward: Callable[[], None] = self._forward
        self.backward: Callable[[], None] = self._backward

    @torch.no_grad()
    def put(self, x: Tensor, tables: Tables, row: Places) -> None:
        """Copy a row in. Behind it there are zeros."""
        n = len(x)
        self.x[:n].copy_(x)
        self.x[n:].zero_()
        for rope, pair in tables.items():
            for place, table in zip(self._tables[rope], pair, strict=True):
                place[:n].copy_(table)
        if self._put == row:
            return
        self._put, there, whole = row, self._places, self._shape.padded(row)
        there.queries.copy_(torch.tensor(whole.queries, dtype=torch.int32))
        if there.rows is not None:
            there.keys.copy_(torch.tensor(whole.keys, dtype=torch.int32))
            there.rows.copy_(torch.tensor(whole.rows))

    def record(self, pool: Any, stream: Any) -> str:
        """Run once, so that everything is compiled and at hand, then have CUDA write down what is launched.

        Returns why that could not be, if it could not.
        """
        try:
            self._forward()
            self.out.zero_()
            self._backward()
            forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
            with torch.cuda.graph(forward, pool=pool.id, stream=stream):
                self._forward()
            with torch.cuda.graph(backward, pool=pool.id, stream=stream):
                self._backward()
        except RuntimeError as e:  # out of memory is one
            self._graph = None
            return str(e)
        self.forward, self.backward = forward.replay, backward.replay
        return ""

    def _forward(self) -> None:
        with torch.enable_grad():
            self._graph = self._run(self.x, self._tables, Borders(self._places, self._shape.tokens))
        self.out.copy_(self._graph.detach())

    def _backward(self) -> None:
        """`out` holds the gradient now of what it was: no layer asks what it gave."""
        assert self._graph is not None
        self.x.grad = None
        torch.autograd.backward(self._graph, self.out)
        self._graph = None


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """On which everything is recorded and repeated."""
    return torch.cuda.Stream(device)


class _Repeated(torch.autograd.Function):
    """x (T, d), which may be shorter than what is recorded → what the layers make of it. Adds to the parameters'
    gradients itself. `anchor` is one of them: with a gradient to give, autograd comes by."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, _anchor: Tensor, recorded: Recorded, sums: _Sums, token: _Token) -> Tensor:
        recorded.forward()
        ctx.recorded, ctx.sums, ctx.token, ctx.n = recorded, sums, token, len(x)
        return recorded.out[: len(x)]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        recorded, n = ctx.recorded, ctx.n
        recorded.out[:n].copy_(grads[0])
        recorded.out[n:].zero_()
        ctx.sums.place()
        recorded.backward()
        ctx.token.over = True
        dx = recorded.x.grad
        return None if dx is None else dx[:n], None, None, None, None
