"""What quantization took away, as a LoRA beside the file: made, measured, and held against the same bytes as bits."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from converters.adapter_to_gguf import write_adapter_gguf
from converters.repair import half, repair
from edgelora.base.model import open_base
from edgelora.files.atomic import staged
from edgelora.peft.adapter import Adapter
from edgelora.pipeline.prepared import Attempt, BudgetOptions, Prepared
from edgelora.progress import OnProgress, Pace, Progress


@dataclass(frozen=True)
class Repair:
    """What a repair is worth: mean KL on held-out tokens of the file alone, with it, and of a plan with its bytes more.

    `path`: where it was written.
    """

    path: Path
    rank: int
    size_bytes: int
    kl_without: float
    kl_with: float
    kl_bits: float

    @property
    def kept(self) -> bool:
        return self.kl_with < self.kl_bits

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path), "kept": self.kept}

    def __str__(self) -> str:
        verdict = "kept" if self.kept else "not kept"
        return (
            f"repair of rank {self.rank}, {self.size_bytes / 1e6:.1f} MB: KL {self.kl_without:.4f} → "
            f"{self.kl_with:.4f}, the same bytes as bits {self.kl_bits:.4f}: {verdict}"
        )


def repair_path(out: Path) -> Path:
    """Where the repair of the file at `out` stands."""
    return out.with_name(f"{out.stem}-repair.gguf")


class _NotKept(Exception):
    """Its file is dropped before it gets a name."""


def repair_beside(
    prepared: Prepared, out: Path, attempt: Attempt, options: BudgetOptions, on_progress: OnProgress
) -> Repair:
    """Write the repair of the file at `out` beside it, unless the plan that spends its bytes on bits is better.

    `attempt`: what was measured of that file. With `overwrite` a repair that is not kept takes an older one along:
    it belongs to no file that is there.
    """
    assert options.repair_rank is not None
    place = repair_path(out)
    try:
        with staged(place, overwrite=options.overwrite) as draft:
            repair = replace(try_repair(prepared, options.repair_rank, out, attempt, draft, on_progress), path=place)
            if not repair.kept:
                raise _NotKept
    except _NotKept:
        place.unlink(missing_ok=True)
    return repair


def try_repair(
    prepared: Prepared, rank: int, written: Path, attempt: Attempt, draft: Path, on_progress: OnProgress
) -> Repair:
    """Write the repair of `written` to `draft`, and measure it and the plan that spends its bytes on bits."""
    adapter = repair_adapter(prepared, written, rank, on_progress)
    write_adapter_gguf(draft, adapter, open_base(written), f"repair of {written.stem}")
    with_repair = prepared.measured(written, adapter, on_progress)
    size_bytes = draft.stat().st_size
    bits = draft.with_name("bits.gguf")
    richer = prepared.attempt(prepared.within_bytes(attempt.file_bytes + size_bytes), bits, on_progress)
    bits.unlink()
    return Repair(draft, rank, size_bytes, attempt.measured.kl_mean, with_repair.kl_mean, richer.measured.kl_mean)


def repair_adapter(prepared: Prepared, written: Path, rank: int, on_progress: OnProgress) -> Adapter:
    """The repair of every linear layer, in F16's numbers; none of a tied embedding, on which llama.cpp aborts."""
    base, other = open_base(prepared.source), open_base(written)
    pairs, pace, weights = {}, Pace(len(base.linears)), prepared.importance.weights()
    for module in base.linears:
        name = f"{module}.weight"
        residual = base.tensors.matrix(name).floats() - other.tensors.matrix(name).floats()
        pair = half(repair(residual, rank, weights.get(base.tensor_of(module))))
        pairs[module] = {"lora_A": pair.a, "lora_B": pair.b}
        _, eta = pace.step(0)
        on_progress(Progress("repair", pace.done, pace.total, eta_s=eta))
    return Adapter({"lora_alpha": rank}, pairs)
