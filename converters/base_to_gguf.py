"""A base → one GGUF in F32, F16 or BF16, streamed tensor by tensor: what llama.cpp needs to run a checkpoint.

Names, order of rows, shifted norms and metadata come from the rows of `architectures/`; the vocabulary from `data/`.
What llama.cpp would load and run wrongly is refused with the reason. Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

from edgelora.architectures.metadata import context_in_llama_cpp, gguf_extra_tensors, gguf_metadata, unlike_llama_cpp
from edgelora.architectures.names import gguf_place, gguf_row_order, is_norm, tensor_shapes
from edgelora.base import ggml
from edgelora.base.model import Base
from edgelora.data.vocabulary import name_strips_after_special
from edgelora.errors import ConfigError, ExportError
from edgelora.files.contract import CERTIFICATE_BYTES, CERTIFICATE_KEY, LINEAGE_KEY, lineage_text
from edgelora.files.gguf import reserve
from edgelora.progress import OnProgress, Pace, Progress, silent

Type = GGMLQuantizationType

FILE_TYPES = {
    "F32": LlamaFileType.ALL_F32, "F16": LlamaFileType.MOSTLY_F16, "BF16": LlamaFileType.MOSTLY_BF16,
}  # fmt: skip


@dataclass(frozen=True)
class Target:
    """A tensor of the file to be: its shape, its type, and the HF tensors that become it (several: stacked experts)."""

    shape: tuple[int, ...]
    kind: Type
    sources: list[str]


def refuse_unlike(base: Base) -> None:
    """Raise ExportError if llama.cpp would load this base and compute something else."""
    faults = unlike_llama_cpp(base.architecture, base.config)
    if faults:
        raise ExportError(
            what=f"{base.path}: llama.cpp would compute otherwise {'; '.join(faults)}",
            why="a file that loads and answers wrongly is worse than none",
            fix="train and score it in torch, or use another base for llama.cpp",
        )


def shortened_context(base: Base) -> tuple[int, int] | None:
    """(context written, context of the model) where llama.cpp computes something else beyond it."""
    written, full = context_in_llama_cpp(base.architecture, base.config), base.config.max_position_embeddings
    return (written, full) if written < full else None


def write_base_gguf(out: Path, base: Base, dtype: str = "F16", on_progress: OnProgress = silent) -> None:
    """Write `base` to `out` (a staged path). Norms, biases and routers stay F32.

    Raises ConfigError for an unknown `dtype`; ExportError, naming the tensor, if a weight does not fit into it, and for
    what llama.cpp would compute otherwise; BaseModelError for a tokenizer that is not known.
    """
    if dtype not in FILE_TYPES:
        raise ConfigError(
            what=f"{dtype}: a base is not written as this",
            why="a converted base keeps its weights as floats; smaller files are made from it",
            fix=f"choose one of {', '.join(FILE_TYPES)}, then `edgelora quantize`",
        )
    refuse_unlike(base)
    writer = gguf.GGUFWriter(out, base.architecture.gguf_name)
    _write_metadata(writer, base, dtype)
    extra = gguf_extra_tensors(base.config)
    targets = plan(base, GGMLQuantizationType[dtype])
    for name, values in extra.items():
        writer.add_tensor_info(name, values.shape, np.dtype(np.float32), values.nbytes, Type.F32)
    for name, target in targets.items():
        block, block_bytes = GGML_QUANT_SIZES[target.kind]
        n_bytes = int(np.prod(target.shape)) // block * block_bytes
        writer.add_tensor_info(name, target.shape, np.dtype(np.float32), n_bytes, target.kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for values in extra.values():
            writer.write_tensor_data(values)
        pace = Pace(len(targets))
        for name, target in targets.items():
            writer.write_tensor_data(np.concatenate(list(_rows(base, name, target))))
            _, eta = pace.step(0)
            on_progress(Progress("convert", pace.done, pace.total, eta_s=eta))
    finally:
        writer.close()


def plan(base: Base, kind: Type) -> dict[str, Target]:
    """Every tensor of the file by its GGUF name, matrices as `kind`."""
    architecture, config = base.architecture, base.config
    router = architecture.experts.router if architecture.experts else None
    targets: dict[str, Target] = {}
    for name, shape in tensor_shapes(architecture, config, base.biased).items():
        place = gguf_place(architecture, config, name)
        floats = len(shape) == 1 or is_norm(name) or (router is not None and name.endswith(f".{router}.weight"))
        if place.expert is None:
            targets[place.name] = Target(shape, Type.F32 if floats else kind, [name])
        else:
            stacked = targets.setdefault(place.name, Target((config.num_experts, *shape), kind, []))
            stacked.sources.append(name)
    return targets


def _rows(base: Base, name: str, target: Target) -> Iterator[np.ndarray]:
    """The rows of a tensor of the file, uint8 (n, bytes per row), source after source."""
    for source in target.sources:
        if len(target.shape) == 1:
            values = base.tensors.vector(source)[None]
        else:
            stored = base.tensors.matrix(source)
            values = stored.floats()
        module = source.rpartition(".")[0]
        order = gguf_row_order(base.architecture, base.config, module)
        if order is not None:
            values = values[:, order] if len(target.shape) == 1 else values[order]
        yield _cast(values, target.kind, name)


def _cast(values: np.ndarray, kind: Type, name: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        cast = ggml.quantize(values, kind)
    if kind == Type.F16 and not np.isfinite(cast.view(np.float16)).all():
        finite = np.isfinite(values).all()
        raise ExportError(
            what=f"{name}: a weight {'does not fit into F16' if finite else 'is not a number'}",
            why=f"F16 ends at 65504, the largest weight is {np.abs(values).max():.3g}",
            fix="convert to BF16 or F32" if finite else "download the checkpoint again",
        )
    return cast


def _name(name: str, strips_after_special: bool) -> str:
    """A name from which llama.cpp reads the right treatment of special tokens: it knows Phi-3 by nothing else."""
    if strips_after_special == name_strips_after_special(name):
        return name
    return f"{name} (Phi-3)" if strips_after_special else re.sub(r"(?i)(phi)-?3", r"\1 3", name)


def _write_metadata(writer: gguf.GGUFWriter, base: Base, dtype: str) -> None:
    folder = base.path if base.path.is_dir() else None
    elements = sum(int(np.prod(shape)) for shape in tensor_shapes(base.architecture, base.config).values())
    writer.add_type(gguf.GGUFType.MODEL)
    about = gguf.Metadata.load(None, folder, None, elements)
    about.name = _name(about.name or base.path.stem, base.vocabulary.strip_after_special)
    about.set_gguf_meta_model(writer)
    if about.size_label is None:
        writer.add_size_label(gguf.size_label(elements, 0, 0, 0))
    writer.add_file_type(FILE_TYPES[dtype])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in gguf_metadata(base.architecture, base.config).items():
        match value:
            case list():
                writer.add_array(key, value)
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_uint32(key, value)
            case float():
                writer.add_float32(key, value)
            case str():
                writer.add_string(key, value)
    writer.add_string(CERTIFICATE_KEY, reserve(CERTIFICATE_BYTES))
    if base.lineage:
        writer.add_string(LINEAGE_KEY, lineage_text(base.lineage))
    base.vocabulary.add_to(writer)
    if base.template_source is not None:
        writer.add_chat_template(base.template_source)
