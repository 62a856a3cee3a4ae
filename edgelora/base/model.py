"""What a base model is before any weight is used: dimensions, tokenizer, template, fingerprint. Imports no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from gguf.constants import LlamaFileType

from edgelora.architectures import ARCHITECTURES, Architecture, ModelConfig, family_of_gguf
from edgelora.architectures.layers import Layers
from edgelora.architectures.metadata import context_in_llama_cpp, unlike_llama_cpp
from edgelora.architectures.names import gguf_place, tensor_shapes
from edgelora.architectures.rope import FREQUENCIES, LONG, SHORT
from edgelora.base import ggml
from edgelora.base.fingerprint import fingerprint
from edgelora.base.tensors import CheckpointTensors, GGUFTensors, Tensors
from edgelora.data.folder import folder_template, read_template
from edgelora.data.template import ChatTemplate, chatml
from edgelora.data.tokenizer import Tokenizer
from edgelora.data.vocabulary import Vocabulary, vocabulary_from_folder, vocabulary_from_gguf
from edgelora.errors import BaseModelError, ConfigError
from edgelora.files.checkpoint import Checkpoint
from edgelora.files.contract import BaseFile, Contract, Fingerprint, Identity, read_lineage, sha256_file, sha256_text
from edgelora.files.gguf import GGUFFile
from edgelora.files.split import open_gguf, whole_models

FLOAT_QUANTS = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Base:
    """An opened base model. Its weights stay in the file until `base/decoder.py` or a converter reads them.

    `biased` names the matrices of a layer that have a bias.
    """

    source: GGUFFile | Checkpoint
    architecture: Architecture
    config: ModelConfig
    tensors: Tensors
    biased: tuple[str, ...] = ()
    chosen_template: str | None = None
    """The chat template that somebody chose for a base that has none."""

    @property
    def path(self) -> Path:
        return self.source.path

    @property
    def is_gguf(self) -> bool:
        return isinstance(self.source, GGUFFile)

    @property
    def file(self) -> GGUFFile:
        """The GGUF that holds this base. Raises BaseModelError if it is a checkpoint."""
        if isinstance(self.source, GGUFFile):
            return self.source
        raise BaseModelError(
            what=f"{self.path}: a Hugging Face checkpoint, which llama.cpp cannot run",
            why="this step needs the base as llama.cpp sees it, in one GGUF file",
            fix=f"run `edgelora convert {self.path}` and pass the file it writes",
        )

    @property
    def context(self) -> int:
        """How many tokens llama.cpp may see before it computes something else than this model."""
        return context_in_llama_cpp(self.architecture, self.config)

    @cached_property
    def layers(self) -> Layers:
        """What of it adapters may change."""
        return Layers.of(self.architecture, self.config, self.biased)

    @property
    def linears(self) -> Mapping[str, tuple[int, int]]:
        """(d_out, d_in) of every linear layer that adapters attach to, by its full HF name."""
        return self.layers.linears

    @property
    def norms(self) -> Mapping[str, int]:
        """The width of every norm, by its full HF name."""
        return self.layers.norms

    @property
    def vocabularies(self) -> Mapping[str, tuple[int, int]]:
        """(V, d) of the embedding, and of the head where that is another matrix."""
        return self.layers.vocabularies

    @cached_property
    def vocabulary(self) -> Vocabulary:
        if isinstance(self.source, GGUFFile):
            return vocabulary_from_gguf(self.source)
        return vocabulary_from_folder(self.path)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer(self.vocabulary)

    @cached_property
    def own_template(self) -> str | None:
        """The text of the model's own chat template, None if it has none."""
        if isinstance(self.source, GGUFFile):
            text: str | None = self.source.get("tokenizer.chat_template", str)
        else:
            text = folder_template(self.path)
        return text if text and text.strip() else None

    @property
    def template_source(self) -> str | None:
        """The text of the chat template in use: the model's own, or the one chosen for it."""
        return self.own_template or self.chosen_template

    @cached_property
    def template(self) -> ChatTemplate:
        """The chat template. Raises BaseModelError if there is none, DataError if it does not parse."""
        if self.template_source is None:
            raise BaseModelError(
                what=f"{self.path}: it has no chat template",
                why="without one nobody knows how a conversation looks to this model",
                fix="pass --chat-template chatml where the command has it, or use an instruction-tuned model",
            )
        t = self.tokenizer
        return ChatTemplate(self.template_source, bos=t.text_of(t.bos_id), eos=t.text_of(t.eos_id))

    @cached_property
    def fingerprint(self) -> Fingerprint:
        return fingerprint(self.tensors, self.architecture, self.config, self.vocabulary.tokens, self.lineage)

    @cached_property
    def lineage(self) -> tuple[str, ...]:
        """What was merged into these weights, in order; empty for an original."""
        return read_lineage(self.source)

    @cached_property
    def template_sha256(self) -> str:
        return sha256_text(self.template_source or "")

    @cached_property
    def quant(self) -> str:
        """The quantization the file says it has: `Q4_1`, `Q4_K_M`, `F16` …"""
        return quant_of(self.source)

    @cached_property
    def base_file(self) -> BaseFile:
        digests = [sha256_file(path) for path in self.source.files]
        digest = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
        name = self.path.name if self.is_gguf else self.path.resolve().name
        return BaseFile(name=name, quant=self.quant, sha256=digest)

    @cached_property
    def identity(self) -> Identity:
        """What an adapter's contract is held to."""
        t = self.tokenizer
        return Identity(self.fingerprint, self.quant, t.sha256, self.template_sha256, t.eog_ids)

    def with_template(self, choice: str) -> Base:
        """This base speaking by `choice`: `chatml`, or the path of a Jinja file.

        Raises ConfigError if it has a template of its own, BaseModelError if there is no such file.
        """
        if self.own_template is not None:
            raise ConfigError(
                what=f"{self.path}: it has a chat template of its own",
                why="in another one it would see conversations that it was not trained on",
                fix="leave --chat-template out",
            )
        if choice == "chatml":
            return replace(self, chosen_template=chatml(self.tokenizer))
        return replace(self, chosen_template=read_template(Path(choice)))

    def as_trained(self, contract: Contract | None) -> Base:
        """This base with the chat template that an adapter was trained with, where it has none itself."""
        if contract is None or contract.chat_template is None or self.template_source is not None:
            return self
        return replace(self, chosen_template=contract.chat_template)

    def tensor_of(self, module: str) -> str:
        """The GGUF tensor that holds the weight of an HF module."""
        return gguf_place(self.architecture, self.config, f"{module}.weight").name


def quant_of(source: GGUFFile | Checkpoint) -> str:
    """The quantization that a model says it has: `Q4_1`, `Q4_K_M`, `F16` …"""
    if isinstance(source, GGUFFile):
        stated = source.get("general.file_type", int)
        if stated in LlamaFileType._value2member_map_:
            name = str(LlamaFileType(stated).name)
            return {"ALL_F32": "F32"}.get(name, name.removeprefix("MOSTLY_"))
        sizes = [(tensor.type.name, tensor.elements) for tensor in source.tensors.values()]
    else:
        sizes = [(tensor.dtype, tensor.size_bytes) for tensor in source.tensors.values()]
    # no statement: the type that most weights have
    return max({kind for kind, _ in sizes}, key=lambda kind: sum(n for k, n in sizes if k == kind))


def open_base(path: Path | str) -> Base:
    """Open a base model: a GGUF, whole or in parts, a folder that holds exactly one, or an HF folder of safetensors.

    Reads headers only. Raises BaseModelError or FileFormatError.
    """
    path = Path(path)
    if not path.is_dir():
        return _open_gguf(open_gguf(path))
    if (path / "adapter_config.json").exists():
        raise _is_an_adapter(path)
    found = whole_models(sorted(path.glob("*.gguf")))
    is_checkpoint = any((path / name).exists() for name in ("config.json", "model.safetensors.index.json"))
    if len(found) == 1 and not is_checkpoint:
        return _open_gguf(open_gguf(found[0]))
    if is_checkpoint and not found:
        return _open_checkpoint(Checkpoint(path))
    names = [file.name for file in found] + ["a checkpoint (config.json)"] * is_checkpoint
    raise BaseModelError(
        what=f"{path}: {len(names) or 'no'} model{'s' * (len(names) != 1)} in this folder",
        why="a base model is one .gguf file or a folder with config.json and safetensors; edgelora does not guess",
        fix=f"pass the path of one of {', '.join(file.name for file in found[:5])}"
        + (", or move these elsewhere to use the checkpoint" if is_checkpoint else "")
        if found
        else "pass the path of a model",
    )


def _is_an_adapter(path: Path) -> BaseModelError:
    return BaseModelError(
        what=f"{path}: this is an adapter, not a base model",
        why="an adapter holds only what was learned, and runs over the base that it was trained on",
        fix="pass that base first, and the adapter where the command asks for one",
    )


def _open_gguf(file: GGUFFile) -> Base:
    if file.get("general.type", str, "model") == "adapter":
        raise _is_an_adapter(file.path)
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
    expected: dict[str, tuple[int, ...]] = {}
    for name, shape in tensor_shapes(architecture, config, biased).items():
        place = gguf_place(architecture, config, name)
        expected[place.name] = shape if place.expert is None else (config.num_experts, *shape)
    used = {"llama3": (FREQUENCIES,), "longrope": (SHORT, LONG)}.get(config.rope.scaling, ())
    expected |= dict.fromkeys(used, (config.rope.dim // 2,))
    tensors = GGUFTensors(file, architecture, config)
    _check_tensors(file.path, tensors.shapes(), expected)
    if odd := sorted({info.type.name for info in file.tensors.values() if not ggml.is_readable(info.type)}):
        raise BaseModelError(
            what=f"{file.path}: weights of type {', '.join(odd)}",
            why="a model's weights are floats, or blocks that ggml turns into floats",
            fix="download or convert the model again",
        )
    return Base(file, architecture, config, tensors, biased)


def _open_checkpoint(checkpoint: Checkpoint) -> Base:
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
    odd = sorted({t.dtype for name, t in checkpoint.tensors.items() if name in expected} - set(FLOAT_QUANTS))
    if odd:
        raise BaseModelError(
            what=f"{checkpoint.path}: weights of type {', '.join(odd)}",
            why="a checkpoint to train over holds float32, float16 or bfloat16",
            fix="use the original checkpoint, or a GGUF file",
        )
    return Base(checkpoint, architecture, config, tensors, biased)


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
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise BaseModelError(
            what=f"{path}: {'; '.join(faults[:5])}{more}",
            why="these are not the tensors that its metadata describes, or edgelora does not compute them yet",
            fix="download or convert the model again",
        )
