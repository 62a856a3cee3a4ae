"""What a report is asked for, and the cells that it then has: each way at each level; what cannot be is refused."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

from converters.quant_types import COPY, NEEDS_IMPORTANCE, parse_type
from edgelora.base.model import FLOAT_QUANTS, Base
from edgelora.errors import AdapterError, ConfigError
from edgelora.evaluate.cells import WAYS, Way
from edgelora.pipeline.evaluate import adapter_files
from edgelora.pipeline.export import read_checked
from edgelora.pipeline.grid_live import Live

LEVELS = ("Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0", "F16")
WINDOWS = 64


@dataclass(frozen=True)
class Asked:
    """What a user asks for. `adapters_for`: by a level, an adapter folder that was trained over that very file.
    `calibration`: rows that importance is computed on; without it those that the adapter was trained on."""

    base: Path
    out: Path
    adapter: tuple[Path, float] | None = None
    quants: tuple[str, ...] = LEVELS
    ways: tuple[str, ...] = ()
    data: tuple[Path, ...] = ()
    text: Path | None = None
    adapters_for: Mapping[str, Path] = field(default_factory=dict)
    calibration: Path | None = None
    windows: int = WINDOWS
    context: int = 512
    metric: str = "auto"
    pattern: str | None = None
    allow_unverified: bool = False


@dataclass(frozen=True)
class Place:
    """A cell of the grid."""

    way: Way
    quant: str

    @property
    def name(self) -> str:
        """`Q4_K_M merged`: the level, and the way as WAYS calls it."""
        return f"{self.quant} {WAYS[self.way]}"


def places_of(asked: Asked, live: Live) -> tuple[Place, ...]:
    """The cells; live: what `--ways live` means for the adapter. Raises ConfigError."""
    quants = tuple(dict.fromkeys(quant.upper() for quant in asked.quants))
    for quant in (*quants, *asked.adapters_for):
        parse_type(quant)
        if quant == COPY:
            raise ConfigError("--quants COPY", "a report compares levels of quantization", "name types such as Q4_K_M")
    ways = list(dict.fromkeys(asked.ways or (("live", "merged") if asked.adapter else ("base",))))
    if unknown := [way for way in ways if way not in WAYS]:
        raise ConfigError(f"--ways {unknown[0]}", "there is none of that name", f"choose from {', '.join(WAYS)}")
    if not quants or (asked.adapter is None and set(ways) - {"base", "trained"}):
        raise ConfigError(
            what=f"--ways {','.join(ways)} without an adapter" if quants else "--quants names no type",
            why="there is nothing to run live or to merge",
            fix="pass --adapter FOLDER and --quants Q4_K_M,Q8_0",
        )
    ways = [live.way if way == "live" else way for way in ways]
    if asked.adapter is not None:
        _require_folder(ways, *asked.adapter)
    found = [Place(way, quant) for way in get_args(Way) if way in ways and way != "trained" for quant in quants
             if not (way == "imatrix" and quant in FLOAT_QUANTS)
             and not (way != "imatrix" and quant in NEEDS_IMPORTANCE)]  # fmt: skip
    found += [Place("trained", quant) for quant in asked.adapters_for]
    if "base" not in ways:  # what the adapter has cost is seen beside it
        found.insert(0, Place("base", max(quants, key=_bits)))
    return tuple(found)


def _require_folder(ways: Sequence[str], adapter: Path, scale: float) -> None:
    """Torch computes an adapter's folder, at any scale; a base is patched with the whole of one."""
    if adapter.is_file() and (named := [way for way in ways if way in ("torch", "patched")]):
        raise ConfigError(
            what=f"--ways {named[0]}: {adapter} is a GGUF adapter",
            why="it was written for llama.cpp over the base as it is, and this way takes what it was exported from",
            fix="pass the adapter's folder",
        )
    if "patched" in ways and scale != 1.0:
        raise ConfigError(
            what=f"--ways patched: {adapter} at the scale {scale:g}",
            why="a base is patched with the whole adapter",
            fix="pass it without a scale, or --ways live, which computes it in torch at any",
        )


def require_there(asked: Asked) -> None:
    """Raise AdapterError where no adapter stands."""
    if asked.adapter is not None and not all(file.is_file() for file in adapter_files(asked.adapter[0])):
        raise AdapterError(
            what=f"{asked.adapter[0]}: no adapter here",
            why="an adapter is a folder with PEFT's two files, or the GGUF that was exported of one",
            fix="pass the folder that `edgelora train --out` wrote",
        )


def require_own_levels(asked: Asked, base: Base, live_for: Mapping[str, Live]) -> None:
    """An adapter that stands for a level must be one that llama.cpp runs there, and must have been trained over it,
    where it says what it was trained over."""
    for quant, folder in asked.adapters_for.items():
        if live_for[quant].way == "torch":
            raise ConfigError(
                what=f"--adapter-for {quant}={folder}: nothing of it is scored in llama.cpp",
                why=live_for[quant].why,
                fix=f"pass it as --adapter {folder} --quants {quant}: torch computes it over that very file",
            )
        contract = read_checked(folder, base, allow_unverified=True, may_wait=True, with_rows=True).contract
        if contract is not None and contract.base_file.quant != quant:
            raise ConfigError(
                what=f"--adapter-for {quant}={folder}: it was trained over {contract.base_file.name}",
                why=f"that is {contract.base_file.quant}, and this way is for adapters of that very level",
                fix=f"pass it as --adapter, or as --adapter-for {contract.base_file.quant}={folder}",
            )


def _bits(quant: str) -> int:
    """`Q4_K_M` → 4."""
    found = re.search(r"\d+", quant)
    return int(found[0]) if found else 0
