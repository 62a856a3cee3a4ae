"""The contract that travels with every artefact: which base it belongs to, how it was made, what it scored.

It stands in `edgelora.json` beside an adapter and under `edgelora.*` keys inside every GGUF we write. Comparing two
fingerprints happens here; making one needs the weights and happens in `base/fingerprint.py`.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from edgelora.errors import AdapterError, BaseModelError
from edgelora.files.checkpoint import Checkpoint
from edgelora.files.gguf import GGUFFile

FILE_NAME = "edgelora.json"
CONTRACT_KEY = "edgelora.contract"
CERTIFICATE_KEY = "edgelora.certificate.json"  # all of it; see `certificate_keys.py` for what stands beside it
LINEAGE_KEY = "edgelora.lineage"
CHECKPOINT_LINEAGE = "edgelora_lineage"  # the same in the config.json of a checkpoint
CERTIFICATE_BYTES = 2048  # reserved in a file until it has been checked

# How far the row norms of one base may differ (root mean square of the relative differences) once quantized.
# Measured on SmolLM2-135M against its Q4_1: F16 1e-4, Q8_0 4e-4, Q4_K_M 3e-3, Q4_0 6e-3, Q2_K 6e-3 (its 576 columns
# keep it from true K-quants, which cost more); each with a wide margin, since the norms and lineage are exact.
SKETCH_TOLERANCE = {"F32": 2e-3, "F16": 2e-3, "BF16": 5e-3, "Q8_0": 5e-3, "Q6_K": 1e-2}
SKETCH_TOLERANCE_LOW_BITS = 0.15
# Sketches of the same weights, stored as F16 or BF16 instead of blocks, differ by less than this (1e-4); those of an
# original and its quantization to 4 bits by more.
SAME_WEIGHTS = 5e-4


class Fingerprint(BaseModel):
    """What stays the same when a base is quantized, and differs for every other base and for its own merges."""

    model_config = ConfigDict(frozen=True)

    config: dict[str, Any]
    vocabulary_sha256: str
    norms_sha256: str
    sketch: str = Field(
        description="base64 of float16: for each layer the norms of 64 seeded rows, taken from its linears by turns"
    )
    lineage: tuple[str, ...] = ()

    @property
    def short(self) -> str:
        """Twelve letters that name this base (not the quantization) in messages and reports."""
        exact = [self.config, self.vocabulary_sha256, self.norms_sha256, list(self.lineage)]
        return hashlib.sha256(json.dumps(exact, sort_keys=True).encode()).hexdigest()[:12]

    @field_validator("sketch")
    @classmethod
    def _is_base64_of_halves(cls, value: str, info: ValidationInfo) -> str:
        halves = base64.b64decode(value, validate=True)
        if len(halves) % 2:
            raise ValueError("an odd number of bytes")
        # what a file says; a base at hand may be damaged, and is refused in words of its own
        if info.mode == "json" and not np.isfinite(np.frombuffer(halves, np.float16)).all():
            raise ValueError("a norm that is not finite")
        return value

    def row_norms(self) -> np.ndarray:
        """float32, those of the sketch one layer after the other."""
        return np.frombuffer(base64.b64decode(self.sketch), np.float16).astype(np.float32)

    def distance(self, other: Fingerprint) -> float | None:
        """Root mean square of the relative differences of the row norms; None if `other` has not as many."""
        a, b = self.row_norms(), other.row_norms()
        if a.shape != b.shape:
            return None
        return float(np.sqrt(np.mean(np.square((b - a) / np.maximum(np.abs(a), 1e-3)))))


class BaseFile(BaseModel):
    """The very file an adapter was trained over: its name and quantization (the gain belongs to that one)."""

    model_config = ConfigDict(frozen=True)

    name: str
    quant: str
    sha256: str


@dataclass(frozen=True)
class Identity:
    """What a contract is held to: the base at hand, and how it turns text into ids and ends a turn."""

    fingerprint: Fingerprint
    quant: str
    tokenizer_sha256: str
    chat_template_sha256: str
    eog_ids: tuple[int, ...]


class Contract(BaseModel):
    """Everything a later step must know about an adapter or a merged model."""

    version: str
    base: Fingerprint
    base_file: BaseFile
    tokenizer_sha256: str
    chat_template_sha256: str
    eog_ids: tuple[int, ...]
    chat_template: str | None = None
    """The template that was chosen for a base that has none; None: the base's own."""
    system: str | None = None
    """The system message that all training rows begin with, or None: chat says it when the adapter is on."""
    single_turn: bool = False
    """All training rows are one question and its answer: chat then asks each question by itself."""
    method: str
    training: dict[str, Any] = {}
    evaluation: dict[str, Any] = {}
    versions: dict[str, str] = {}
    certificate: dict[str, Any] | None = None


def tolerance(quant: str) -> float:
    """How far the row norms of a base stored as `quant` may be from those of the original."""
    return SKETCH_TOLERANCE.get(quant, SKETCH_TOLERANCE_LOW_BITS)


def differences(wanted: Fingerprint, found: Fingerprint, quant: str) -> list[str]:
    """Why `found` (a base stored as `quant`) is not the base `wanted`; empty if it is."""
    faults = [
        f"{key} is {found.config.get(key)}, expected {value}"
        for key, value in wanted.config.items()
        if found.config.get(key) != value
    ]
    if wanted.vocabulary_sha256 != found.vocabulary_sha256:
        faults.append("the vocabulary is another one")
    if wanted.norms_sha256 != found.norms_sha256:
        faults.append("the norm weights are others")
    if wanted.lineage != found.lineage:
        merged = "has been merged with an adapter" if found.lineage else "is the original, not the merged model"
        faults.append(f"the file {merged}")
    distance = wanted.distance(found)
    if distance is None:
        faults.append("the weight sketch has another size")
    elif not distance <= tolerance(quant):
        faults.append(f"the weights differ by {distance:.1%}, more than {quant} explains")
    return faults


def require_same_base(contract: Contract, found: Identity, adapter: str, base: str) -> None:
    """Raise AdapterError, naming every difference, if `contract` was made on another base than `found`."""
    # trained over a file of few bits, it belongs to the 16-bit original too, which is as far from that file
    coarser = max(found.quant, contract.base_file.quant, key=tolerance)
    faults = differences(contract.base, found.fingerprint, coarser)
    if contract.tokenizer_sha256 != found.tokenizer_sha256:
        faults.append("texts get other token ids")
    if contract.chat_template_sha256 != found.chat_template_sha256:
        faults.append("the chat template is another one")
    if contract.eog_ids != found.eog_ids:
        faults.append(f"turns end at {found.eog_ids}, expected {contract.eog_ids}")
    if faults:
        raise AdapterError(
            what=f"{adapter} does not belong to {base}: " + "; ".join(faults),
            why=f"it was trained on {contract.base_file.name} ({contract.base.short}), "
            f"this base is {found.fingerprint.short}",
            fix=f"use {contract.base_file.name} or another quantization of it, or train again on this base",
        )


def require_its_base(
    contract: Contract | None, found: Identity, adapter: Path, base: Path, *, allow_unverified: bool
) -> None:
    """Raise AdapterError as `require_same_base` does, and unless allowed for an adapter that has no contract."""
    if contract is not None:
        require_same_base(contract, found, str(adapter), str(base))
    elif not allow_unverified:
        raise AdapterError(
            what=f"{adapter}: it does not say which base it belongs to",
            why="it was not written by edgelora, and on another base of the same shape it would answer nonsense",
            fix="pass --allow-unverified-base if you know that it was trained on this base",
        )


def fault_and_contract(
    fault: AdapterError,
    path: Path,
    read: Callable[[], Contract | None],
    require: Callable[[Contract | None], object],
) -> AdapterError:
    """`fault` of the adapter at `path`, in one error with what is wrong with its contract, if anything is.

    read, require: how the contract is read and held to the base. Where it names another base, why and fix are those of
    that; where there is none, or none that can be read, they are the fault's.
    """
    named = False
    try:
        contract = read()
        named = contract is not None
        require(contract)
    except AdapterError as foreign:
        first, second = (foreign, fault) if named else (fault, foreign)
        return AdapterError(f"{first.what}; {second.what.removeprefix(f'{path}: ')}", first.why, first.fix)
    return fault


def read_contract(text: str, where: str) -> Contract:
    """Parse a contract. Raises AdapterError that names every fault of it."""
    try:
        return Contract.model_validate_json(text)
    except ValidationError as e:
        faults = "; ".join(f"{'.'.join(map(str, f['loc'])) or 'text'}: {f['msg']}" for f in e.errors()[:5])
        raise AdapterError(
            what=f"{where}: the contract cannot be read ({faults})",
            why="the file was edited or cut short, or a newer edgelora wrote it",
            fix="export the adapter again, or update edgelora",
        ) from e


def contract_in(folder: Path) -> Contract | None:
    """What an adapter's folder says of its training, whatever the adapter is; None if it says nothing.

    Raises what `read_contract` raises.
    """
    own = folder / FILE_NAME
    return read_contract(own.read_text(encoding="utf-8", errors="replace"), str(own)) if own.is_file() else None


def read_lineage(model: GGUFFile | Checkpoint) -> tuple[str, ...]:
    """What was merged into a model, in order. Raises BaseModelError if the statement was tampered with."""
    key = CHECKPOINT_LINEAGE if isinstance(model, Checkpoint) else LINEAGE_KEY
    try:
        found = model.config.get(key, []) if isinstance(model, Checkpoint) else json.loads(model.get(key, str, "[]"))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, list) or not all(isinstance(entry, str) for entry in found):
        raise BaseModelError(
            what=f"{model.path}: {key} is no list of texts",
            why="edgelora writes one into every merged model; this one was edited or damaged",
            fix="merge the model again",
        )
    return tuple(found)


def lineage_text(lineage: Sequence[str]) -> str:
    """How a GGUF states its lineage under LINEAGE_KEY."""
    return json.dumps(list(lineage))


def sha256_file(path: Path) -> str:
    """Hexadecimal, of all its bytes. Raises OSError."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def sha256_bytes(content: bytes) -> str:
    """Hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def sha256_text(text: str) -> str:
    """Hexadecimal, of the text in UTF-8."""
    return sha256_bytes(text.encode())
