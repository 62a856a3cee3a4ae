"""Which layers an adapter is on, and how strongly each, by PEFT's settings and PEFT's rules. Imports no torch."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from edgelora.errors import ConfigError
from edgelora.peft.virtual_settings import VirtualTokens

V = TypeVar("V")

ALL = "all-linear"
NAME = re.compile(r"[\w.-]+")  # what is no regular expression, but the end of a name
LAYER = re.compile(r".*?\.[^.]*\.(\d+)\.")  # PEFT's: the first number in a module's path


@dataclass(frozen=True)
class Where:
    """PEFT's settings of where an adapter is and how strong, by their names there.

    target_modules, exclude_modules: ends of names, or one regular expression for whole names; no target, or
    `all-linear`, is all of them. Patterns are regular expressions for the ends of names.
    """

    target_modules: tuple[str, ...] = ()
    exclude_modules: tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    """α/√r in the place of α/r."""
    lora_dropout: float = 0.0
    """The share of its input that A does not see while something is learned."""
    virtual: VirtualTokens = field(default_factory=VirtualTokens)
    """In the place of all that, where a method puts virtual tokens before every sequence."""
    alora_invocation_tokens: tuple[int, ...] = ()
    """From whose last place in a sequence on an aLoRA acts."""
    token_indices: tuple[int, ...] = ()
    """The tokens whose rows of the embedding and the head are trained."""
    bias: str = "none"
    """Which biases are trained beside a LoRA: `all` there are, those of adapted layers (`lora_only`), or `none`."""
    modules_to_save: tuple[str, ...] = ()
    """The layers that are trained whole beside a LoRA, by the texts in which their names end."""


EVERYWHERE = Where()


class Placed(NamedTuple):
    """The rank and α of an adapter on one layer."""

    rank: int
    alpha: float


def select(names: Collection[str], where: Where, what: str = "linear layer") -> list[str]:
    """The names among these that `where` chooses, in their order. Raises ConfigError with every fault of it."""
    faults = list(_faults(names, where, what))
    found = [] if faults else [name for name in names if _is_chosen(name, where)]
    if not found and not faults:
        faults = [f"{what}s: exclude_modules and layers_to_transform leave none"]
    _require(faults, names, where, what)
    return found


def placed(names: Collection[str], where: Where, rank: int, alpha: float) -> dict[str, Placed]:
    """The rank and α of each of these layers, all of them adapted. Raises ConfigError for a pattern that fits none."""
    patterns = {"rank_pattern": where.rank_pattern, "alpha_pattern": where.alpha_pattern}
    faults = [
        f"{setting}: {pattern} fits no layer that is adapted"
        for setting, table in patterns.items()
        for pattern in table
        if not any(_ends_as(pattern, name) for name in names)
    ]
    _require(faults, names, where, "adapted layer")
    return {
        name: Placed(by_pattern(where.rank_pattern, name, rank), by_pattern(where.alpha_pattern, name, alpha))
        for name in names
    }


def require_ranks(found: Mapping[str, Placed], shapes: Mapping[str, tuple[int, int]], *, by_layer: bool = True) -> None:
    """Raise ConfigError for ranks that are larger than a matrix (d_out, d_in). by_layer: whether layers may differ."""
    beyond = [name for name, place in found.items() if place.rank > min(shapes[name])]
    if not beyond:
        return
    name = min(beyond, key=lambda name: min(shapes[name]))
    most, others = min(shapes[name]), f", and so are {len(beyond) - 1} more" if len(beyond) > 1 else ""
    raise ConfigError(
        what=f"rank {found[name].rank}: {name} is only {shapes[name][0]} x {shapes[name][1]}{others}",
        why=f"a change of such a matrix has no more than {most} directions",
        fix=f"take --rank {most} or less" + f", or --rank-pattern {name.rpartition('.')[2]}={most}" * by_layer,
    )


def by_pattern(patterns: Mapping[str, V], module: str, default: V) -> V:
    """The value of the first pattern that fits, PEFT's rule: it matches the end of a module's path, after a dot."""
    return next((value for pattern, value in patterns.items() if _ends_as(pattern, module)), default)


def target_modules(adapted: Collection[str], linears: Collection[str]) -> list[str]:
    """The adapted layers as PEFT finds them: by the ends of their names where those name no other layer."""
    ends = {name.rpartition(".")[2] for name in adapted}
    everywhere = all(name in adapted for name in linears if name.rpartition(".")[2] in ends)
    return sorted(ends if everywhere else adapted)


def _ends_as(pattern: str, module: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", module) is not None


def _is_regex(names: Sequence[str]) -> bool:
    """One text that is no name, as PEFT tells a text from a list."""
    return len(names) == 1 and NAME.fullmatch(names[0]) is None


def fits(names: Sequence[str], module: str) -> bool:
    """Whether these, ends of names or one regular expression for whole ones, have `module` among them."""
    if _is_regex(names):
        return re.fullmatch(names[0], module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _targets(where: Where) -> tuple[str, ...]:
    return () if [name.lower() for name in where.target_modules] == [ALL] else where.target_modules


def _is_chosen(module: str, where: Where) -> bool:
    if fits(where.exclude_modules, module):
        return False
    if (targets := _targets(where)) and not fits(targets, module):
        return False
    return not where.layers_to_transform or module in targets or _layer(module) in where.layers_to_transform


def _layer(module: str) -> int | None:
    found = LAYER.match(module)
    return int(found[1]) if found else None


def _faults(names: Collection[str], where: Where, what: str) -> Iterator[str]:
    """What is wrong with the settings as they are, before anything is chosen by them."""
    targets = _targets(where)
    for setting, given in (("target_modules", targets), ("exclude_modules", where.exclude_modules)):
        if _is_regex(given):
            yield from _regex_faults(setting, given[0], names, what)
            continue
        unknown = [one for one in given if not any(fits((one,), name) for name in names if NAME.fullmatch(one))]
        if unknown:
            yield f"{setting}: no {what} of this model is named {', '.join(unknown)}"
    layers = {_layer(name) for name in names}
    if strangers := [layer for layer in where.layers_to_transform if layer not in layers]:
        last = max(layer for layer in layers if layer is not None)
        yield f"layers_to_transform: {', '.join(map(str, strangers))}, and this model's are 0 to {last}"
    if where.layers_to_transform and _is_regex(targets):
        yield "layers_to_transform beside a regular expression in target_modules: say the layers in that"
    for pattern in {**where.rank_pattern, **where.alpha_pattern}:
        try:
            re.compile(pattern)
        except re.error as e:
            yield f"rank_pattern, alpha_pattern: {pattern} is no regular expression ({e})"


def _regex_faults(setting: str, pattern: str, names: Collection[str], what: str) -> Iterator[str]:
    try:
        if not any(re.fullmatch(pattern, name) for name in names):
            yield f"{setting}: {pattern} fits the whole name of no {what}"
    except re.error as e:
        yield f"{setting}: {pattern} is no regular expression ({e})"


def _require(faults: Sequence[str], names: Collection[str], where: Where, what: str) -> None:
    if not faults:
        return
    there = sorted({name.rpartition(".")[2] for name in names})
    asked = [*where.target_modules, *where.exclude_modules, *where.rank_pattern, *where.alpha_pattern]
    near = [
        found for one in asked if one not in there for found in difflib.get_close_matches(one.split(".")[-1], there, 1)
    ]
    raise ConfigError(
        what="; ".join(faults),
        why=f"its {what}s are {', '.join(there)}",
        fix=f"did you mean {', '.join(near)}?" if near else "name some of these, or none to adapt them all",
    )
