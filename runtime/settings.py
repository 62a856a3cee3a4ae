"""How answers are drawn, as a person types it: `temperature 0.7`, `stop "###"`, `json_schema FILE`, `grammar off`."""

from __future__ import annotations

import difflib
import json
import shlex
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from edgelora.errors import ConfigError
from runtime.chat import Settings
from runtime.limits import check_sampling
from runtime.service import Sampling

OFF = "off"  # takes back what can be None or empty
MOST_TOKENS = 1 << 24
ANY_VOCABULARY = 1 << 31  # tokens: how many there are is known to the engine, which checks again
LARGEST_FILE = 1 << 20  # bytes of a grammar or a schema
FIELDS: dict[str, Any] = {**get_type_hints(Sampling), "max_tokens": int}


def with_setting(settings: Settings, name: str, text: str) -> Settings:
    """These settings with `name` (a field of Sampling, or max_tokens) as `text` says.

    Raises ConfigError for an unknown name (with the nearest one) and for what cannot be its value.
    """
    if name not in FIELDS:
        near = difflib.get_close_matches(name, FIELDS, 1)
        raise ConfigError(
            what=f"no setting named {name}" + (f", did you mean {near[0]}?" if near else ""),
            why=f"there are {', '.join(FIELDS)}",
            fix="/set shows them all with their values",
        )
    value = _read(name, FIELDS[name], text.strip())
    if name != "max_tokens":
        return replace(settings, sampling=checked(replace(settings.sampling, **{name: value})))
    if not 1 <= value <= MOST_TOKENS:
        raise ConfigError(
            what=f"max_tokens {value}", why="an answer has at least one token", fix=f"use 1 to {MOST_TOKENS}"
        )
    return replace(settings, max_tokens=value)


def values(settings: Settings) -> dict[str, str]:
    """Every setting as one would type it."""
    named = {f.name: getattr(settings.sampling, f.name) for f in fields(Sampling)}
    return {name: _shown(value) for name, value in {"max_tokens": settings.max_tokens, **named}.items()}


def checked(sampling: Sampling) -> Sampling:
    """`sampling`, if every field of it is within its limits. Raises ConfigError."""
    check_sampling(sampling, ANY_VOCABULARY)
    return sampling


def read_grammar(path: Path) -> str:
    """The text of a GBNF file. Raises ConfigError."""
    try:
        with path.expanduser().open("rb") as file:
            raw = file.read(LARGEST_FILE + 1)
        if len(raw) > LARGEST_FILE:
            raise ValueError(f"more than {LARGEST_FILE} bytes")
        return raw.decode("utf-8")
    except (OSError, ValueError) as e:
        reason = e.strerror if isinstance(e, OSError) else e
        raise ConfigError(
            what=f"{path}: cannot be read ({reason})",
            why="what an answer must look like stands in a text file: GBNF, or a JSON schema",
            fix="check the spelling of the path",
        ) from e


def read_schema(path: Path) -> Mapping[str, Any]:
    """The JSON schema in a file. Raises ConfigError."""
    try:
        schema = json.loads(read_grammar(path))
        if not isinstance(schema, dict):
            raise ValueError("it is no object")
    except (ValueError, RecursionError) as e:
        raise ConfigError(f"{path}: no JSON schema ({e})", "a schema is a JSON object", "mend the file") from e
    return schema


def _read(name: str, kind: Any, text: str) -> Any:
    """The value that `text` is to a field of this type. Raises ConfigError."""
    optional = type(None) in get_args(kind)
    if text == OFF and (optional or get_origin(kind) in (tuple, Mapping)):
        return getattr(Sampling(), name)
    if name == "grammar":
        return read_grammar(Path(text))
    if name == "json_schema":
        return read_schema(Path(text))
    try:
        if name == "logit_bias":
            return {int(token): float(bias) for token, _, bias in (part.partition("=") for part in text.split())}
        if name == "stop":
            return tuple(shlex.split(text))
        value = float(text) if kind is float else int(text)
        if get_origin(kind) is Literal and value not in get_args(kind):
            raise ValueError
    except ValueError as e:
        raise ConfigError(f"{name} {text}", f"it is {_expected(name, kind)}", f"/set {name} {_example(kind)}") from e
    return value


def _expected(name: str, kind: Any) -> str:
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    known = {"logit_bias": "a list of TOKEN=NUMBER", "stop": "a list of texts, in quotes where blanks are in them"}
    return known.get(name, "a number" if kind is float else "a whole number")


def _example(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return str(get_args(kind)[-1])
    return {tuple: '"###"', Mapping: "12=-1.5"}.get(get_origin(kind), "0.7" if kind is float else "1")


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return shlex.join(value) or OFF
    if isinstance(value, str):
        return f"{len(value)} characters of GBNF"
    if isinstance(value, Mapping):
        biases = all(isinstance(token, int) for token in value)
        shown = " ".join(f"{token}={bias:g}" for token, bias in value.items()) if biases else json.dumps(value)
        return shown or OFF
    if isinstance(value, float):
        return f"{value:g}"
    return OFF if value is None else str(value)
