"""What a base model is before any weight is used: dimensions, tokenizer, template, fingerprint. Imports no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from gguf.constants import LlamaFileType

from edgelora.architectures import Architecture, ModelConfig
from edgelora.architectures.layers import Layers
from edgelora.architectures.metadata import context_in_llama_cpp
from edgelora.architectures.names import gguf_place
from edgelora.base.fingerprint import fingerprint
from edgelora.base.header import is_an_adapter, read_checkpoint, read_gguf
from edgelora.base.tensors import Tensors
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
        """The same at any quantization. Reads 64 rows of each layer and all norms."""
        return fingerprint(self.tensors, self.architecture, self.config, self.vocabulary.tokens, self.lineage)

    @cached_property
    def lineage(self) -> tuple[str, ...]:
        """What was merged into these weights, in order; empty for an original."""
        return read_lineage(self.source)

    @cached_property
    def template_sha256(self) -> str:
        """Of the template in use; of the empty text where there is none."""
        return sha256_text(self.template_source or "")

    @cached_property
    def quant(self) -> str:
        """The quantization the file says it has: `Q4_1`, `Q4_K_M`, `F16` …"""
        return quant_of(self.source)

    @cached_property
    def base_file(self) -> BaseFile:
        """Its digest is of the whole file, or of the digests of several: all of them are read."""
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


def open_base(path: Path | str, chat_template: str | None = None) -> Base:
    """Open a base model: a GGUF, whole or in parts, a folder that holds exactly one, or an HF folder of safetensors.

    chat_template: for one that has none, as `with_template` takes it. Reads headers only. Raises BaseModelError or
    FileFormatError, and what `with_template` raises.
    """
    try:
        base = _opened(Path(path))
    except OSError as e:
        raise BaseModelError(
            what=f"{path}: cannot be read ({e.strerror})",
            why="a folder on the way to it is closed to you, or a name is too long for the disk",
            fix="check the path, and the rights of the folders in it",
        ) from e
    return base if chat_template is None else base.with_template(chat_template)


def _opened(path: Path) -> Base:
    if not path.is_dir():
        return _of_gguf(open_gguf(path))
    if (path / "adapter_config.json").exists():
        raise is_an_adapter(path)
    found = whole_models(sorted(path.glob("*.gguf")))
    is_checkpoint = any((path / name).exists() for name in ("config.json", "model.safetensors.index.json"))
    if len(found) == 1 and not is_checkpoint:
        return _of_gguf(open_gguf(found[0]))
    if is_checkpoint and not found:
        checkpoint = Checkpoint(path)
        return Base(checkpoint, *read_checkpoint(checkpoint))
    names = [file.name for file in found] + ["a checkpoint (config.json)"] * is_checkpoint
    raise BaseModelError(
        what=f"{path}: {len(names) or 'no'} model{'s' * (len(names) != 1)} in this folder",
        why="a base model is one .gguf file or a folder with config.json and safetensors; edgelora does not guess",
        fix=f"pass the path of one of {', '.join(file.name for file in found[:5])}"
        + (", or move these elsewhere to use the checkpoint" if is_checkpoint else "")
        if found
        else "pass the path of a model",
    )


def _of_gguf(file: GGUFFile) -> Base:
    return Base(file, *read_gguf(file))
