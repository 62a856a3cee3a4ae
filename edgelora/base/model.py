"""What a base model is before any weight is used: dimensions, tokenizer, template, fingerprint. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from gguf.constants import LlamaFileType

from edgelora.architectures import ARCHITECTURES, Architecture, ModelConfig
from edgelora.architectures.names import gguf_module, hf_modules
from edgelora.base.fingerprint import fingerprint
from edgelora.data.template import ChatTemplate
from edgelora.data.tokenizer import Tokenizer, read_tokenizer
from edgelora.errors import BaseModelError
from edgelora.files.contract import BaseFile, Fingerprint, Identity, sha256_file, sha256_text
from edgelora.files.gguf import GGUFFile


@dataclass(frozen=True)
class Base:
    """An opened base model. Its weights stay in the file until `base/decoder.py` or a converter reads them."""

    file: GGUFFile
    architecture: Architecture
    config: ModelConfig

    @property
    def path(self) -> Path:
        return self.file.path

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return read_tokenizer(self.file)

    @cached_property
    def template(self) -> ChatTemplate:
        """The chat template inside the file. Raises BaseModelError if it has none, DataError if it does not parse."""
        source = self.file.get("tokenizer.chat_template", str)
        if source is None:
            raise BaseModelError(
                what=f"{self.path}: it has no chat template",
                why="without one nobody knows how a conversation looks to this model",
                fix="use an instruction-tuned model, whose GGUF carries tokenizer.chat_template",
            )
        t = self.tokenizer
        return ChatTemplate(source, bos=t.text_of(t.bos_id), eos=t.text_of(t.eos_id))

    @cached_property
    def fingerprint(self) -> Fingerprint:
        return fingerprint(self.file, self.architecture, self.config)

    @cached_property
    def template_sha256(self) -> str:
        return sha256_text(self.file.get("tokenizer.chat_template", str, ""))

    @cached_property
    def quant(self) -> str:
        """The quantization the file says it has: `Q4_1`, `Q4_K_M`, `F16` …"""
        stated = self.file.get("general.file_type", int)
        if stated in LlamaFileType._value2member_map_:
            name = str(LlamaFileType(stated).name)
            return {"ALL_F32": "F32"}.get(name, name.removeprefix("MOSTLY_"))
        # no statement: the type that most weights have
        sizes: dict[str, int] = {}
        for tensor in self.file.tensors.values():
            sizes[tensor.type.name] = sizes.get(tensor.type.name, 0) + tensor.elements
        return max(sizes, key=lambda kind: sizes[kind])

    @cached_property
    def base_file(self) -> BaseFile:
        return BaseFile(name=self.path.name, quant=self.quant, sha256=sha256_file(self.path))

    @cached_property
    def identity(self) -> Identity:
        """What an adapter's contract is held to."""
        t = self.tokenizer
        return Identity(self.fingerprint, self.quant, t.sha256, self.template_sha256, t.eog_ids)

    def tensor_of(self, module: str) -> str:
        """The GGUF tensor that holds the weight of an HF module."""
        return f"{gguf_module(self.architecture, self.config, module)}.weight"


def open_base(path: Path | str) -> Base:
    """Open a GGUF base model, or a folder that holds exactly one. Raises BaseModelError or FileFormatError."""
    path = Path(path)
    if path.is_dir():
        found = sorted(path.glob("*.gguf"))
        if len(found) != 1:
            raise BaseModelError(
                what=f"{path}: {len(found) or 'no'} model{'s' * (len(found) != 1)} in this folder",
                why="a base model is one .gguf file, and edgelora does not guess which",
                fix=f"pass one of {', '.join(f.name for f in found[:5])}" if found else "pass the path of a .gguf file",
            )
        path = found[0]
    file = GGUFFile(path)
    known = {row.gguf_name: row for row in ARCHITECTURES.values()}
    if file.architecture not in known:
        raise BaseModelError(
            what=f"{path}: a model of the architecture {file.architecture or '(none stated)'}",
            why=f"edgelora computes {', '.join(known)} so far, and guesses at no other",
            fix="use a model of one of these families, such as SmolLM2-135M-Instruct",
        )
    architecture = known[file.architecture]
    base = Base(file, architecture, architecture.read_config(file))
    _check_tensors(base)
    return base


def _check_tensors(base: Base) -> None:
    """All tensors that the decoder needs are there with the right shapes; every fault at once."""
    d, vocab = base.config.hidden_size, base.config.vocab_size
    expected: dict[str, tuple[int, ...]] = {base.tensor_of(m): shape for m, shape in hf_modules(base.config).items()}
    expected |= {"token_embd.weight": (vocab, d), "output_norm.weight": (d,)}
    for i in range(base.config.num_hidden_layers):
        expected |= {f"blk.{i}.attn_norm.weight": (d,), f"blk.{i}.ffn_norm.weight": (d,)}
    if not base.config.tie_word_embeddings:
        expected["output.weight"] = (vocab, d)
    faults = [
        f"{name} is {found.shape}, expected {shape}" if (found := base.file.tensors.get(name)) else f"{name} is missing"
        for name, shape in expected.items()
        if name not in base.file.tensors or base.file.tensors[name].shape != shape
    ]
    faults += [f"{name} has no place in this decoder" for name in base.file.tensors if name not in expected]
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise BaseModelError(
            what=f"{base.path}: {'; '.join(faults[:5])}{more}",
            why="these are not the tensors that its metadata describes, or edgelora does not compute them yet",
            fix="download or convert the model again",
        )
