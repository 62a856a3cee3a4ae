"""Jinja for a stranger's chat template: what it may reach, and strings that stay tracked.

Jinja's sandbox forbids single names; here closed lists say what is allowed, so that whatever a template can reach is
followed by `Tracked` and counted by a `Meter`.
"""

from __future__ import annotations

from datetime import date, datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, Undefined, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, safe_range
from jinja2.utils import Namespace

from edgelora.data.rendering.filters import FILTERS, text_of
from edgelora.data.rendering.meter import COUNTING_FILTERS, MeteredContext, Metering, meter_of, metered
from edgelora.data.rendering.spelling import braces, percent
from edgelora.data.rendering.tracked import METHODS, LimitError, check_items, check_size, joined, tracked

MAX_EXPONENT = 64
MAX_DATE_FORMAT = 200  # characters

_ATTRIBUTES: dict[type, frozenset[str]] = {
    dict: frozenset({"get", "items", "keys", "values"}),
    LoopContext: frozenset({
        "index", "index0", "revindex", "revindex0", "first", "last", "length", "depth", "depth0", "previtem",
        "nextitem", "cycle", "changed",
    }),
}  # fmt: skip


@pass_context
def _printed(_context: Context, value: Any) -> str:  # with a context, so that Jinja leaves it to the rendering
    return text_of(value)


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of one chat template. `today`: the day that `strftime_now` tells, None for the real one."""

    context_class = MeteredContext
    intercepted_binops = frozenset({"+", "*", "**", "%"})
    concat = staticmethod(lambda parts: joined(*parts))

    def __init__(self, today: date | None = None) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, optimized=False,  # a folded constant would be computed uncounted
            extensions=[loopcontrols, Generation], finalize=_printed,
        )  # fmt: skip
        self.filters = {name: metered(function) for name, function in FILTERS.items()} | COUNTING_FILTERS
        self.globals = {
            "range": safe_range, "dict": dict, "namespace": _namespace, "raise_exception": _raise,
            "strftime_now": lambda format: _strftime(format, today),
        }  # fmt: skip

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:  # Jinja's hook for this
        return super()._generate(Metering().visit(source), *args, **kwargs)

    def getattr(self, obj: Any, attribute: str) -> Any:
        """`obj.attribute`, as Jinja looks it up, out of what is allowed."""
        if isinstance(obj, str) and attribute in METHODS:
            return getattr(tracked(obj), attribute)
        if isinstance(obj, str) and attribute == "format":
            return lambda *args, **kwargs: braces(obj, args, kwargs)
        if attribute in _ATTRIBUTES.get(type(obj), ()):
            return getattr(obj, attribute)
        if isinstance(obj, (Namespace, Undefined)):
            return super().getattr(obj, attribute)
        if hasattr(obj, attribute):
            return self.unsafe_undefined(obj, attribute)
        return self._item(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """`obj[argument]`, and what `obj.argument` would be where there is no such item."""
        item = self._item(obj, argument)
        return self.getattr(obj, argument) if isinstance(item, Undefined) and isinstance(argument, str) else item

    def _item(self, obj: Any, argument: Any) -> Any:
        try:
            return obj[argument]
        except (TypeError, LookupError):
            return self.undefined(obj=obj, name=argument)

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """What `obj(…)` returns."""
        meter = meter_of(context)
        meter.step(8 if isinstance(obj, Macro) else 1)
        if isinstance(obj, Macro):
            meter.made([*args, *(value for name, value in kwargs.items() if not name.startswith("_"))])
        made = super().call(context, obj, *args, **kwargs)
        return made if isinstance(getattr(obj, "__self__", None), dict) else meter.made(made)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        meter = meter_of(context)
        meter.step()
        if operator == "%" and isinstance(left, str):
            return meter.made(percent(left, right))
        if operator == "*":
            _check_repeated(left, right)
            _check_repeated(right, left)
        if operator == "**" and abs(right) > MAX_EXPONENT:
            raise LimitError(f"a power above {MAX_EXPONENT}")
        return meter.made(super().call_binop(context, operator, left, right))

    def call_test(  # by `select`, `rejectattr` and their like, item by item
        self, name: str, value: Any, args: Any = None, kwargs: Any = None, context: Any = None, eval_ctx: Any = None
    ) -> Any:
        context.meter.step()
        return super().call_test(name, value, args, kwargs, context, eval_ctx)


def _check_repeated(value: Any, times: Any) -> None:
    if isinstance(value, (str, list, tuple)) and isinstance(times, int):
        (check_size if isinstance(value, str) else check_items)(len(value) * times)


def _namespace(*args: Any, **kwargs: Any) -> Namespace:
    held = dict(*args, **kwargs)
    if any(str(name).startswith("_") for name in held):  # Python itself would look for some of these
        raise SecurityError("a namespace may not hold names that begin with _")
    return Namespace(held)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime(format: str, today: date | None) -> str:
    if len(format) > MAX_DATE_FORMAT:
        raise LimitError(f"a date format of more than {MAX_DATE_FORMAT} characters")
    return (datetime.now() if today is None else datetime(today.year, today.month, today.day)).strftime(format)


class Generation(Extension):
    """HF's `{% generation %}` marks what the assistant says. Origins tell that better, so it is let through."""

    tags = frozenset({"generation"})  # type: ignore[assignment]  # a set in Jinja's own

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)
