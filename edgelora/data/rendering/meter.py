"""How much a chat template may do: steps, characters, and processor time as the last resort.

Steps and characters are the same on every machine, so a template is stopped at the same place everywhere. Every node
of a template that makes or searches something is led through a filter that counts it (`Metering`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from jinja2 import TemplateAssertionError, nodes, pass_context
from jinja2.runtime import Context
from jinja2.visitor import NodeTransformer

from edgelora.data.rendering.filters import text_of
from edgelora.data.rendering.tracked import MAX_CHARACTERS, MAX_ITEMS, LimitError, joined

MAX_STEPS = 200_000  # calls, filters, comparisons and iterations of one rendering; a macro's call counts as 8
MAX_WORK_CHARACTERS = 8 * MAX_CHARACTERS  # of all texts that one rendering makes; an item of a list counts as 32
MAX_SECONDS = 1.0  # of processor time
MAX_BITS = 256  # of an integer


class Meter:
    """What one rendering has used up. Raises LimitError where it is too much."""

    def __init__(self) -> None:
        self._steps, self._characters = MAX_STEPS, MAX_WORK_CHARACTERS
        self._deadline = time.thread_time() + MAX_SECONDS

    def step(self, steps: int = 1) -> None:
        """Count steps; the clock is read at every sixteenth."""
        before, self._steps = self._steps, self._steps - steps
        if self._steps < 0:
            raise LimitError(f"it takes more than {MAX_STEPS} steps")
        if before >> 4 != self._steps >> 4 and time.thread_time() > self._deadline:
            raise LimitError(f"it takes more than {MAX_SECONDS:g} seconds")

    def made(self, value: Any) -> Any:
        """Count what an operation made, and hand it on."""
        if isinstance(value, str):
            if len(value) > MAX_CHARACTERS:
                raise LimitError(f"a text of more than {MAX_CHARACTERS} characters")
            self._spend(len(value))
        elif isinstance(value, int):
            if value.bit_length() > MAX_BITS:
                raise LimitError(f"a number of more than {MAX_BITS} bits")
        elif isinstance(value, (list, tuple, dict)):
            self._spend(32 * len(value))
            self.step(self._weight(value, MAX_ITEMS) // 16)
        return value

    def _spend(self, characters: int) -> None:
        self._characters -= characters
        if self._characters < 0:
            raise LimitError(f"it makes texts of more than {MAX_WORK_CHARACTERS} characters")

    def _weight(self, value: Any, left: int) -> int:
        """How many values a container holds, however deep. One that holds another twice counts it twice, as a
        comparison would; so 20 lists of two lists each are refused while they are built."""
        weight = len(value)
        for item in [*value, *value.values()] if isinstance(value, dict) else value:
            if weight > left:
                raise LimitError(f"a list of more than {MAX_ITEMS} items")
            if isinstance(item, (list, tuple, dict)):
                weight += self._weight(item, left - weight)
            elif isinstance(item, str):
                weight += len(item) // 64
        return weight


class MeteredContext(Context):
    """The variables of one rendering, and its meter."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.meter = Meter()


def meter_of(context: Context) -> Meter:
    """The meter of the rendering that this context belongs to."""
    assert isinstance(context, MeteredContext), "the sandbox makes no other contexts"
    return context.meter


def metered(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter (context, value, …) that counts as a step, and what it makes as made."""

    @pass_context
    def count(context: MeteredContext, *args: Any, **kwargs: Any) -> Any:
        context.meter.step()
        return context.meter.made(function(context, *args, **kwargs))

    return count


class Iteration:
    """Values to loop over, a step each."""

    def __init__(self, values: Any, meter: Meter) -> None:
        self._values, self._meter = values, meter

    def __iter__(self) -> Iterator[Any]:
        for value in self._values:
            self._meter.step()
            yield value

    def __len__(self) -> int:
        return len(self._values)


@pass_context
def _each(context: MeteredContext, values: Any) -> Iteration:
    return Iteration(values, context.meter)


@pass_context
def _step(context: MeteredContext, value: Any) -> Any:
    context.meter.step()
    return value


@pass_context
def _slice(context: MeteredContext, value: Any) -> Any:
    if isinstance(value, str):
        return context.meter.made(value)
    context.meter.step(1 + len(value) // 16)
    return value


# The names have a blank, so that no template can use them.
COUNTING_FILTERS: dict[str, Callable[..., Any]] = {
    "each of": _each,
    "one step": _step,
    "a slice": _slice,
    "made of": metered(lambda _context, value: value),
    "joined up": metered(lambda _context, values: joined(*map(text_of, values))),
}


class Metering(NodeTransformer):
    """Leads what a template does through the filters above. Raises TemplateAssertionError for what it may not do."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _through("each of", node.iter)
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = _through("one step", node.expr)
        return node

    def visit_Test(self, node: nodes.Test) -> nodes.Node:
        self.generic_visit(node)
        if node.args:  # `is in(…)`, `is eq(…)`; the others only look at a type
            node.node = _through("one step", node.node)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:
        self.generic_visit(node)
        return _through("a slice", node) if isinstance(node.arg, nodes.Slice) else node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _through("joined up", nodes.List(node.nodes, lineno=node.lineno))

    def visit_AssignBlock(self, node: nodes.AssignBlock) -> nodes.Node:
        self.generic_visit(node)
        if node.filter is None:
            node.filter = _through("made of", None, node.lineno)
        return node

    def _container(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        constant = all(isinstance(child, nodes.Const) for child in node.iter_child_nodes())
        return node if constant or getattr(node, "ctx", "load") != "load" else _through("made of", node)

    visit_List = visit_Tuple = visit_Dict = _container

    def visit_NSRef(self, node: nodes.NSRef) -> nodes.Node:
        if node.attr.startswith("_"):
            raise TemplateAssertionError(f"a namespace may not hold {node.attr!r}", node.lineno)
        return node

    def _elsewhere(self, node: nodes.Node) -> nodes.Node:
        raise TemplateAssertionError("a chat template stands alone: no include, import, extends or block", node.lineno)

    visit_Include = visit_Import = visit_FromImport = visit_Extends = visit_Block = _elsewhere


def _through(name: str, node: nodes.Node | None, line: int = 0) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=line if node is None else node.lineno)
