"""What a GGUF says of its model: copied from the GGUF it was, or told of a checkpoint. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import fields
from typing import Any

import gguf
import numpy as np
from gguf.constants import GGUFValueType, LlamaFileType

from edgelora.architectures.metadata import gguf_metadata
from edgelora.architectures.names import tensor_shapes
from edgelora.base.model import Base
from edgelora.data.vocabulary import name_strips_after_special
from edgelora.files.certificate_keys import reserved
from edgelora.files.contract import CONTRACT_KEY, LINEAGE_KEY, Contract, lineage_text
from edgelora.files.gguf import GGUFFile, Strings, Value

# The writer states these itself; it always aligns to 32 bytes.
WRITERS_OWN = ("general.architecture", "general.alignment")
LARGEST_CARD = 1 << 20
NAME, PARENTS, QUANTIZED_BY = "general.name", "general.base_model.", "general.quantized_by"


def copy_metadata(file: GGUFFile, writer: gguf.GGUFWriter, leave_out: Container[str] = ()) -> None:
    """Every key but those of `leave_out`, in the file's order."""
    for key, value in file.metadata.items():
        empty = value.type == GGUFValueType.ARRAY and not len(value.data)  # the writer cannot write one
        if key not in WRITERS_OWN and key not in leave_out and not empty:
            writer.add_key_value(key, _plain(value), value.type, value.item)


def _plain(value: Value) -> Any:
    if value.type != GGUFValueType.ARRAY:
        return value.data
    if isinstance(value.data, Strings):
        return [value.data.raw(i) for i in range(len(value.data))]
    return value.data.tolist()


def put(writer: gguf.GGUFWriter, keys: Mapping[str, Any]) -> None:
    """Add texts, numbers, yes or no, and lists; what stood under these keys before is replaced."""
    for key, value in keys.items():
        writer.kv_data[0].pop(key, None)  # the writer would log a warning
        match value:
            case str():
                writer.add_string(key, value)
            case list():
                writer.add_array(key, value)
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_uint32(key, value)
            case float():
                writer.add_float32(key, value)


def put_contract(writer: gguf.GGUFWriter, contract: Contract | None) -> None:
    """Add an adapter's contract, if it has one, and room for the certificate that it will get."""
    if contract is not None:
        unsigned = contract.model_copy(update={"certificate": None})
        put(writer, {CONTRACT_KEY: unsigned.model_dump_json(), **reserved(model=False)})


def write_whole(writer: gguf.GGUFWriter) -> None:
    """Write all that was added, tensors included, and close the file."""
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def descent(base: Base, added: Sequence[str]) -> dict[str, str | float]:
    """How a model made of `base` and what was `added` to it states its own name, and whose child it is."""
    own = _about(base, 0)
    parent = own.name or base.path.resolve().stem
    name = _name(" + ".join([parent, *added]), base.vocabulary.strip_after_special)
    told: dict[str, str | None] = {"name": parent, "organization": own.organization, "repo_url": own.repo_url}
    keys: dict[str, str | float] = {NAME: name, f"{PARENTS}count": 1}
    return keys | {f"{PARENTS}0.{key}": text for key, text in told.items() if text}


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


def write_metadata(writer: gguf.GGUFWriter, base: Base, file_type: LlamaFileType) -> None:
    """Tell all that llama.cpp needs to know of a model, with a reserved place for the certificate."""
    elements = sum(int(np.prod(shape)) for shape in tensor_shapes(base.architecture, base.config).values())
    writer.add_type(gguf.GGUFType.MODEL)
    about = _about(base, elements)
    about.name = _name(about.name or base.path.resolve().stem, base.vocabulary.strip_after_special)
    about.size_label = about.size_label or gguf.size_label(elements, 0, 0, 0)
    about.set_gguf_meta_model(writer)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    write_dimensions(writer, base)
    put(writer, reserved())
    if base.lineage:
        writer.add_string(LINEAGE_KEY, lineage_text(base.lineage))
    base.vocabulary.add_to(writer)
    if base.template_source is not None:
        writer.add_chat_template(base.template_source)


def write_dimensions(writer: gguf.GGUFWriter, base: Base) -> None:
    """Tell what the model computes, in numbers."""
    put(writer, gguf_metadata(base.architecture, base.config))
