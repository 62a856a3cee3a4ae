"""Base + adapters → one GGUF of any type, in one pass: types planned, weights merged and quantized, then named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf.constants import GGMLQuantizationType

from converters.header import write_header_only
from converters.imatrix import Importance, read_importance
from converters.merge import Part, Recipe, entries_of, float_types, targets_of, write_merged
from converters.merge_to_hf import write_merged_folder
from converters.plan import Plan, QuantizeOptions, plan_types, read_plan
from converters.plan_check import check_importance, check_plan
from converters.quant_types import COPY, QUANT_TYPES, parse_type
from edgelora.base.model import FLOAT_QUANTS, Base, open_base
from edgelora.errors import ConfigError, OutputError
from edgelora.files.atomic import refuse_existing, require_space
from edgelora.files.checkpoint import CONFIG
from edgelora.files.contract import sha256_file
from edgelora.files.split import open_gguf
from edgelora.peft.adapter import TENSORS, only_in_torch
from edgelora.pipeline.certificate import (
    ModelCertificate,
    Output,
    Reference,
    certify_model,
    rows_to_check,
    stamp,
    write_certified,
)
from edgelora.pipeline.check_rows import CHECKED_ROWS
from edgelora.pipeline.export import read_checked
from edgelora.pipeline.snap_back import FINE, GRID_KEY, grid_of, snap_back_notes
from edgelora.progress import OnProgress, silent
from edgelora.versions import versions

Type = GGMLQuantizationType
HF = "HF"


@dataclass(frozen=True)
class Merged:
    """The file that was written, and what its user should know about it."""

    path: Path
    kind: str
    size_bytes: int
    notes: list[str]
    certificate: ModelCertificate


@dataclass(frozen=True)
class MergeOptions:
    """What a merge may be given beside its type."""

    imatrix: Path | None = None
    """An importance matrix in llama.cpp's format."""
    plan: Path | None = None
    """The type of each tensor, instead of llama.cpp's choice."""
    hf_dtype: str | None = None
    """F32, F16 or BF16: of a Hugging Face folder; None: each tensor as the base has it."""
    check: Path | None = None
    """Rows that the result is checked on; a few built-in ones without it."""
    check_rows: int = CHECKED_ROWS


def merge(
    base_path: Path,
    adapters: Sequence[tuple[Path, float]],
    out: Path,
    *,
    quant: str | None = None,
    options: MergeOptions = MergeOptions(),
    allow_unverified: bool = False,
    overwrite: bool = False,
    on_progress: OnProgress = silent,
) -> Merged:
    """Merge adapter folders at their scales into the base's weights and write `out` as `quant`.

    The base is a GGUF of any type or a checkpoint; `quant` a GGUF's type (without it the plan's, else F16), or `hf`: a
    checkpoint like the base. No other file is written, and of no model more than a few rows are in memory.
    Raises CertificateError, the result kept aside, if it does not compute what base and adapters do.
    """
    if not adapters:
        raise ConfigError("nothing to merge", "no adapter was named", "pass --adapter FOLDER[:SCALE]")
    wanted = None if (quant or "").upper() == HF else Wanted.read(quant, options)
    _refuse_to_write(out, overwrite, folder=wanted is None)
    made_from = stamp(base_path, *(path for path, _ in adapters))
    stamp(*filter(None, (options.imatrix, options.plan, options.check))).require_apart(out)
    base, parts = open_parts(base_path, adapters, allow_unverified=allow_unverified)
    rows = None if options.check is None else rows_to_check(options.check, options.check_rows, base)
    notes: list[str] = []

    def write(draft: Path) -> None:
        if wanted is None:
            require_space(out.parent, sum(file.stat().st_size for file in base.source.files), "the weights")
            write_merged_folder(draft, base, parts, options.hf_dtype, on_progress)
        else:
            notes.extend(write_gguf(draft, base, parts, wanted, on_progress))

    certificate = write_certified(
        Output(out, overwrite, folder=wanted is None),
        made_from,
        write,
        lambda draft: certify_model(draft, Reference(base_path, tuple(adapters)), rows, on_progress),
    )
    kind = f"Hugging Face folder in {options.hf_dtype or base.quant}" if wanted is None else wanted.kind
    written = [out] if out.is_file() else sorted(out.iterdir())
    return Merged(out, kind, sum(file.stat().st_size for file in written), notes, certificate)


def write_gguf(
    draft: Path, base: Base, parts: Sequence[Part], wanted: Wanted, on_progress: OnProgress = silent
) -> list[str]:
    """Write the GGUF; returns what its user should know."""
    types, notes = wanted.types_for(base, draft.with_name(f"{draft.name}.header"))
    require_space(draft.parent, sum(entry.size_bytes for entry in entries_of(base, types).values()), "the weights")
    keys = wanted.keys()
    if wanted.kind in FINE and (grid := grid_of(base, parts)) is not None:
        keys[GRID_KEY] = grid
    recipe = Recipe(base, parts, types, QUANT_TYPES[wanted.kind], keys, wanted.weights)
    write_merged(draft, recipe, on_progress)
    return [*notes, *snap_back_notes(base, parts, types)]


def _refuse_to_write(out: Path, overwrite: bool, *, folder: bool) -> None:
    """Raise OutputError if nothing can be written at `out`. Overwriting replaces checkpoints, never other folders."""
    refuse_existing(out, overwrite, folder=folder)
    if out.is_dir() and any(out.iterdir()) and not (out / CONFIG).exists():
        raise OutputError(
            what=f"{out}: this is not a checkpoint",
            why="--overwrite replaces checkpoints, and would delete what stands here",
            fix="choose another --out",
        )


def open_parts(
    base_path: Path, adapters: Sequence[tuple[Path, float]], *, allow_unverified: bool
) -> tuple[Base, list[Part]]:
    """The base, with the template that its adapters were trained with, and the adapters, held to their contracts."""
    base = open_base(base_path)
    parts = [
        Part(
            read_checked(path, base, allow_unverified=allow_unverified, with_rows=True), scale,
            sha256_file(path / TENSORS), path.resolve().name,
        )
        for path, scale in adapters
    ]  # fmt: skip
    for part in parts:
        if part.adapter.kind.of_input:
            raise only_in_torch(part.adapter, part.name)
        base = base.as_trained(part.adapter.contract)
    return base, parts


@dataclass(frozen=True)
class Wanted:
    """The types that were asked for, as read before any work."""

    kind: str
    plan: Plan | None
    importance: Importance | None
    weights: Mapping[str, np.ndarray]
    imatrix: Path | None

    @classmethod
    def read(cls, quant: str | None, options: MergeOptions) -> Wanted:
        """Raises ConfigError if type, plan and importance matrix contradict each other."""
        plan = None if options.plan is None else read_plan(options.plan)
        kind = (quant or (plan.kind if plan else "F16")).upper()
        parse_type(kind)
        if kind == COPY:
            raise ConfigError("--to COPY", "a merge changes weights, and must know what they become", "name a type")
        if plan is not None and plan.kind != kind:
            raise ConfigError(
                what=f"--to {kind}: the plan {options.plan} is one for {plan.kind}",
                why="the file would state another type than it has",
                fix=f"leave --to out, or say `kind = {kind!r}` in the plan",
            )
        if options.imatrix is not None and plan is None and kind in FLOAT_QUANTS:
            raise ConfigError(
                what=f"--imatrix {options.imatrix} with {kind}",
                why="it says where few bits are to be spent, and floats are only rounded",
                fix="leave it out, or ask for a quantized type",
            )
        importance = None if options.imatrix is None else read_importance(options.imatrix)
        return cls(kind, plan, importance, {} if importance is None else importance.weights(), options.imatrix)

    def types_for(self, base: Base, header: Path) -> tuple[Mapping[str, Type], list[str]]:
        """The type of every tensor, and what to say of them. `header`: where a file may stand for the moment."""
        if self.importance is not None:
            self.importance.check({name: target.shape for name, target in targets_of(base).items()})
        if self.plan is None and self.kind in FLOAT_QUANTS:
            return float_types(base, GGMLQuantizationType[self.kind]), []
        try:
            if not base.is_gguf:
                write_header_only(header, base, vocabulary=False)
            source = base.path if base.is_gguf else header
            known = self.weights if self.importance else None
            plan = self.plan or plan_types(source, QuantizeOptions(self.kind, imatrix=known))
            check_plan(plan, open_gguf(source).tensors)
        finally:
            header.unlink(missing_ok=True)
        check_importance(plan, known)
        return plan.types, plan.notes

    def keys(self) -> dict[str, str | float]:
        """What the file says of its quantization; of its importance, as llama-quantize does."""
        keys: dict[str, str | float] = {}
        if self.kind not in FLOAT_QUANTS:
            keys["general.quantized_by"] = f"edgelora {versions()['edgelora']}"
        if self.importance is not None and self.imatrix is not None:
            keys |= {
                "quantize.imatrix.file": self.imatrix.name,
                "quantize.imatrix.dataset": ", ".join(self.importance.datasets),
                "quantize.imatrix.entries_count": len(self.importance.sums),
                "quantize.imatrix.chunks_count": self.importance.chunks,
            }
        return keys
