"""Facts that a base and an adapter have in common, and those about texts: tokenizer and chat template."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from edgelora.data.conversation import Message
from edgelora.data.template import ChatTemplate
from edgelora.data.tokenizer import Tokenizer
from edgelora.errors import EdgeloraError
from edgelora.files.contract import CERTIFICATE_KEY, Contract, sha256_text
from edgelora.files.gguf import GGUFFile

SAMPLE = (
    Message("system", "Answer briefly."),
    Message("user", "Hi!"), Message("assistant", "Hello."),
    Message("user", "What is 2 + 3?"), Message("assistant", "5"),
)  # fmt: skip
WIDE_BLOCK = 256  # of the K-quants


def reason(error: EdgeloraError, path: Path) -> str:
    """An error about the file that is being described, on one line."""
    return f"{error.what.removeprefix(f'{path}: ')} ({error.why})"


def stated(file: GGUFFile, key: str, kind: type) -> Any:
    """A value of a GGUF's metadata; None if it is missing or of another type."""
    try:
        return file.get(key, kind)
    except EdgeloraError:
        return None


@dataclass(frozen=True)
class Ability:
    """Whether edgelora can do it with these very files, and what is to be said of that."""

    answer: Literal["yes", "no", "convert first", "export first"]
    why: str = ""


# -- tensors ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TypeShare:
    """All tensors of one type."""

    type: str
    tensors: int
    parameters: int
    size_bytes: int
    fell_back: dict[int, int] = field(default_factory=dict)
    """Columns → how many matrices have this type only because so many do not divide into blocks of 256."""


def shares(tensors: Iterable[tuple[str, tuple[int, ...], int]], *, wide: bool = False) -> list[TypeShare]:
    """(type, shape, bytes) of each tensor, added up by type, the largest first. `wide`: blocks of 256 were wanted."""
    by_type: dict[str, list[tuple[tuple[int, ...], int]]] = {}
    for kind, shape, size in tensors:
        by_type.setdefault(kind, []).append((shape, size))
    found = []
    for kind, parts in by_type.items():
        fell_back = Counter(s[-1] for s, _ in parts if wide and kind != "F32" and len(s) > 1 and s[-1] % WIDE_BLOCK)
        parameters, size = sum(math.prod(s) for s, _ in parts), sum(size for _, size in parts)
        found.append(TypeShare(kind, len(parts), parameters, size, dict(fell_back)))
    return sorted(found, key=lambda share: -share.size_bytes)


# -- what edgelora wrote ------------------------------------------------------------------------------------------


def contract_facts(contract: Contract) -> dict[str, Any]:
    """A contract without what only machines compare."""
    base = {**contract.base_file.model_dump(), "fingerprint": contract.base.short}
    parts = {"version", "method", "system", "single_turn", "training", "evaluation", "versions"}
    return {"base": base, **contract.model_dump(mode="json", include=parts)}


def certificate_of(file: GGUFFile) -> dict[str, Any] | None:
    """The certificate inside a GGUF; None where there is none, or only a place reserved for it."""
    try:
        found = json.loads(stated(file, CERTIFICATE_KEY, str) or "")
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def is_of_source(certificate: Mapping[str, Any], file: GGUFFile) -> bool:
    """Whether a model's certificate speaks of other types than the file has: it was copied from the file's source."""
    types = Counter(info.type.name for info in file.tensors.values() if len(info.shape) > 1)
    return "types" in certificate and certificate["types"] != types


# -- tokenizer and template ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenizerFacts:
    """`special` and `ends`: (id, text), by llama.cpp's names and in order. `fault`: why edgelora refuses it."""

    model: str
    pre: str
    size: int
    special: dict[str, tuple[int, str]] = field(default_factory=dict)
    ends: list[tuple[int, str]] = field(default_factory=list)
    add_bos: bool | None = None
    add_eos: bool | None = None
    fault: str | None = None


def tokenizer_facts(t: Tokenizer) -> TokenizerFacts:
    """What a tokenizer is and adds, with the tokens that end a turn."""
    return TokenizerFacts(
        t.vocabulary.model, t.vocabulary.pre, len(t.tokens),
        special={name: (i, t.tokens[i]) for name, i in t.ids.items()},
        ends=[(i, t.tokens[i]) for i in t.eog_ids],
        add_bos=t.add_bos, add_eos=t.add_eos,
    )  # fmt: skip


@dataclass(frozen=True)
class TemplateFacts:
    """`sample`: SAMPLE as the template writes it, without the system message if it takes none."""

    sha256: str | None
    """None: there is no template."""
    characters: int = 0
    takes_system: bool = False
    tells_the_date: bool = False
    sample: str | None = None
    fault: str | None = None


def template_facts(read: Callable[[], str | None], tokenizer: Tokenizer | None) -> TemplateFacts:
    """`read` gives the template's text, or raises; `tokenizer` tells what BOS and EOS look like in it."""
    try:
        source = read()
    except EdgeloraError as e:
        return TemplateFacts(None, fault=e.what)
    if source is None:
        return TemplateFacts(None)
    sha256, n = sha256_text(source), len(source)
    bos, eos = (tokenizer.text_of(tokenizer.ids.get(name)) if tokenizer else "" for name in ("bos", "eos"))
    fault = None
    for messages in (SAMPLE, SAMPLE[1:]):
        try:
            template = ChatTemplate(source, bos=bos, eos=eos)
            rendered = template.render(messages)
        except EdgeloraError as e:
            fault = e.what
            continue
        system = messages is SAMPLE and any(span.message == 0 for span in rendered.spans)
        return TemplateFacts(sha256, n, system, template.tells_the_date, rendered.text)
    return TemplateFacts(sha256, n, fault=fault)
