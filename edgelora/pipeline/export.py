"""Adapter → checked GGUF: convert, compare torch with llama.cpp on the same tokens, sign, and only then name it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters.adapter_to_gguf import write_adapter_gguf
from edgelora.base.model import FLOAT_QUANTS, Base, open_base
from edgelora.child import run_in_child
from edgelora.data.conversation import Conversation
from edgelora.data.encode import encode_conversation
from edgelora.device import choose_products, compute_threads, computing
from edgelora.errors import AdapterError
from edgelora.evaluate.fidelity import Fidelity, fidelity
from edgelora.evaluate.thresholds import FLOATS
from edgelora.files.atomic import refuse_existing, write_text
from edgelora.files.contract import FILE_NAME, require_same_base
from edgelora.peft.adapter import Adapter, read_adapter
from edgelora.pipeline.certificate import Output, stamp, write_certified
from edgelora.pipeline.check_rows import CHECKED_ROWS, rows_to_check
from edgelora.pipeline.compare import ROWS_TOGETHER, InLlamaCpp, pairs
from edgelora.pipeline.evaluate import context_for
from edgelora.pipeline.tokenize import difference_of_chat, tokenize_chat
from edgelora.progress import OnProgress, Pace, Progress, silent

# Over float weights the limits are those of float models. Over a quantized base llama.cpp rounds activations to 8 bits.
# That noise is measured on the base without the adapter, and the adapter's must be like it: measured ratios on
# SmolLM2-135M are 0.3 to 1.6, a wrong rotary permutation gives over 20.
NOISE_RATIO, NOISE_FLOOR, SAME_TOP_SLACK = 3.0, 2e-3, 0.05


@dataclass(frozen=True)
class Certificate:
    """What was compared and what came out. `floor` is torch against llama.cpp on the base without the adapter."""

    base_quant: str
    n_prompts: int
    equal_ids: int
    floor: Fidelity
    adapter: Fidelity
    kl_limit: float
    same_top_limit: float

    @property
    def faults(self) -> list[str]:
        found, faults = self.adapter, []
        if self.equal_ids != self.n_prompts:
            faults.append(f"{self.n_prompts - self.equal_ids} of {self.n_prompts} rows have other token ids")
        if not found.kl_mean <= self.kl_limit:
            faults.append(f"mean KL {found.kl_mean:.2g}, allowed {self.kl_limit:.2g}")
        tied = self.base_quant in FLOAT_QUANTS and found.worst_flip_nats <= FLOATS.flip_nats
        if not (found.same_top >= self.same_top_limit or tied):
            faults.append(f"same top {found.same_top:.1%}, allowed {self.same_top_limit:.1%}")
        return faults

    @property
    def passed(self) -> bool:
        return not self.faults

    def as_dict(self) -> dict[str, Any]:
        return {
            "passed": self.passed, "base_quant": self.base_quant, "n_prompts": self.n_prompts,
            "equal_ids": self.equal_ids, "floor": self.floor.as_dict(), "adapter": self.adapter.as_dict(),
            "kl_limit": self.kl_limit, "same_top_limit": self.same_top_limit,
        }  # fmt: skip


def export(
    base_path: Path,
    adapter_path: Path,
    out: Path,
    *,
    dtype: str = "F16",
    data: Path | None = None,
    n_rows: int = CHECKED_ROWS,
    allow_unverified: bool = False,
    overwrite: bool = False,
    on_progress: OnProgress = silent,
) -> Certificate:
    """Write `out`, a GGUF LoRA for llama.cpp, and return its certificate (also kept inside, and in edgelora.json).

    `data`: rows whose prompts and answers are compared (the first `n_rows`; without it, a few built-in ones).
    Raises CertificateError, and keeps the file aside as `out`.rejected, if llama.cpp does not compute what torch
    computes.
    """
    refuse_existing(out, overwrite)
    made_from = stamp(base_path, adapter_path)
    base = open_base(base_path)
    adapter = read_checked(adapter_path, base, allow_unverified=allow_unverified)
    rows = rows_to_check(data, n_rows)
    certificate = write_certified(
        Output(out, overwrite),
        made_from,
        lambda draft: write_adapter_gguf(draft, adapter, base, out.stem, dtype),
        lambda draft: run_in_child(certify_adapter, base_path, adapter_path, draft, rows, on_progress=on_progress),
    )
    if adapter.contract is not None:
        signed = adapter.contract.model_copy(update={"certificate": certificate.as_dict()})
        write_text(adapter_path / FILE_NAME, signed.model_dump_json(indent=2) + "\n", overwrite=True)
    return certificate


def read_checked(path: Path, base: Base, *, allow_unverified: bool) -> Adapter:
    """Read an adapter folder and hold it to its contract with `base`."""
    adapter = read_adapter(path, base.linears)
    if adapter.contract is not None:
        require_same_base(adapter.contract, base.as_trained(adapter.contract).identity, str(path), str(base.path))
    elif not allow_unverified:
        raise AdapterError(
            what=f"{path}: it does not say which base it belongs to",
            why=f"there is no {FILE_NAME} in it; on another base of the same shape it would answer nonsense",
            fix="pass --allow-unverified-base if you know that it was trained on this base",
        )
    return adapter


def certify_adapter(
    base_path: Path, adapter_path: Path, gguf: Path, rows: Sequence[Conversation], on_progress: OnProgress
) -> Certificate:
    """Both models on the same tokens in equal shapes: first the bare base, then with the adapter."""
    import torch

    from edgelora.base.decoder import build_decoder
    from edgelora.peft.inject import attach
    from runtime.scorer import ScoringEngine

    base = open_base(base_path)
    adapter = read_adapter(adapter_path, base.linears)
    base = base.as_trained(adapter.contract)
    examples = [encode_conversation(row, base.tokenizer, base.template) for row in rows]
    groups = [examples[i : i + ROWS_TOGETHER] for i in range(0, len(examples), ROWS_TOGETHER)]
    n_ctx = context_for(base, max(len(e) for e in examples))
    pace = Pace(2 * len(groups))

    def step(tokens: int) -> None:
        speed, eta = pace.step(tokens)
        on_progress(Progress("check", pace.done, pace.total, tokens_per_s=speed, eta_s=eta))

    with (
        computing(choose_products(), compute_threads()),
        ScoringEngine(base, n_ctx=n_ctx, n_sequences=ROWS_TOGETHER) as engine,
        torch.no_grad(),
    ):
        texts = (tokenize_chat(base.tokenizer, base.template, row) for row in rows)
        equal = sum(difference_of_chat(base.tokenizer, engine.model, text) is None for text in texts)
        decoder, run = build_decoder(base), InLlamaCpp(engine)
        floor = fidelity(pairs(decoder, run.logits, groups, step))
        attach(decoder, adapter)
        engine.load("candidate", gguf, allow_unverified=True)
        engine.use({"candidate": 1.0})
        adapted = fidelity(pairs(decoder, run.logits, groups, step))
    exact = base.quant in FLOAT_QUANTS
    return Certificate(
        base_quant=base.quant,
        n_prompts=len(examples),
        equal_ids=equal,
        floor=floor,
        adapter=adapted,
        kl_limit=FLOATS.kl_mean if exact else max(NOISE_FLOOR, NOISE_RATIO * floor.kl_mean),
        same_top_limit=FLOATS.same_top if exact else floor.same_top - SAME_TOP_SLACK,
    )
