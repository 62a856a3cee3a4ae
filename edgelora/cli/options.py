"""Command-line options out of a pydantic model: a field is an option, its docstring the help, its default the default.

What is not given on the command line is left to a TOML file or to the model, so defaults stand in one place.
"""

from __future__ import annotations

import inspect
import tomllib
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import typer
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from edgelora.errors import ConfigError
from edgelora.faults import in_words, meant, meant_setting, unlike, values_of


def with_options(
    model: type[BaseModel], skip: set[str], panels: Mapping[str, str]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command whose last parameter is `**settings` an option for each field of `model` that is not in `skip`.

    panels: the heading under which a field and those after it are listed. The command gets None for what is not given.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        panel, added = None, []
        for name, field in model.model_fields.items():
            panel = panels.get(name, panel)
            if name not in skip:
                added.append(_parameter(name, field, panel))
        command.__signature__ = signature.replace(parameters=[*own, *added])  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in [*own, *added]}
        return command

    return decorate


def _parameter(name: str, field: FieldInfo, panel: str | None) -> inspect.Parameter:
    typed = name.replace("_", "-")
    names = f"--{typed}/--no-{typed}" if field.annotation is bool else f"--{typed}"  # a file may have said yes
    option = typer.Option(names, help=_help(field), rich_help_panel=panel, show_default=False)
    if values := values_of(field):
        option.parser, option.metavar = partial(_one_of, name, values), f"[{'|'.join(values)}]"
    kind = Annotated[_typed(field.annotation), option]  # type: ignore[valid-type]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)


def _help(field: FieldInfo) -> str:
    """The docstring, and the default where one is fixed."""
    text = " ".join((field.description or "").split())
    shown = field.default not in (None, False, ()) and not field.is_required()
    return f"{text} Default: {field.default}." if shown else text


def _typed(annotation: Any) -> Any:
    """What typer understands of a field's type: None stands for an option that is not given."""
    if get_origin(annotation) in (Union, UnionType):
        (annotation,) = (part for part in get_args(annotation) if part is not type(None))
    if get_origin(annotation) is tuple:
        return list[str] | None
    if annotation in (int, float, bool, str, Path):
        return annotation | None
    return str | None


def _one_of(name: str, values: tuple[str, ...], text: str) -> str:
    if text in values:
        return text
    if known := meant(name, values, text):
        raise ConfigError(
            what=f"--{name.replace('_', '-')} {text}: this is none of its values",
            why=f"it is {known.what}",
            fix=known.write,
        )
    raise typer.BadParameter(unlike(name, values, text))


def settled(
    model: type[BaseModel],
    file: Path | None,
    given: Mapping[str, Any],
    arguments: Collection[str] = (),
    command: str = "train",
) -> Any:
    """A `model` of the settings in a TOML file and, over them, those `given` on the command line (None: not given).

    arguments: those that are given by their place; command: the name under which its help is found. Raises ConfigError
    that names every setting that cannot be, each as it was written and where, and for unknown ones the nearest name;
    what is missing in both places is wrong usage.
    """
    settings = {} if file is None else read_toml(file, model)
    said = _said(given)
    try:
        return model.model_validate(settings | said)
    except ValidationError as e:
        typed = {name: name.upper() if name in arguments else f"--{name.replace('_', '-')}" for name in given}
        faults = [(str(fault["loc"][0]), fault["type"], in_words(model, fault)) for fault in e.errors()]
        if missing := [typed[name] for name, kind, _ in faults if kind == "missing"]:
            raise typer.BadParameter("missing, and not in a --config file", param_hint=missing) from e
        where = {name: typed[name] if name in said else f"{file}: {name}" for name, *_ in faults}
        listed = "; ".join(f"{where[name]}: {text}" for name, _, text in faults)
        printed = "`edgelora train --print-config` prints each setting with what it is"
        fix = f"see `edgelora {command} --help`" if where.keys() <= said.keys() else printed
        raise ConfigError(listed, "these settings cannot train anything", fix) from e


def _said(given: Mapping[str, Any]) -> dict[str, Any]:
    """What stands on the command line."""
    return {name: value for name, value in given.items() if value is not None and value != []}


def printed(model: type[BaseModel], file: Path | None, given: Mapping[str, Any], arguments: Collection[str]) -> str:
    """What `settled` gives, as TOML, a required setting that stands nowhere yet left open. Raises as it does."""
    there = _said(given).keys() | ({} if file is None else read_toml(file, model)).keys()
    required = {name for name, field in model.model_fields.items() if field.is_required()}
    blanks = dict.fromkeys(required - there, "…")
    return as_toml(settled(model, file, {**given, **blanks}, arguments), blanks)


def read_toml(path: Path, model: type[BaseModel]) -> dict[str, Any]:
    """The settings in a TOML file; paths in it are relative to where one stands, as on the command line."""
    try:
        settings = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise ConfigError(
            what=f"{path}: no TOML file that can be read ({e})",
            why="settings stand in it as `name = value`, a line each",
            fix="start from what `edgelora train --print-config` prints",
        ) from e
    unknown = [name for name in settings if name not in model.model_fields]
    if unknown:
        said = ", ".join(_unlike_any(name, settings[name], model) for name in unknown)
        raise ConfigError(
            what=f"{path}: unknown settings: {said}",
            why="a misspelt setting would be silently ignored",
            fix="`edgelora train --print-config` prints them all",
        )
    return settings


def _unlike_any(name: str, value: Any, model: type[BaseModel]) -> str:
    """An unknown setting, with the one that was meant by it: another program's, or the nearest name."""
    if isinstance(value, Mapping):
        return f"the table {name} (settings stand without one)"
    near = meant_setting(name, model)
    return f"{name} (did you mean {near}?)" if near else name


def as_toml(config: BaseModel, blanks: Collection[str] = ()) -> str:
    """Every setting with its docstring above it; those to be chosen, or as `blanks` to be given, are commented out."""
    lines = []
    for name, field in type(config).model_fields.items():
        value = config.model_dump(mode="json")[name]
        lines += [f"# {line}" for line in " ".join((field.description or "").split()).splitlines()]
        left_open = f"# {name} = {'  # required' if name in blanks else ''}"
        lines += [left_open if value is None or name in blanks else f"{name} = {_toml(value)}", ""]
    return "\n".join(lines)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, str):
        escaped = "".join(c if c.isprintable() and c not in '"\\' else f"\\U{ord(c):08x}" for c in value)
        return f'"{escaped}"'
    return repr(value)
