"""A quantized base without what its adapter will bring: Q(W − B A), over which QPiSSA and LoftQ's later rounds train.

B A is the best of its rank that can be made of W (QPiSSA, arXiv:2404.02948: the principal part is spared the rounding),
or of what another quantized file of W lost (LoftQ, arXiv:2310.08659: one round of its turns for each file). The file is
no model by itself: its contract says what it is the rest of, and `--method loftq --original W` over it starts at the
best of W − Q(W − B A): B A, and what it can of the second rounding's loss. What was learned is exact over that file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from converters.adapter_to_gguf import write_adapter_gguf
from converters.merge import Part
from edgelora.base.hold import hold
from edgelora.base.model import FLOAT_QUANTS, Base, open_base
from edgelora.base.weights import Dense
from edgelora.errors import ConfigError
from edgelora.evaluate.thresholds import Limits, limits_of
from edgelora.files.contract import sha256_file
from edgelora.peft.adapter import TENSORS, Adapter, write_adapter
from edgelora.peft.pissa import leading
from edgelora.peft.start import require_rank
from edgelora.pipeline.certificate import Output, rows_to_check, stamp, types_of, write_certified
from edgelora.pipeline.contracts import contract_over
from edgelora.pipeline.export import Certificate, certify_adapter
from edgelora.pipeline.merge import MergeOptions, Wanted, write_gguf
from edgelora.progress import OnProgress, Pace, Progress, silent
from edgelora.training.original import RESIDUAL, Originals, require_original

FOLDER = "principal"  # beside the draft, for the time of the check


@dataclass(frozen=True)
class RestCertificate:
    """What llama.cpp and torch compute with the file and its missing ranks, as a LoRA over it.

    Without these it is no model: what llama.cpp rounds grows in it until the limit of its types (0.09 of 0.15 nats for
    SmolLM2-135M at Q4_0, where a whole file has 6e-3), and nothing is asked of it alone.
    """

    brought_back: Certificate
    limits: Limits

    @property
    def faults(self) -> list[str]:
        found = self.brought_back
        other = found.n_prompts - found.equal_ids
        ids = [f"{other} of {found.n_prompts} rows have other token ids"] if other else []
        return [*ids, *self.limits.faults(found.adapter)]

    @property
    def sentence(self) -> str:
        """What was compared, for who waits for the file."""
        found = self.brought_back.adapter
        return (
            f"checked on {found.n_tokens} tokens, these ranks as a LoRA over it: llama.cpp computes what torch does "
            f"(mean KL {found.kl_mean:.2g}, limit {self.limits.kl_mean:.2g})"
        )

    def as_dict(self) -> dict[str, Any]:
        found = self.brought_back
        return {
            "passed": not self.faults, "n_rows": found.n_prompts, "equal_ids": found.equal_ids,
            "alone": found.floor.as_dict(), "with_ranks": found.adapter.as_dict(), "kl_limit": self.limits.kl_mean,
        }  # fmt: skip


@dataclass(frozen=True)
class Residual:
    """The file that was written, and how many ranks were taken out of its weights."""

    path: Path
    kind: str
    rank: int
    size_bytes: int
    certificate: RestCertificate


def write_residual(
    original: Path, out: Output, quant: str, rank: int, over: Path | None = None, on_progress: OnProgress = silent
) -> Residual:
    """Take `rank` ranks out of the weights of `original` (16 bits, GGUF or checkpoint) and write the rest as `quant`.

    over: a quantized file of it, this command's own or any other, what it lost being taken out instead of the principal
    part. Raises ConfigError if `original` is quantized, or not the original of `over`; CertificateError, the file kept
    aside, if llama.cpp does not compute with it what torch does.
    """
    base, lossy = open_base(original), None if over is None else open_base(over)
    if base.quant not in FLOAT_QUANTS:
        raise ConfigError(
            what=f"{original}: it is {base.quant}",
            why="what is taken out of its weights must be spared the rounding, and this is rounded already",
            fix="start from the F16, BF16 or F32 model",
        )
    if lossy is not None:
        require_original(base, lossy)
    wanted = Wanted.read(quant, MergeOptions())
    adapter = principal(base, rank, lossy, on_progress)

    def write(draft: Path) -> None:
        folder = draft.with_name(FOLDER)
        # to be read by the check, and dropped with its draft; its contract is that of the original, not of the rest
        write_adapter(folder, replace(adapter, contract=None))
        part = Part(adapter, -1.0, sha256_file(folder / TENSORS), f"{rank} ranks of {base.path.stem}")
        write_gguf(draft, base, [part], wanted, on_progress)

    def check(draft: Path) -> RestCertificate:
        folder = draft.with_name(FOLDER)
        lora = folder.with_suffix(".gguf")
        write_adapter_gguf(lora, replace(adapter, contract=None), open_base(draft), FOLDER, "F32")
        found = certify_adapter(draft, folder, lora, rows_to_check(None), on_progress)
        return RestCertificate(found, limits_of(types_of(draft)))

    made_from = stamp(original, *([] if over is None else [over]))
    certificate = write_certified(out, made_from, write, check)
    return Residual(out.path, wanted.kind, rank, out.path.stat().st_size, certificate)


def principal(base: Base, rank: int, lossy: Base | None, on_progress: OnProgress = silent) -> Adapter:
    """The `rank` leading directions of every linear layer's weight, or of what it lost in `lossy`, as a LoRA."""
    weights, generator = Originals(base), torch.Generator().manual_seed(0)
    pairs: dict[str, Mapping[str, np.ndarray]] = {}
    pace = Pace(len(base.linears))
    for module in base.linears:
        weight = weights(module)
        require_rank(Dense(weight), rank, "a residual")
        if lossy is not None:
            weight -= hold(lossy.tensors.matrix(f"{module}.weight"), "blocks").dequantize()
        u, s, vt = leading(weight, rank, generator)
        root = s.sqrt()
        pairs[module] = {"lora_A": (root[:, None] * vt).numpy(), "lora_B": (u * root).numpy()}
        _, eta = pace.step(0)
        on_progress(Progress("residual", pace.done, pace.total, eta_s=eta))
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base.path.name, "r": rank,
        "lora_alpha": rank, "lora_dropout": 0.0, "bias": "none",
        "target_modules": sorted({module.rpartition(".")[2] for module in base.linears}),
    }  # fmt: skip
    return Adapter(config, pairs, contract_over(base, RESIDUAL, training={"rank": rank}))
