"""A base → one GGUF in F32, F16 or BF16, streamed tensor by tensor: what llama.cpp needs to run a checkpoint.

Names, order of rows, shifted norms and metadata come from the rows of `architectures/`; the vocabulary from `data/`.
What llama.cpp would load and run wrongly is refused with the reason. Imports no torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
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

LARGEST_CARD = 1 << 20
ELEMENTS_AT_ONCE = 1 << 20  # floats alive while a tensor goes from one type to another

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
            writer.write_tensor_data(_tensor(base, name, target))
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


def _tensor(base: Base, name: str, target: Target) -> np.ndarray:
    """A tensor of the file, uint8 (rows, bytes per row). Besides it, only a few rows at a time are in memory."""
    columns = target.shape[-1]
    rows = np.empty((int(np.prod(target.shape)) // columns, ggml.row_bytes(target.kind, columns)), np.uint8)
    height = len(rows) // len(target.sources)
    for i, source in enumerate(target.sources):
        _fill(rows[i * height : (i + 1) * height], base, source, target.kind, name)
    return rows


def _fill(out: np.ndarray, base: Base, source: str, kind: Type, name: str) -> None:
    """Write the HF tensor `source` into `out`, uint8 (rows, bytes per row), in GGUF's order of rows."""
    order = gguf_row_order(base.architecture, base.config, source.rpartition(".")[0])
    if len(out) == 1 and kind == Type.F32:  # a norm or a bias
        values = base.tensors.vector(source)
        out[0] = np.ascontiguousarray(values if order is None else values[order]).view(np.uint8)
        return
    stored = base.tensors.matrix(source)
    step = max(1, ELEMENTS_AT_ONCE // stored.columns)
    for first in range(0, len(out), step):
        part = slice(first, first + step)
        rows = stored.rows[part if order is None else order[part]]
        out[part] = _cast(ggml.dequantize(rows, stored.kind, stored.columns), kind, name)


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


def _about(base: Base, elements: int) -> gguf.Metadata:
    """Whose model this is: from the checkpoint's model card, or from the GGUF's own `general.*`.

    gguf-py reads cards but does not check them: of a stranger's card only texts and lists of texts are kept, and a card
    that cannot be read says nothing.
    """
    if base.is_gguf:
        texts = {key.removeprefix("general."): value.data for key, value in base.file.metadata.items()}
        return gguf.Metadata(**{f.name: texts[f.name] for f in fields(gguf.Metadata) if _is_text(texts.get(f.name))})
    card = base.path / "README.md"
    if card.is_file() and card.stat().st_size > LARGEST_CARD:
        return gguf.Metadata()
    try:
        about = gguf.Metadata.load(None, base.path, None, elements)
    except Exception:  # YAML, encodings and types of anybody's making
        return gguf.Metadata()
    kept = {f.name: value for f in fields(about) if _is_text(value := getattr(about, f.name))}
    return gguf.Metadata(**kept)


def _is_text(value: object) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list) and bool(value) and all(isinstance(v, str) for v in value)
    )


def _name(name: str, strips_after_special: bool) -> str:
    """A name from which llama.cpp reads the right treatment of special tokens: it knows Phi-3 by nothing else."""
    if strips_after_special == name_strips_after_special(name):
        return name
    return f"{name} (Phi-3)" if strips_after_special else re.sub(r"(?i)(phi)-?3", r"\1 3", name)


def _write_metadata(writer: gguf.GGUFWriter, base: Base, dtype: str) -> None:
    elements = sum(int(np.prod(shape)) for shape in tensor_shapes(base.architecture, base.config).values())
    writer.add_type(gguf.GGUFType.MODEL)
    about = _about(base, elements)
    about.name = _name(about.name or base.path.resolve().stem, base.vocabulary.strip_after_special)
    about.size_label = about.size_label or gguf.size_label(elements, 0, 0, 0)
    about.set_gguf_meta_model(writer)
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
