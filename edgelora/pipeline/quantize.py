"""A GGUF → a smaller one: planned, held to its importance matrix and the disk's room, written beside, then named."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from converters.imatrix import Importance, read_importance
from converters.plan import Plan, QuantizeOptions, plan_types, read_plan, write_plan
from converters.plan_check import check_importance, check_plan
from converters.quant_types import QUANT_TYPES, parse_type
from converters.quantize import MAX_KEY_BYTES, write_planned, write_quantized
from edgelora.base.model import FLOAT_QUANTS, Base
from edgelora.data.conversation import Conversation
from edgelora.device import physical_cores
from edgelora.errors import ConfigError, OutputError
from edgelora.files.atomic import refuse_existing, require_space
from edgelora.files.certificate_keys import reserved, withdrawn
from edgelora.pipeline.certificate import (
    ModelCertificate,
    Output,
    Reference,
    beside,
    certify_foreign,
    certify_model,
    rows_to_check,
    stamp,
    write_certified,
)
from edgelora.pipeline.check_rows import CHECKED_ROWS
from edgelora.pipeline.foreign import Foreign, open_model
from edgelora.pipeline.snap_back import notes_on_grid
from edgelora.progress import OnProgress, silent
from edgelora.versions import versions


@dataclass(frozen=True)
class QuantizeSettings:
    """What a user may ask for beside the type."""

    tensor_types: tuple[tuple[str, str], ...] = ()
    """(regular expression, type of the tensors in whose name it is found)."""
    output_type: str | None = None
    embedding_type: str | None = None
    pure: bool = False
    keep_split: bool = False
    """Write a folder of as many parts as the source has."""
    imatrix: Path | None = None
    plan: Path | None = None
    """The type of each tensor, instead of llama.cpp's choice."""
    allow_requantize: bool = False
    plain: bool = False
    """Nothing in the file that llama-quantize would not write."""
    check: Path | None = None
    """Rows that the file is checked on; a few built-in ones without it."""
    check_rows: int = CHECKED_ROWS


@dataclass(frozen=True)
class Quantized:
    """The file or folder that was written, its plan, and what its user should know about it."""

    path: Path
    size_bytes: int
    plan: Plan
    notes: list[str]
    certificate: ModelCertificate | None = None
    """What its check came to; None where nothing was written."""


@dataclass(frozen=True)
class Planned:
    """Everything that is known before anything is written."""

    source: Path
    options: QuantizeOptions
    plan: Plan
    keys: Mapping[str, str | float]
    """Metadata to add."""
    notes: list[str]
    foreign: bool = False
    """Of a family that only llama.cpp computes."""


def quantize(
    source: Path,
    out: Path,
    quant: str | None = None,
    settings: QuantizeSettings = QuantizeSettings(),
    *,
    save_plan: Path | None = None,
    overwrite: bool = False,
    on_progress: OnProgress = silent,
) -> Quantized:
    """Quantize a whole GGUF model to `quant` with llama.cpp's own choice of types, or those of a plan.

    Raises OutputError for a source that is quantized already, a full disk and what stands in the way; ConfigError for
    settings that cannot be; ExportError where importance is missing or does not fit, and with llama.cpp's last words;
    CertificateError, the file kept aside, if llama.cpp does not compute with it what torch does.
    """
    refuse_existing(out, overwrite, folder=settings.keep_split)
    made_from = stamp(source)
    read = stamp(source, *filter(None, (settings.imatrix, settings.plan, settings.check)))
    read.require_apart(out, *([save_plan] if save_plan else []))
    _refuse_plan(save_plan, out, overwrite)
    rows = None if settings.check is None else rows_to_check(settings.check, settings.check_rows, open_model(source))
    asked = prepare(source, quant, settings)
    require_space(out.absolute().parent, asked.plan.file_bytes, "the quantized weights")
    certificate = write_certified(
        Output(out, overwrite, folder=settings.keep_split, sign=not settings.plain),
        made_from,
        lambda draft: _write(draft, asked, settings, on_progress),
        lambda draft: _certify(min(draft.iterdir()) if settings.keep_split else draft, asked, rows, on_progress),
    )
    if save_plan is not None:
        write_plan(save_plan, asked.plan, overwrite=overwrite)
    written = sorted(out.iterdir()) if settings.keep_split else [out]
    return Quantized(out, sum(file.stat().st_size for file in written), asked.plan, asked.notes, certificate)


def _certify(
    draft: Path, asked: Planned, rows: Sequence[Conversation] | None, on_progress: OnProgress
) -> ModelCertificate:
    if asked.foreign:
        return certify_foreign(draft, asked.source, rows, on_progress)
    return certify_model(draft, Reference(asked.source), rows, on_progress)


def is_type(text: str) -> bool:
    """Whether this is the name of a type that a model can be quantized to."""
    return text.upper() in QUANT_TYPES


def _refuse_plan(save_plan: Path | None, out: Path, overwrite: bool) -> None:
    """Raise OutputError if the plan cannot be written after the model, or would take its place."""
    if save_plan is None:
        return
    if save_plan.resolve() in (out.resolve(), beside(out).resolve()):
        raise OutputError(
            what=f"--save-plan {save_plan}: another result of this command stands there",
            why="one would replace the other",
            fix="choose another name for the plan, such as plan.toml",
        )
    refuse_existing(save_plan, overwrite)


def _write(draft: Path, asked: Planned, settings: QuantizeSettings, on_progress: OnProgress) -> None:
    if settings.plan is None and (settings.plain or settings.keep_split):
        target = draft / draft.name if settings.keep_split else draft
        write_quantized(asked.source, target, asked.options, on_progress, asked.keys)
    else:
        write_planned(asked.source, draft, asked.plan, asked.options.imatrix, on_progress, asked.keys)


def dry_run_of(
    source: Path,
    quant: str | None,
    settings: QuantizeSettings = QuantizeSettings(),
    *,
    save_plan: Path | None = None,
    overwrite: bool = False,
) -> Quantized:
    """What `quantize` would write, and how large: nothing is, but the plan where `save_plan` says."""
    if save_plan is not None:
        stamp(source, *filter(None, (settings.imatrix,))).require_apart(save_plan)
    asked = prepare(source, quant, settings)
    if save_plan is not None:
        write_plan(save_plan, asked.plan, overwrite=overwrite)
    return Quantized(asked.source, asked.plan.file_bytes, asked.plan, asked.notes)


def prepare(source: Path, quant: str | None, settings: QuantizeSettings = QuantizeSettings()) -> Planned:
    """The plan, and what is known of it, with all that can be refused refused. Reads no tensor, writes nothing."""
    given = None if settings.plan is None else read_plan(settings.plan)
    kind = _kind(quant, given, settings)
    base = open_model(source)  # checks the file before llama.cpp sees it
    importance = None if settings.imatrix is None else read_importance(settings.imatrix)
    if importance is not None:
        importance.check({name: info.shape for name, info in base.file.tensors.items()})
    options = QuantizeOptions(
        kind, settings.tensor_types, settings.output_type, settings.embedding_type, settings.pure, settings.keep_split,
        None if importance is None else importance.weights(), physical_cores(),
    )  # fmt: skip
    keys = _keys(settings, importance)
    if settings.keep_split and not settings.plain:
        keys |= withdrawn(base.file)  # the source's, which llama.cpp would copy
    if settings.keep_split and len(base.file.files) == 1:
        raise ConfigError(f"{source}: --keep-split, and it is one file", "it has no parts to keep", "leave it out")
    plan = given or plan_types(base.path, options, keys)
    check_plan(plan, base.file.tensors)
    check_importance(plan, options.imatrix)
    idle = [
        f"--tensor-type {pattern}: in no tensor's name"
        for pattern, _ in settings.tensor_types if not any(_is_in(pattern, t.name) for t in plan.tensors)
    ]  # fmt: skip
    notes = [*plan.notes, *idle, *_requantized(base, plan, settings.allow_requantize)]
    if isinstance(base, Base):
        notes += notes_on_grid(base, plan.types)
    else:
        notes.append(f"{base.why}: it is not checked against torch, but against its source, both computed by llama.cpp")
    return Planned(base.path, options, plan, keys, notes, foreign=isinstance(base, Foreign))


def _is_in(pattern: str, name: str) -> bool:
    """As llama.cpp would find it: its regular expressions are ECMAScript's, and Python may not know one."""
    try:
        return re.search(pattern, name) is not None
    except re.error:
        return True


def _kind(quant: str | None, given: Plan | None, settings: QuantizeSettings) -> str:
    if quant is None and given is None:
        raise ConfigError("no type was named", "a model can be quantized to many", "name one, such as Q4_K_M")
    kind = (quant or (given.kind if given else "")).upper()
    parse_type(kind)
    if given is None:
        return kind
    if given.kind != kind:
        raise ConfigError(
            what=f"{kind}: the plan {settings.plan} is one for {given.kind}",
            why="the file would state another type than it has",
            fix=f'leave the type out, or say `kind = "{kind}"` in the plan',
        )
    chosen = (settings.tensor_types, settings.output_type, settings.embedding_type, settings.pure, settings.keep_split)
    if any(chosen):
        raise ConfigError(
            what="--plan with other choices of types",
            why="a plan says the type of every tensor, for one file",
            fix="change the plan instead, or leave it out",
        )
    return kind


def _keys(settings: QuantizeSettings, importance: Importance | None) -> dict[str, str | float]:
    """Metadata to add: of the importance what llama-quantize says, of edgelora what --plain leaves out."""
    keys: dict[str, str | float] = {}
    if importance is not None and settings.imatrix is not None:
        keys["quantize.imatrix.file"] = _short(str(settings.imatrix) if settings.plain else settings.imatrix.name)
        if importance.datasets:
            keys["quantize.imatrix.dataset"] = _short(importance.datasets[0])
        keys["quantize.imatrix.entries_count"] = len(importance.sums)
        if importance.chunks:
            keys["quantize.imatrix.chunks_count"] = importance.chunks
    if not settings.plain and not settings.keep_split:
        keys["general.quantized_by"] = f"edgelora {versions()['edgelora']}"
        keys |= reserved()
    return keys


def _short(text: str) -> str:
    return text.encode()[:MAX_KEY_BYTES].decode(errors="ignore")


def _requantized(base: Base | Foreign, plan: Plan, allowed: bool) -> list[str]:
    """What to say of weights that were blocks before. Raises OutputError unless that is allowed."""
    again = [t for t in plan.tensors if t.source.name not in FLOAT_QUANTS and t.type != t.source]
    if not again:
        return []
    cost = (
        f"as {plan.kind} its weights take more room and are no better"
        if plan.kind in FLOAT_QUANTS
        else f"quantizing {len(again)} of its tensors again adds a second error to the first"
    )
    if not allowed:
        raise OutputError(
            what=f"{base.path} is {base.quant} already",
            why=cost,
            fix="start from the 16-bit original, or pass --allow-requantize if there is none",
        )
    return [f"the source is {base.quant}: {cost}"]
