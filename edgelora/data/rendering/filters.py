"""The filters a chat template may use: each one keeps its text tracked and makes nothing of unbounded size.

Every row of THE TABLE takes the context, the filtered value and the filter's arguments. Jinja's own function stands
there where it only hands values on; the rest of Jinja's filters no chat template has a use for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from jinja2 import Undefined
from jinja2 import filters as jinja_filters
from jinja2.runtime import Context

from edgelora.data.rendering.spelling import percent, to_json, written
from edgelora.data.rendering.tracked import check_items, check_size, joined, tracked


def _on_text(method: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that turns what it is given into text first."""
    return lambda _context, value, *args, **kwargs: method(tracked(text_of(value)), *args, **kwargs)


def _plain(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda _context, *args, **kwargs: function(*args, **kwargs)


def _with_environment(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda context, *args, **kwargs: function(context.environment, *args, **kwargs)


def text_of(value: Any) -> str:
    """What a template prints for a value: nothing where it is undefined."""
    return "" if isinstance(value, Undefined) else written(value)


def _first(context: Context, values: Iterable[Any]) -> Any:
    return next(iter(values), context.environment.undefined("the first of nothing"))


def _last(context: Context, values: Any) -> Any:
    return next(iter(reversed(values)), context.environment.undefined("the last of nothing"))


def _join(context: Context, values: Iterable[Any], between: Any = "", attribute: str | int | None = None) -> str:
    if attribute is not None:
        values = (context.environment.getitem(value, attribute) for value in values)
    return joined(*map(text_of, _listed(values)), between=text_of(between))


def _listed(values: Iterable[Any]) -> list[Any]:
    listed = []
    for value in values:
        listed.append(value)
        check_items(len(listed))
    return listed


def _replace(text: str, old: Any, new: Any, count: int | None = None) -> str:
    return tracked(text).replace(text_of(old), text_of(new), -1 if count is None else count)


def _title(text: str) -> str:
    return tracked(text).recased(jinja_filters.do_title(str.__str__(text)))


def _indent(text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    start = width if isinstance(width, str) else tracked(" ") * width
    lines = tracked(joined(text, "\n")).splitlines()
    check_size(len(text) + len(lines) * len(start))
    rest = [joined(start, line) if line or blank else line for line in lines[1:]]
    return joined(start if first else "", joined(lines[0], *rest, between="\n"))


def _escape(text: str) -> str:
    for character, code in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("'", "&#39;"), ('"', "&#34;")):
        text = _replace(text, character, code)
    return text


def _format(text: str, *args: Any, **kwargs: Any) -> str:
    return percent(text, kwargs or args)


FILTERS: dict[str, Callable[..., Any]] = {
    "abs": _plain(abs),
    "capitalize": _on_text(lambda text: text.capitalize()),
    "center": _on_text(lambda text, width=80: text.center(width)),
    "count": _plain(len),
    "d": _plain(jinja_filters.do_default),
    "default": _plain(jinja_filters.do_default),
    "dictsort": _plain(jinja_filters.do_dictsort),
    "e": _on_text(_escape),
    "escape": _on_text(_escape),
    "first": _first,
    "float": _plain(jinja_filters.do_float),
    "format": _on_text(_format),
    "indent": _on_text(_indent),
    "int": _plain(jinja_filters.do_int),
    "items": _plain(jinja_filters.do_items),
    "join": _join,
    "last": _last,
    "length": _plain(len),
    "list": _plain(_listed),
    "lower": _on_text(lambda text: text.lower()),
    "map": jinja_filters.do_map,
    "max": _with_environment(jinja_filters.do_max),
    "min": _with_environment(jinja_filters.do_min),
    "reject": jinja_filters.do_reject,
    "rejectattr": jinja_filters.do_rejectattr,
    "replace": _on_text(_replace),
    "reverse": _plain(jinja_filters.do_reverse),
    "safe": _on_text(lambda text: text),
    "select": jinja_filters.do_select,
    "selectattr": jinja_filters.do_selectattr,
    "sort": _with_environment(jinja_filters.do_sort),
    "string": _on_text(lambda text: text),
    "title": _on_text(_title),
    "tojson": _plain(to_json),
    "trim": _on_text(lambda text, chars=None: text.strip(chars)),
    "unique": _with_environment(jinja_filters.do_unique),
    "upper": _on_text(lambda text: text.upper()),
}
