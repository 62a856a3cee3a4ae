"""What is wrong with a setting, in our words: what it is, what it must be, or the value that was meant."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from typing import Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

# What a setting must, by the kinds of pydantic's faults that our models know.
MUST = {
    "greater_than_equal": "be at least {ge:g}", "greater_than": "be above {gt:g}",
    "less_than_equal": "be at most {le:g}", "less_than": "be below {lt:g}",
    **dict.fromkeys(("int_parsing", "int_type", "int_from_float"), "be a whole number"),
    **dict.fromkeys(("float_parsing", "float_type"), "be a number"), "finite_number": "be a finite number",
    **dict.fromkeys(("bool_parsing", "bool_type"), "be true or false"),
    "string_type": "be a text", "path_type": "be a path", "tuple_type": "be a list",
    "string_too_short": "not be", "too_short": "not be", "string_pattern_mismatch": "match {pattern}",
}  # fmt: skip
LISTED = {"method": "`edgelora methods` lists all"}  # settings that have too many values for one message


def in_words(model: type[BaseModel], fault: ErrorDetails) -> str:
    """What is wrong with a setting: `it is 0, and must be at least 1`; in pydantic's words where that is rare."""
    name, kind, value = str(fault["loc"][0]), fault["type"], fault["input"]
    if kind == "literal_error" and (values := values_of(model.model_fields[name])):
        return unlike(name, values, value)
    if kind in MUST:
        shown = "empty" if value in ("", [], ()) else value
        return f"it is {shown}, and must {MUST[kind].format(**fault.get('ctx', {}))}"
    return fault["msg"].removeprefix("Value error, ")


def unlike(name: str, values: Collection[str], text: object) -> str:
    """`lroa is none of its values, did you mean lora? ...`, with where they all stand."""
    near = difflib.get_close_matches(str(text), values, 1)
    listed = LISTED.get(name, f"it is one of {', '.join(values)}")
    return f"{text} is none of its values{f', did you mean {near[0]}?' if near else ':'} {listed}"


def values_of(field: FieldInfo) -> tuple[str, ...]:
    """The names that a field can be, if it is one of a few."""
    parts = (field.annotation, *get_args(field.annotation))  # it may be one of them, or None
    return next((get_args(part) for part in parts if get_origin(part) is Literal), ())
