"""An adapter that is more than a LoRA → a patched base, checked, and beside it what is left of the adapter as a LoRA.

Both are compared as they will run: llama.cpp over the patched file, first bare and then with the LoRA, against torch
over that file and over the base with the whole adapter.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters.merge import Part
from converters.patch import plan_patch, write_patched, write_rest
from edgelora.base.model import Base, open_base
from edgelora.errors import ExportError
from edgelora.files.atomic import refuse_existing, require_space, staged
from edgelora.files.certificate_keys import fill
from edgelora.files.contract import Contract, sha256_file
from edgelora.peft.adapter import TENSORS, Adapter
from edgelora.pipeline.certificate import Output, stamp, write_certified
from edgelora.pipeline.check_rows import rows_to_check
from edgelora.pipeline.contracts import contract_over
from edgelora.pipeline.export import DEFAULT_OPTIONS, Certificate, ExportOptions, judged, read_checked
from edgelora.pipeline.side_by_side import SideBySide, side_by_side
from edgelora.pipeline.torch_states import Reference
from edgelora.progress import OnProgress, silent


@dataclass(frozen=True)
class PatchedBase:
    """What was written: the patched base, the LoRA that has to lie over it (None: nothing is left of the adapter), the
    largest rounding error of a tensor (root mean square, relative to its own), and what its user should know."""

    path: Path
    rest: Path | None
    error: float
    notes: list[str]
    certificate: Certificate

    def as_dict(self) -> dict[str, Any]:
        made = {"out": str(self.path), "size_bytes": self.path.stat().st_size, "lora": self.rest and str(self.rest)}
        return {**made, "error": self.error, "notes": self.notes, "certificate": self.certificate.as_dict()}


def patch(
    base_path: Path,
    adapter_path: Path,
    out: Path,
    options: ExportOptions = DEFAULT_OPTIONS,
    on_progress: OnProgress = silent,
) -> PatchedBase:
    """Write `out`, the patched base, and where something of the adapter is left OUT.lora.gguf, a LoRA over it.

    Raises BaseModelError if the base is a checkpoint, ExportError if the adapter is a LoRA, and CertificateError, the
    patched base kept aside, if llama.cpp does not compute with both what torch does.
    """
    rest = out.with_name(f"{out.name.removesuffix('.gguf')}.lora.gguf")
    refuse_existing(out, options.overwrite)
    made_from, base = stamp(base_path, adapter_path), open_base(base_path)
    require_space(out.parent, base.file.path.stat().st_size, "the patched base")
    adapter = read_checked(adapter_path, base, allow_unverified=options.allow_unverified, with_rows=True)
    base = base.as_trained(adapter.contract)
    plan, rows = plan_patch(base, adapter), rows_to_check(options.data, options.n_rows)
    changes_biases = any(adapter.change(module).bias is not None for module in adapter.linears)
    if not plan.patches and not adapter.norms and not changes_biases:
        raise _is_a_lora(adapter_path)
    part = Part(adapter, 1.0, sha256_file(adapter_path / TENSORS), adapter_path.resolve().name)
    reference = Reference(base_path, ((adapter_path, 1.0),))
    with ExitStack() as stack:
        lora = stack.enter_context(staged(rest, overwrite=options.overwrite)) if plan.rest else None

        def check(draft: Path) -> Certificate:
            if lora is not None:
                write_rest(lora, base, plan, rest.stem, None, options.dtype)
            equal, (floor, own) = side_by_side(SideBySide(draft, lora, (reference,), rows), on_progress)
            return judged(base, len(rows), equal, floor, own, coarse=lora is not None and options.dtype == "Q8_0")

        certificate = write_certified(
            Output(out, options.overwrite),
            made_from,
            lambda draft: write_patched(draft, base, plan, part, on_progress),
            check,
        )
        if lora is not None:  # again, now that the file it belongs to has its name and its certificate
            write_rest(lora, base, plan, rest.stem, _contract(adapter, open_base(out)), options.dtype)
            fill(lora, certificate.as_dict())
    return PatchedBase(out, rest if plan.rest else None, plan.error, plan.notes, certificate)


def _is_a_lora(adapter_path: Path) -> ExportError:
    return ExportError(
        what=f"{adapter_path}: there is nothing to patch",
        why="it adds B A to each weight, which llama.cpp can do over the base as it is",
        fix="export it as an adapter (leave --door out)",
    )


def _contract(adapter: Adapter, patched: Base) -> Contract:
    """The adapter's own, with the patched file in the place of its base; of a foreign one what its files tell."""
    if (own := adapter.contract) is None:
        return contract_over(patched, adapter.kind.title.lower())
    changed = {"base": patched.identity.fingerprint, "base_file": patched.base_file, "certificate": None}
    return own.model_copy(update=changed)
