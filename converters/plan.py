"""The type of every tensor before anything is written: what llama.cpp chooses, as a plan to read, edit and use again.

`plan_types` asks llama.cpp itself, by a dry run of `llama_model_quantize` in a child process. A header-only GGUF that
is extended sparsely to its size gives the same plan: no tensor is read.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from converters.file_size import data_bytes, header_bytes
from converters.plan_check import check_options
from converters.quant_types import QUANT_TYPES, parse_tensor_type, tensor_bytes
from converters.quantize import dry_run
from edgelora.errors import ConfigError, ExportError, FileFormatError, some
from edgelora.files.atomic import write_text
from edgelora.files.gguf import TensorInfo
from edgelora.files.split import open_gguf

Type = GGMLQuantizationType

# `[   1/ 272] token_embd.weight - [   576,  49152,      1,      1], type =    f16, size = … -> … MiB (q8_0)`
_TENSOR = re.compile(
    r"\[ *\d+/ *\d+\] (?P<name>.+?) +- \[[\d, ]+\], type = +(?P<source>\w+), size = .*?(\((?P<type>\w+)\))?"
)
# `warning: blk.0.attn_q.weight - ncols    576 not divisible by 256 (required for type    q4_K) -> falling back to …`
_FALLBACK = re.compile(r"warning: (?P<name>.+?) +- ncols .*\(required for type +(?P<type>\w+)\).*")

_ABOUT = """\
# The type of each tensor of a quantized model: edit `type` (such as "Q6_K"), then `edgelora quantize … --plan FILE`.
# `from` is the type in the source, `wanted` what the recipe would have taken if rows divided into its blocks.
"""


@dataclass(frozen=True)
class QuantizeOptions:
    """What llama_model_quantize is asked for, by llama-quantize's names."""

    kind: str
    """One of QUANT_TYPES."""
    tensor_types: tuple[tuple[str, str], ...] = ()
    """(regular expression, type): the first that is found in a tensor's name decides. ECMAScript; case matters."""
    output_type: str | None = None
    """Of output.weight; where that is tied, of token_embd.weight."""
    embedding_type: str | None = None
    pure: bool = False
    """Every tensor the recipe's main type."""
    keep_split: bool = False
    imatrix: Mapping[str, np.ndarray] | None = None
    """By tensor name, float32 (n_matrices * columns,): the mean squared activation of each column."""
    threads: int = 1


@dataclass(frozen=True)
class TensorPlan:
    """One tensor: `shape` in numpy's order (rows…, columns), its type in the source, and the type it gets."""

    name: str
    shape: tuple[int, ...]
    source: Type
    type: Type
    wanted: Type | None = None
    """What it fell back from, because its rows do not divide into blocks of that."""

    @property
    def size_bytes(self) -> int:
        """In the type that it gets."""
        return tensor_bytes(self.shape, self.type)


@dataclass(frozen=True)
class Plan:
    """What a file of type `kind` will hold, its tensors in the order in which llama.cpp writes them."""

    kind: str
    tensors: tuple[TensorPlan, ...]
    header_bytes: int

    @property
    def types(self) -> dict[str, Type]:
        return {tensor.name: tensor.type for tensor in self.tensors}

    @property
    def size_bytes(self) -> int:
        """Of the tensors alone."""
        return sum(tensor.size_bytes for tensor in self.tensors)

    @property
    def file_bytes(self) -> int:
        """Of the whole file."""
        return self.header_bytes + data_bytes(tensor.size_bytes for tensor in self.tensors)

    @property
    def notes(self) -> list[str]:
        """A line on what fell back: `180 of 272 tensors have rows of 576, no multiple of 256: Q4_K → Q5_0 (152) …`."""
        fallen = [(t, t.wanted) for t in self.tensors if t.wanted is not None]
        if not fallen:
            return []
        columns = sorted({t.shape[-1] for t, _ in fallen})
        blocks = sorted({GGML_QUANT_SIZES[wanted][0] for _, wanted in fallen})
        pairs = Counter((wanted.name, t.type.name) for t, wanted in fallen)
        moves = ", ".join(f"{wanted} → {kind} ({n})" for (wanted, kind), n in pairs.most_common())
        return [
            f"{len(fallen)} of {len(self.tensors)} tensors {'has' if len(fallen) == 1 else 'have'} rows of "
            f"{_either(columns)}, no multiple of {_either(blocks)}: {moves}"
        ]

    def by_type(self) -> dict[Type, tuple[int, int, int]]:
        """(tensors, weights, bytes) of each type, the largest share first."""
        found: dict[Type, tuple[int, int, int]] = {}
        for t in self.tensors:
            n, weights, size = found.get(t.type, (0, 0, 0))
            found[t.type] = n + 1, weights + prod(t.shape), size + t.size_bytes
        return dict(sorted(found.items(), key=lambda entry: -entry[1][2]))

    def with_types(self, types: Mapping[str, Type]) -> Plan:
        """This plan with other types for some tensors. Raises KeyError for a tensor that it does not have."""
        if strangers := types.keys() - self.types.keys():
            raise KeyError(*sorted(strangers))
        tensors = (
            replace(t, type=types[t.name], wanted=None) if types.get(t.name, t.type) != t.type else t
            for t in self.tensors
        )
        return replace(self, tensors=tuple(tensors))


def plan_types(source: Path, options: QuantizeOptions, keys: Mapping[str, str | float] | None = None) -> Plan:
    """What llama.cpp would make of `source`, which need not hold more than its header and the right length.

    keys: metadata that will be added to the file; they count in its size.
    Raises ConfigError for options that cannot be, ExportError with llama.cpp's last words.
    """
    file = open_gguf(source)
    check_options(options, file.tensors)
    tensors = tuple(_planned(dry_run(file.path, options), file.tensors))
    if {t.name for t in tensors} != file.tensors.keys():
        raise ExportError(
            what=f"{source}: llama.cpp planned {len(tensors)} of its {len(file.tensors)} tensors",
            why="this build of llama.cpp words its log otherwise than 0.3.36 does",
            fix="pip install llama-cpp-python==0.3.36",
        )
    shapes = {name: info.shape for name, info in file.tensors.items()}
    return Plan(options.kind.upper(), tensors, header_bytes(file.metadata, shapes, keys or {}))


def _planned(log: Sequence[str], tensors: Mapping[str, TensorInfo]) -> Iterator[TensorPlan]:
    wanted: dict[str, Type] = {}
    for line in log:
        if match := _FALLBACK.fullmatch(line):
            wanted[match["name"]] = _any_type(match["type"])
        elif (match := _TENSOR.fullmatch(line)) and match["name"] in tensors:
            source = _any_type(match["source"])
            kind = _any_type(match["type"]) if match["type"] else source
            yield TensorPlan(match["name"], tensors[match["name"]].shape, source, kind, wanted.get(match["name"]))


def _either(numbers: Iterable[int]) -> str:
    return " or ".join(map(str, numbers))


def write_plan(path: Path, plan: Plan, *, overwrite: bool = False) -> None:
    """Write `plan` as TOML, a line for each tensor."""
    lines = [_ABOUT, f"kind = {json.dumps(plan.kind)}", f"header_bytes = {plan.header_bytes}", "", "[tensors]"]
    for t in plan.tensors:
        wanted = "" if t.wanted is None else f', wanted = "{t.wanted.name}"'
        name = json.dumps(t.name, ensure_ascii=False)
        shape = json.dumps(t.shape)
        lines.append(f'{name} = {{ type = "{t.type.name}", from = "{t.source.name}", shape = {shape}{wanted} }}')
    write_text(path, "\n".join(lines) + "\n", overwrite=overwrite)


def read_plan(path: Path) -> Plan:
    """Read a plan that `write_plan` wrote and a person may have edited. Raises FileFormatError with all its faults."""
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise _no_plan(path, [str(e)]) from e
    faults, tensors = [], []
    if found.get("kind") not in QUANT_TYPES:
        faults.append(f"kind is {found.get('kind')!r}, which llama.cpp does not know")
    if not _is_count(found.get("header_bytes")):
        faults.append("header_bytes is missing")
    entries = found.get("tensors")
    if not isinstance(entries, dict) or not entries:
        faults.append("it names no tensors")
        entries = {}
    for name, entry in entries.items():
        try:
            tensors.append(_entry(name, entry))
        except ConfigError as e:
            faults.append(f"{name}: {e.what}")
        except (KeyError, TypeError, ValueError) as e:
            faults.append(f"{name}: {type(e).__name__} {e}")
    if faults:
        raise _no_plan(path, faults)
    return Plan(found["kind"], tuple(tensors), found["header_bytes"])


def _entry(name: str, entry: Any) -> TensorPlan:
    shape = tuple(entry["shape"])
    if not shape or not all(map(_is_count, shape)):
        raise ValueError(f"shape is {entry['shape']}")
    wanted = parse_tensor_type(entry["wanted"]) if "wanted" in entry else None
    kind = _any_type(entry["type"]) if entry["type"] == entry["from"] else parse_tensor_type(entry["type"])
    block = GGML_QUANT_SIZES[kind][0]
    if shape[-1] % block:
        raise ValueError(f"rows of {shape[-1]} do not divide into {kind.name} blocks of {block}")
    return TensorPlan(name, shape, _any_type(entry["from"]), kind, wanted)


def _any_type(name: str) -> Type:
    """A type that a source may have: not all of them can be quantized to."""
    return GGMLQuantizationType[name.upper()]


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _no_plan(path: Path, faults: Sequence[str]) -> FileFormatError:
    return FileFormatError(
        what=f"{path}: not a usable plan ({some(faults, 5)})",
        why="a plan is a TOML file with a line for each tensor, as --save-plan writes it",
        fix="write one with `edgelora quantize IN TYPE --dry-run --save-plan FILE`, and change its types only",
    )
