"""What is in a file or folder, and what edgelora can do with it. Reads headers, the vocabulary and 64 rows a layer;
all of it only where its size is that of a model in the catalog.

What cannot be opened as a base is described as far as it can be read, each part with the reason where it ends.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from converters.base_to_gguf import refuse_unlike
from edgelora.base.model import Base, open_base
from edgelora.catalog import Known, recognize
from edgelora.data.folder import folder_template
from edgelora.data.tokenizer import Tokenizer
from edgelora.data.vocabulary import vocabulary_from_folder, vocabulary_from_gguf
from edgelora.errors import EdgeloraError
from edgelora.files.adapter_check import contract_of
from edgelora.files.checkpoint import CONFIG, Checkpoint
from edgelora.files.contract import read_lineage
from edgelora.files.gguf import GGUFFile
from edgelora.peft.adapter import CONFIG as ADAPTER_CONFIG
from edgelora.pipeline.inspect_adapter import AdapterFacts, gguf_adapter, is_adapter, peft_adapter
from edgelora.pipeline.inspect_facts import (
    Ability,
    TemplateFacts,
    TokenizerFacts,
    certificate_of,
    contract_facts,
    is_of_source,
    reason,
    stated,
    template_facts,
    tokenizer_facts,
)
from edgelora.pipeline.inspect_shape import Shape, Source, Weights, shape_of, weights_of

T = TypeVar("T")


@dataclass(frozen=True)
class Origin:
    """Which base this is (`fingerprint`, the same at every quantization) and what was merged into it."""

    fingerprint: str | None
    lineage: list[str]
    contract: dict[str, Any] | None
    certificate: dict[str, Any] | None
    faults: list[str]
    certificate_of_source: bool = False
    """The certificate is not this file's, but that of the one it was quantized from."""
    known: Known | None = None
    """The very file that the catalog of models names so."""


@dataclass(frozen=True)
class BaseFacts:
    """A base model. `fault`: why it cannot be opened, though parts of it can be read."""

    kind: Literal["GGUF", "checkpoint"]
    path: str
    name: str
    fault: str | None
    weights: Weights
    shape: Shape
    tokenizer: TokenizerFacts
    template: TemplateFacts
    origin: Origin
    train: Ability
    run: Ability
    linears: dict[str, int]
    """What adapters attach to: its name inside a layer → how many layers have it."""


def inspect(path: Path) -> BaseFacts | AdapterFacts:
    """Raises what `open_base` raises if there is neither a model nor an adapter, or its headers cannot be read."""
    if (path / ADAPTER_CONFIG).is_file():
        return peft_adapter(path)
    try:
        base = open_base(path)
    except EdgeloraError as e:
        source = _source(path, e)
        if isinstance(source, GGUFFile) and is_adapter(source):
            return gguf_adapter(source)
        return _describe(source, None, reason(e, source.path))
    return _describe(base.source, base, None)


def _source(path: Path, error: EdgeloraError) -> Source:
    """The one thing at `path` that has headers to read. Raises `error` if there is none."""
    models = sorted(path.glob("*.gguf")) if path.is_dir() else [path]
    if len(models) == 1:
        return GGUFFile(models[0])
    if not models and (path / CONFIG).is_file():
        return Checkpoint(path)
    raise error


def _describe(source: Source, base: Base | None, fault: str | None) -> BaseFacts:
    tokenizer, texts = _tokenizer(source, base)
    template = template_facts(lambda: _template_source(source), tokenizer)
    origin = _origin(source, base if tokenizer else None)
    why_not = fault or texts.fault or (origin.faults[0] if origin.fingerprint is None else None)
    is_gguf = isinstance(source, GGUFFile)
    name = stated(source, "general.name", str) if isinstance(source, GGUFFile) else None
    return BaseFacts(
        kind="GGUF" if is_gguf else "checkpoint",
        path=str(source.path),
        name=name or source.path.resolve().name,
        fault=fault,
        weights=weights_of(source, base),
        shape=shape_of(source, base),
        tokenizer=texts,
        template=template,
        origin=origin,
        train=_train(base, why_not, template),
        run=_run(base, why_not),
        linears=dict(Counter(name.split(".", 3)[3] for name in base.linears)) if base else {},
    )


# -- texts --------------------------------------------------------------------------------------------------------


def _tokenizer(source: Source, base: Base | None) -> tuple[Tokenizer | None, TokenizerFacts]:
    try:
        if base is not None:
            tokenizer = base.tokenizer
        elif isinstance(source, GGUFFile):
            tokenizer = Tokenizer(vocabulary_from_gguf(source))
        else:
            tokenizer = Tokenizer(vocabulary_from_folder(source.path))
    except EdgeloraError as e:
        return None, _stated_tokenizer(source, reason(e, source.path))
    return tokenizer, tokenizer_facts(tokenizer)


def _stated_tokenizer(source: Source, fault: str) -> TokenizerFacts:
    if not isinstance(source, GGUFFile):
        return TokenizerFacts("unknown", "unknown", 0, fault=fault)
    model, pre = (stated(source, f"tokenizer.ggml.{key}", str) or "none" for key in ("model", "pre"))
    tokens = stated(source, "tokenizer.ggml.tokens", list)
    return TokenizerFacts(model, pre, 0 if tokens is None else len(tokens), fault=fault)


def _template_source(source: Source) -> str | None:
    if isinstance(source, GGUFFile):
        text: str | None = source.get("tokenizer.chat_template", str)
        return text
    return folder_template(source.path)


# -- where it comes from, and what can be done with it ------------------------------------------------------------


def _origin(source: Source, base: Base | None) -> Origin:
    faults: list[str] = []

    def read(part: Callable[[], T]) -> T | None:
        try:
            return part()
        except EdgeloraError as e:
            faults.append(reason(e, source.path))
            return None

    fingerprint = read(lambda: base.fingerprint.short) if base is not None else None
    if isinstance(source, Checkpoint):
        return Origin(fingerprint, [], None, None, faults)
    contract, known = read(lambda: contract_of(source)), read(lambda: recognize(source.path))
    certificate = certificate_of(source)
    return Origin(
        fingerprint=fingerprint,
        lineage=list(read(lambda: read_lineage(source)) or ()),
        contract=contract_facts(contract) if contract else None,
        certificate=certificate,
        faults=list(dict.fromkeys(faults)),
        certificate_of_source=certificate is not None and is_of_source(certificate, source),
        known=known,
    )


def _train(base: Base | None, fault: str | None, template: TemplateFacts) -> Ability:
    if base is None or fault is not None:
        return Ability("no", fault or "")
    if template.fault is not None:
        return Ability("no", template.fault)
    if template.sha256 is not None:
        return Ability("yes")
    try:
        base.with_template("chatml")
    except EdgeloraError as e:
        return Ability("no", reason(e, base.path))
    return Ability("yes", "with --chat-template, since it has no chat template of its own")


def _run(base: Base | None, fault: str | None) -> Ability:
    if base is None or fault is not None:
        return Ability("no", fault or "")
    if base.is_gguf:
        return Ability("yes", "in llama.cpp")
    try:
        refuse_unlike(base)
    except EdgeloraError as e:
        return Ability("no", reason(e, base.path))
    return Ability("convert first", "llama.cpp runs GGUF files, and `edgelora convert` writes one")
