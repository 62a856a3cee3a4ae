"""What quantization took away, as a LoRA beside the file: made, measured, and held against the same bytes as bits."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from converters.adapter_to_gguf import write_adapter_gguf
from converters.repair import half, repair
from edgelora.base.model import open_base
from edgelora.peft.adapter import Adapter, write_adapter
from edgelora.pipeline.certificate import Output, beside, rows_to_check, stamp, write_certified
from edgelora.pipeline.contracts import contract_over
from edgelora.pipeline.export import Certificate, certify_adapter
from edgelora.pipeline.prepared import Attempt, BudgetOptions, Prepared
from edgelora.progress import OnProgress, Pace, Progress
from edgelora.words import size

FOLDER = "adapter"  # beside the draft, for the time of the check


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
        """Whether it does more than its bytes do as bits, and anything at all."""
        return self.kl_with < min(self.kl_without, self.kl_bits)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path), "kept": self.kept}

    def __str__(self) -> str:
        verdict = "kept" if self.kept else "not kept"
        return (
            f"repair of rank {self.rank}, {size(self.size_bytes)}: KL {self.kl_without:.4f} → "
            f"{self.kl_with:.4f}, the same bytes as bits {self.kl_bits:.4f}: {verdict}"
        )


def repair_path(out: Path) -> Path:
    """Where the repair of the file at `out` stands."""
    return out.with_name(f"{out.name.removesuffix('.gguf')}-repair.gguf")


class _NotKept(Exception):
    """Its file is dropped before it gets a name."""


def repair_beside(
    prepared: Prepared, out: Path, attempt: Attempt, options: BudgetOptions, on_progress: OnProgress
) -> Repair:
    """Write the repair of the file at `out` beside it, certified as any adapter is, unless bits are worth more.

    `attempt`: what was measured of that file. With `overwrite` a repair that is not kept takes an older one along:
    it belongs to no file that is there. Raises CertificateError if llama.cpp does not compute with it what torch does.
    """
    assert options.repair_rank is not None
    place = repair_path(out)
    made: list[Repair] = []

    def write(draft: Path) -> None:
        adapter = repair_adapter(prepared, out, options.repair_rank or 0, on_progress)
        made.append(measure_repair(prepared, adapter, out, attempt, draft, on_progress))
        if not made[0].kept:
            raise _NotKept
        write_adapter(draft.with_name(FOLDER), adapter)  # to be read by the check, and dropped with its draft

    def check(draft: Path) -> Certificate:
        folder, rows = draft.with_name(FOLDER), rows_to_check(None)
        return certify_adapter(out, folder, draft, rows, on_progress)

    try:
        write_certified(Output(place, options.overwrite), stamp(prepared.source, out), write, check)
    except _NotKept:
        for old in (place, beside(place)):
            old.unlink(missing_ok=True)
    return replace(made[0], path=place)


def try_repair(
    prepared: Prepared, rank: int, written: Path, attempt: Attempt, draft: Path, on_progress: OnProgress
) -> Repair:
    """Write the repair of `written` to `draft`, and measure it and the plan that spends its bytes on bits."""
    adapter = repair_adapter(prepared, written, rank, on_progress)
    return measure_repair(prepared, adapter, written, attempt, draft, on_progress)


def measure_repair(
    prepared: Prepared, adapter: Adapter, written: Path, attempt: Attempt, draft: Path, on_progress: OnProgress
) -> Repair:
    """The same of a repair that was made."""
    write_adapter_gguf(draft, adapter, open_base(written), f"repair of {written.stem}")
    with_repair = prepared.measured(written, adapter, on_progress)
    size_bytes = draft.stat().st_size
    bits = draft.with_name("bits.gguf")
    richer = prepared.attempt(prepared.within_bytes(attempt.file_bytes + size_bytes), bits, on_progress)
    bits.unlink()
    rank = adapter.config["r"]
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
    targets = sorted({module.rpartition(".")[2] for module in base.linears})
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": written.name, "r": rank,
        "lora_alpha": rank, "lora_dropout": 0.0, "bias": "none", "target_modules": targets,
    }  # fmt: skip
    return Adapter(config, pairs, contract_over(other, "repair"))
