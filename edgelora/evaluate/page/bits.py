"""How many bits each tensor of the chosen file has, layer by layer; like neighbours are one line."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

LAYER = re.compile(r"blk\.(\d+)\.(.+)")
MOST_BITS = 16.0  # what has more is drawn as this


@dataclass(frozen=True)
class Bits:
    """`text`: the tensor's type; `bits` a weight, scales included; `share`: 0 at two bits, 1 at MOST_BITS."""

    text: str
    bits: float

    @property
    def share(self) -> float:
        return min(max((self.bits - 2) / (MOST_BITS - 2), 0.0), 1.0)


@dataclass(frozen=True)
class BitsMap:
    """`columns`: tensors of a layer; `lines`: of each run of like layers its name and cells (None: it has no such
    tensor); `others`: tensors outside the layers; `vectors`: how many norms and biases are left out."""

    columns: tuple[str, ...]
    lines: tuple[tuple[str, tuple[Bits | None, ...]], ...]
    others: tuple[tuple[str, Bits], ...]
    vectors: int


def bits_map(types: Mapping[str, str]) -> BitsMap | None:
    """Of GGUF names and types; None without any. A type that is not known has no bits and is left out."""
    layers: dict[int, dict[str, Bits]] = {}
    others: list[tuple[str, Bits]] = []
    vectors = 0
    for name, type_ in types.items():
        found, bits = LAYER.fullmatch(name), _bits(type_)
        if bits is None:
            continue
        if "norm" in name or name.endswith(".bias"):
            vectors += 1
        elif found:
            layers.setdefault(int(found[1]), {})[found[2].removesuffix(".weight")] = bits
        else:
            others.append((name.removesuffix(".weight"), bits))
    columns = tuple(dict.fromkeys(column for layer in layers.values() for column in layer))
    cells = [(number, tuple(layers[number].get(column) for column in columns)) for number in sorted(layers)]
    lines = []
    for row, run in itertools.groupby(cells, key=lambda cell: cell[1]):
        numbers = [number for number, _ in run]
        lines.append((str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}–{numbers[-1]}", row))
    return BitsMap(columns, tuple(lines), tuple(others), vectors) if lines or others else None


def _bits(type_: str) -> Bits | None:
    try:
        n_weights, n_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[type_]]
    except KeyError:
        return None
    return Bits(type_, 8 * n_bytes / n_weights)
