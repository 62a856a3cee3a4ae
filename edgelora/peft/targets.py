"""Which layers an adapter is on, by PEFT's rules. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import TypeVar

V = TypeVar("V")


def by_pattern(patterns: Mapping[str, V], module: str, default: V) -> V:
    """PEFT's rule: a pattern is a regular expression that matches the end of a module's path, after a dot."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def target_modules(adapted: Collection[str], linears: Collection[str]) -> list[str]:
    """The adapted layers as PEFT finds them: by the ends of their names where those name no other layer."""
    ends = {name.rpartition(".")[2] for name in adapted}
    everywhere = all(name in adapted for name in linears if name.rpartition(".")[2] in ends)
    return sorted(ends if everywhere else adapted)
