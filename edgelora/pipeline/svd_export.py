"""`export --svd-rank`: the nearest LoRA of an adapter that is none, written, checked, and what was lost measured.

Two numbers are kept apart: llama.cpp against torch over that LoRA (a fault of ours, with a limit), and against torch
over the whole adapter: the price of the rank, reported and never a reason to reject.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from converters.adapter_to_gguf import write_adapter_gguf
from converters.svd import Nearest, nearest_lora
from edgelora.base.model import open_base
from edgelora.evaluate.fidelity import Fidelity
from edgelora.files.atomic import refuse_existing
from edgelora.peft.adapter import Adapter, write_adapter
from edgelora.pipeline.certificate import Output, stamp, write_certified
from edgelora.pipeline.check_rows import rows_to_check
from edgelora.pipeline.export import DEFAULT_OPTIONS, Certificate, ExportOptions, judged, read_checked
from edgelora.pipeline.side_by_side import SideBySide, side_by_side
from edgelora.pipeline.torch_states import Reference
from edgelora.progress import OnProgress, silent

ROUNDING = 1e-5  # of ΔW: less is what float32 makes of singular values that are 0


@dataclass(frozen=True)
class SvdCertificate:
    """That llama.cpp computes the LoRA, and what the rank lost: of ΔW (Frobenius), and of the model's answers."""

    rank: int
    """The largest that it has: what was asked for, or all that the adapter has, where that is less."""
    errors: dict[str, float]
    """‖ΔW − B A‖ / ‖ΔW‖ of every linear layer."""
    error: float
    lost: Fidelity
    lora: Certificate

    @property
    def faults(self) -> list[str]:
        return self.lora.faults

    @property
    def worst(self) -> str:
        """The layer of which most is lost."""
        return max(self.errors, key=self.errors.__getitem__)

    @property
    def sentence(self) -> str:
        """What was lost, in words. llama.cpp's own rounding is part of how far its answers are from torch's."""
        answers = (
            f"its answers are {self.lost.kl_mean:.2g} nats away (mean KL; {self.lora.floor.kl_mean:.2g} of the bare "
            f"base), same top {self.lost.same_top:.1%} ± {self.lost.same_top_error:.1%}"
        )
        if self.error < ROUNDING:
            return f"nothing that the adapter changes in the weights is lost; {answers}"
        return (
            f"it is not the adapter: {self.error:.1%} of what that changes in the weights is lost (by layer at most "
            f"{self.errors[self.worst]:.1%}), and {answers}"
        )

    def as_dict(self) -> dict[str, Any]:
        """What the file says, which has reserved a place of one size for it: of the layers the worst alone."""
        return {
            **self.lora.as_dict(), "svd_rank": self.rank, "svd_error": self.error,
            "svd_worst": {"layer": self.worst, "error": self.errors[self.worst]}, "lost": self.lost.as_dict(),
        }  # fmt: skip


@dataclass(frozen=True)
class SvdOptions:
    """The most rank that the LoRA may have, and what is asked of every door."""

    rank: int
    export: ExportOptions = DEFAULT_OPTIONS


def export_svd(
    base_path: Path, adapter_path: Path, out: Path, options: SvdOptions, on_progress: OnProgress = silent
) -> SvdCertificate:
    """Write `out`, a GGUF LoRA of at most `options.rank`, the nearest to what the adapter makes of this base's weights.

    Raises ExportError for an adapter that changes more than weights, the others as `export` does.
    """
    asked = options.export
    refuse_existing(out, asked.overwrite)
    made_from, base = stamp(base_path, adapter_path), open_base(base_path)
    _ = base.file  # as in `export`: a checkpoint is refused before the work
    adapter = read_checked(adapter_path, base, allow_unverified=asked.allow_unverified)
    base = base.as_trained(adapter.contract)
    rows = rows_to_check(asked.data, asked.n_rows)
    nearest = nearest_lora(base, adapter, options.rank, on_progress)
    rank = max((len(parts["lora_A"]) for parts in nearest.adapter.tensors.values()), default=options.rank)
    lora = _signed(nearest, adapter, rank)
    with tempfile.TemporaryDirectory(prefix="edgelora-svd-") as room:
        folder = Path(room) / "lora"
        write_adapter(folder, lora)

        def check(draft: Path) -> SvdCertificate:
            wholes = tuple(Reference(base_path, ((path, 1.0),)) for path in (folder, adapter_path))
            equal, (floor, own, lost) = side_by_side(SideBySide(base_path, draft, wholes, rows), on_progress)
            found = judged(base, len(rows), equal, floor, own, coarse=asked.dtype == "Q8_0")
            return SvdCertificate(rank, dict(nearest.errors), nearest.whole, lost, found)

        return write_certified(
            Output(out, asked.overwrite),
            made_from,
            lambda draft: write_adapter_gguf(draft, lora, base, out.stem, asked.dtype),
            check,
        )


def _signed(nearest: Nearest, adapter: Adapter, rank: int) -> Adapter:
    """The LoRA under the adapter's contract, which says by what way it came; what that says of scores was another's."""
    if adapter.contract is None:
        return nearest.adapter
    how = f"{adapter.contract.method}, its nearest LoRA of rank {rank}"
    changed: dict[str, object] = {"method": how, "evaluation": {}, "certificate": None}
    return replace(nearest.adapter, contract=adapter.contract.model_copy(update=changed))
