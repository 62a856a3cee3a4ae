"""Base + adapters → one merged GGUF of any types, in one pass and a few rows at a time. Imports no torch.

Each weight is dequantized, W + Σ s · ΔW is computed in float32 (every ΔW over the base's own W), and ggml's kernels
quantize it to its planned type. Nothing is rounded in between: llama.cpp's tools merge into F16 and quantize that, so
theirs differ from these by that rounding; with nothing to add, over an F32 file, both write the same blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np
from gguf.constants import GGMLQuantizationType, LlamaFileType

from converters.adapted import Deltas, added_biases, of_gguf, require_biases
from converters.base_to_gguf import Slab, Target, plan, slabs
from converters.in_range import in_range
from converters.metadata import PARENTS, QUANTIZED_BY, copy_metadata, descent, put, write_metadata
from converters.stream import Entry, write_streamed
from edgelora.base.model import Base
from edgelora.files.certificate_keys import reserved
from edgelora.files.contract import CONTRACT_KEY, LINEAGE_KEY, lineage_text
from edgelora.peft.adapter import Adapter
from edgelora.progress import OnProgress, silent

Type = GGMLQuantizationType

# What a merge states itself, or what was true of the base's own quantization.
NOT_COPIED = (QUANTIZED_BY, "quantize.imatrix.", "split.", "edgelora.", PARENTS)


@dataclass(frozen=True)
class Part:
    """An adapter to merge: how strongly, the digest that names it in the result's lineage, and what people call it.

    At the scale 0 it adds nothing, and the result says nothing of it.
    """

    adapter: Adapter
    scale: float
    digest: str
    name: str


@dataclass(frozen=True)
class Recipe:
    """What to merge, and what it becomes."""

    base: Base
    parts: Sequence[Part]
    types: Mapping[str, Type]
    """Of every tensor of the file."""
    file_type: LlamaFileType | int | None
    keys: Mapping[str, str | float] = field(default_factory=dict)
    """Metadata to add."""
    importance: Mapping[str, np.ndarray] = field(default_factory=dict)
    """By tensor, float32 (n_matrices * columns,): the mean squared activation of each column."""
    patched: bool = False
    """Whether it is a patched base, over which a part of the adapter may yet have to lie."""


def write_merged(out: Path, recipe: Recipe, on_progress: OnProgress = silent) -> None:
    """Write the merged model to `out` (a staged path), with a reserved place for the certificate.

    Raises ExportError, naming the tensor, if a merged weight does not fit into its type, or needs importance; and for
    a bias that llama.cpp does not load.
    """
    base, added = recipe.base, new_biases(recipe.base, recipe.parts)
    targets, types = targets_of(base) | added, {**recipe.types, **{name: entry.kind for name, entry in added.items()}}
    writer = gguf.GGUFWriter(out, base.architecture.gguf_name)
    describe(writer, recipe)
    for name in base.source.tensors:  # the fingerprint read some rows of each
        base.source.forget(name)
    deltas = Deltas([(of_gguf(part.adapter, base), part.scale) for part in recipe.parts])

    def rows_of(name: str) -> Iterator[np.ndarray]:
        if name in added:
            zeros = Slab(0, 0, np.zeros((1, *added[name].shape), np.float32))
            yield quantized(deltas.merged(name, zeros), types[name], name)
            return
        if name not in deltas.touched and targets[name].kind == types[name] and base.is_gguf:
            yield base.file.rows(name)
            base.file.forget(name)
            return
        for slab in slabs(base, name, targets[name]):
            yield quantized(deltas.merged(name, slab), types[name], name, _of_matrix(recipe, name, slab))

    write_streamed(writer, entries_of(base, types) | added, rows_of, "merge", on_progress)


def new_biases(base: Base, parts: Sequence[Part]) -> dict[str, Target]:
    """The biases that the result has and the base has not, by their GGUF names.

    Raises ExportError if llama.cpp does not load one.
    """
    added = added_biases(base, [part.adapter for part in parts if part.scale])
    require_biases(base, added)
    names = {module: f"{base.tensor_of(module).removesuffix('.weight')}.bias" for module in added}
    return {name: Target((base.linears[module][0],), Type.F32) for module, name in names.items()}


def targets_of(base: Base) -> dict[str, Target]:
    """Every tensor of the base as a GGUF holds it: of a GGUF its own types, of a checkpoint F16."""
    if base.is_gguf:
        return {name: Target(info.shape, info.type) for name, info in base.file.tensors.items()}
    return plan(base, Type.F16)


def entries_of(base: Base, types: Mapping[str, Type]) -> dict[str, Entry]:
    """Every tensor of the file to be."""
    return {name: Entry(target.shape, types[name]) for name, target in targets_of(base).items()}


def float_types(base: Base, kind: Type) -> dict[str, Type]:
    """Matrices as `kind`: F32, F16 or BF16, vectors as F32, routers as they are. Needs no plan of llama.cpp's."""
    if not base.is_gguf:
        return {name: target.kind for name, target in plan(base, kind).items()}
    types = {}
    for name, info in base.file.tensors.items():
        router = name.endswith("ffn_gate_inp.weight")
        types[name] = Type.F32 if len(info.shape) == 1 else info.type if router else kind
    return types


def quantized(weights: np.ndarray, kind: Type, name: str, importance: np.ndarray | None = None) -> np.ndarray:
    """Merged float32 (n, columns) as rows of `kind`. Raises ExportError if a weight does not fit into it."""
    fix = "merge at a smaller scale (--adapter FOLDER:0.5), or run the adapter live instead"
    return in_range(f"{name}: a merged weight", weights, kind, importance, fix=fix)


def _of_matrix(recipe: Recipe, name: str, slab: Slab) -> np.ndarray | None:
    """The importance of the columns of one matrix, None if nothing is known of them."""
    known = recipe.importance.get(name)
    return None if known is None else known.reshape(-1, slab.floats.shape[1])[slab.matrix]


def lineage_of(base: Base, parts: Sequence[Part], patched: bool = False) -> list[str]:
    """What was merged into these weights, in order: digests and scales, and whether it was a patch."""
    how = ":patched" if patched else ""
    return [*base.lineage, *(f"{part.digest}:{part.scale:g}{how}" for part in parts if part.scale)]


def describe(writer: gguf.GGUFWriter, recipe: Recipe) -> None:
    """Tell what the result is, whose child, and what went into it, with a reserved place for the certificate."""
    base, parts = recipe.base, [part for part in recipe.parts if part.scale]
    if base.is_gguf:
        stays = {key for key in base.file.metadata if not key.startswith(NOT_COPIED)}
        copy_metadata(base.file, writer, leave_out=base.file.metadata.keys() - stays)
        put(writer, {**({} if recipe.file_type is None else {"general.file_type": recipe.file_type}), **reserved()})
        if base.chosen_template is not None:
            writer.add_chat_template(base.chosen_template)
    else:
        assert isinstance(recipe.file_type, LlamaFileType)
        write_metadata(writer, base, recipe.file_type)
    put(writer, {
        **descent(base, [part.name for part in parts]),
        LINEAGE_KEY: lineage_text(lineage_of(base, parts, recipe.patched)),
        **recipe.keys,
    })  # fmt: skip
    contract = next((p.adapter.contract for p in parts if p.adapter.contract is not None), None)
    if contract is not None:
        put(writer, {CONTRACT_KEY: contract.model_copy(update={"certificate": None}).model_dump_json()})
