"""A table whose values are read when they are asked for, each time anew: all of them at once would take much memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TypeVar

P = TypeVar("P")
V = TypeVar("V")


class Lazy(Mapping[str, V]):
    """`read(places[key])` for each key. Going through keys reads nothing."""

    def __init__(self, places: Mapping[str, P], read: Callable[[P], V]) -> None:
        self._places: dict[str, Callable[[], V]] = {key: partial(read, place) for key, place in places.items()}

    def __getitem__(self, key: str) -> V:
        return self._places[key]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: object) -> bool:  # the mapping's own would read the value
        return key in self._places
