"""What a file's header says of a model, held to what this decoder computes: every fault at once. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from edgelora.architectures import ARCHITECTURES, Architecture, ModelConfig, family_of_gguf
from edgelora.architectures.metadata import unlike_llama_cpp
from edgelora.architectures.names import gguf_place, tensor_shapes
from edgelora.architectures.rope import FREQUENCIES, LONG, SHORT
from edgelora.base import ggml
from edgelora.base.tensors import CheckpointTensors, GGUFTensors, Tensors
from edgelora.errors import BaseModelError, some
from edgelora.files.checkpoint import Checkpoint
from edgelora.files.gguf import GGUFFile

FLOATS = {kind.name for kind in ggml.FLOATS}


class Header(NamedTuple):
    """What is known of a model without a weight. `biased`: the matrices of a layer that have a bias."""

    architecture: Architecture
    config: ModelConfig
    tensors: Tensors
    biased: tuple[str, ...]


def is_an_adapter(path: Path) -> BaseModelError:
    """The error where a base was to be, and an adapter is."""
    return BaseModelError(
        what=f"{path}: this is an adapter, not a base model",
        why="an adapter holds only what was learned, and runs over the base that it was trained on",
        fix="pass that base first, and the adapter where the command asks for one",
    )


def read_gguf(file: GGUFFile) -> Header:
    """Of a GGUF. Raises BaseModelError if it is no model that is computed here, or llama.cpp would compute another."""
    if file.get("general.type", str, "model") == "adapter":
        raise is_an_adapter(file.path)
    architecture = family_of_gguf(file)
    if architecture is None:
        known = sorted({row.gguf_name for row in ARCHITECTURES.values()})
        raise _unknown(file.path, file.architecture, known)
    config = architecture.read_gguf(file)
    if faults := unlike_llama_cpp(architecture, config):
        raise BaseModelError(
            what=f"{file.path}: llama.cpp computes otherwise {'; '.join(faults)}",
            why="training and running would not be of one model",
            fix="download or convert the model again",
        )
    biased = tuple(
        name for name in architecture.layer_matrices(config)
        if gguf_place(architecture, config, f"model.layers.0.{name}.bias").name in file.tensors
    )  # fmt: skip
    tensors = GGUFTensors(file, architecture, config)
    _check_tensors(file.path, tensors.shapes(), _gguf_shapes(architecture, config, biased))
    if odd := sorted({info.type.name for info in file.tensors.values() if not ggml.is_readable(info.type)}):
        raise BaseModelError(
            what=f"{file.path}: weights of type {', '.join(odd)}",
            why="a model's weights are floats, or blocks that ggml turns into floats",
            fix="download or convert the model again",
        )
    return Header(architecture, config, tensors, biased)


def _gguf_shapes(
    architecture: Architecture, config: ModelConfig, biased: tuple[str, ...]
) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that the GGUF of such a model holds, by its name there."""
    expected: dict[str, tuple[int, ...]] = {}
    for name, shape in tensor_shapes(architecture, config, biased).items():
        place = gguf_place(architecture, config, name)
        expected[place.name] = shape if place.expert is None else (config.num_experts, *shape)
    used = {"llama3": (FREQUENCIES,), "longrope": (SHORT, LONG)}.get(config.rope.scaling, ())
    return expected | dict.fromkeys(used, (config.rope.dim // 2,))


def read_checkpoint(checkpoint: Checkpoint) -> Header:
    """Of a checkpoint. Raises BaseModelError if it is no model that is computed here, or its weights are no floats."""
    architecture = _family(checkpoint)
    config = architecture.read_hf(checkpoint.config)
    if config.num_hidden_layers > len(checkpoint.tensors):
        raise BaseModelError(
            what=f"{checkpoint.path}: it claims {config.num_hidden_layers} layers and holds {len(checkpoint.tensors)} "
            "tensors",
            why="config.json and the tensors do not fit together",
            fix="download the checkpoint again",
        )
    tensors = CheckpointTensors(checkpoint, architecture)
    biased = tuple(
        name for name in architecture.layer_matrices(config) if f"model.layers.0.{name}.bias" in checkpoint.tensors
    )
    expected = tensor_shapes(architecture, config, biased)
    ignored = {name for name in checkpoint.tensors if name.endswith("rotary_emb.inv_freq")}  # a table, made anew here
    if config.tie_word_embeddings:
        ignored.add("lm_head.weight")
    shapes = {name: shape for name, shape in tensors.shapes().items() if name not in ignored}
    _check_tensors(checkpoint.path, shapes, expected)
    odd = sorted({t.dtype for name, t in checkpoint.tensors.items() if name in expected} - FLOATS)
    if odd:
        raise BaseModelError(
            what=f"{checkpoint.path}: weights of type {', '.join(odd)}",
            why="a checkpoint to train over holds float32, float16 or bfloat16",
            fix="use the original checkpoint, or a GGUF file",
        )
    return Header(architecture, config, tensors, biased)


def _family(checkpoint: Checkpoint) -> Architecture:
    """Raises BaseModelError if it is of none that is computed here, sees or hears as well, or is quantized."""
    kind = str(checkpoint.config.get("model_type"))
    if isinstance(checkpoint.config.get("text_config"), dict):
        raise BaseModelError(
            what=f"{checkpoint.path}: a model of the kind {kind} that sees pictures or hears (text_config)",
            why="its language model stands under other names, which edgelora does not read from a checkpoint yet",
            fix="use the GGUF of its language model, or a checkpoint of the text model alone",
        )
    architecture = ARCHITECTURES.get(kind)
    if architecture is None:
        raise _unknown(checkpoint.path, kind, sorted(ARCHITECTURES))
    if checkpoint.config.get("quantization_config"):
        raise BaseModelError(
            what=f"{checkpoint.path}: a checkpoint that is quantized already (quantization_config)",
            why="its weights are stored in a way of their own, which edgelora does not read",
            fix="use the original checkpoint in bfloat16 or float16, or a GGUF file",
        )
    return architecture


def _unknown(path: Path, found: str, known: list[str]) -> BaseModelError:
    return BaseModelError(
        what=f"{path}: a model of the architecture {found or '(none stated)'}",
        why=f"edgelora computes {', '.join(known)}, and guesses at no other",
        fix="use a model of one of these families, such as SmolLM2-135M-Instruct",
    )


def _check_tensors(path: Path, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """All tensors that the decoder needs are there with the right shapes, and no others; every fault at once."""
    faults = [
        f"{name} is {found[name]}, expected {shape}" if name in found else f"{name} is missing"
        for name, shape in expected.items()
        if found.get(name) != shape
    ]
    faults += [f"{name} has no place in this decoder" for name in found if name not in expected]
    if faults:
        raise BaseModelError(
            what=f"{path}: {some(faults, 5)}",
            why="these are not the tensors that its metadata describes, or edgelora does not compute them yet",
            fix="download or convert the model again",
        )
