"""Adapter → checked GGUF: convert, compare torch with llama.cpp on the same tokens, sign, and only then name it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from converters.adapter_to_gguf import write_adapter_gguf
from edgelora.base.model import Base, open_base
from edgelora.child import run_in_child
from edgelora.data.conversation import Conversation, Message, read_conversations
from edgelora.data.encode import encode_conversation, turn_weights
from edgelora.data.pack import IGNORE, pack
from edgelora.device import physical_cores
from edgelora.errors import AdapterError, CertificateError, DataError
from edgelora.evaluate.fidelity import Fidelity, fidelity
from edgelora.files.atomic import refuse_existing, staged, write_text
from edgelora.files.contract import CERTIFICATE_KEY, FILE_NAME, require_same_base
from edgelora.files.gguf import fill_reserved
from edgelora.peft.adapter import Adapter, read_adapter
from edgelora.pipeline.evaluate import context_for
from edgelora.pipeline.tokenize import difference_of_chat, tokenize_chat
from edgelora.progress import OnProgress, Pace, Progress, silent

CHECKED_ROWS, ROWS_TOGETHER = 64, 8

# Over float weights torch and llama.cpp differ by rounding alone: only tokens as good as tied may change places.
FLOAT_KL, FLOAT_FLIP_NATS, FLOAT_QUANTS = 1e-4, 0.05, ("F32", "F16", "BF16")
# Over a quantized base llama.cpp rounds activations to 8 bits. That noise is measured on the base without the adapter,
# and the adapter's must be like it: measured ratios on SmolLM2-135M are 0.3 to 1.6, a wrong rotary permutation gives
# over 20.
NOISE_RATIO, NOISE_FLOOR, SAME_TOP_SLACK = 3.0, 2e-3, 0.05

DEFAULT_CHECK = tuple(
    Conversation((Message("user", question), Message("assistant", answer)))
    for question, answer in (
        ("What is the capital of France?", "The capital of France is Paris."),
        ("Write a short note to thank a colleague.", "Thank you for your help with the report, it was a great relief."),
        ("How do I boil an egg?", "Put it in boiling water for eight minutes, then cool it under cold water."),
        ("Turn 3.5 km into metres.", "3.5 km are 3500 metres."),
        ("List three colours.", "Red, green and blue."),
        ("Why does ice float on water?", "Ice is less dense than water because its molecules are further apart."),
        ("Give me a JSON object with a name.", '{"name": "Ada"}'),
        ("Translate 'good morning' into French.", "Bonjour."),
    )
)


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
    def passed(self) -> bool:
        return (
            self.equal_ids == self.n_prompts
            and self.adapter.kl_mean <= self.kl_limit
            and (
                self.adapter.same_top >= self.same_top_limit
                or (self.base_quant in FLOAT_QUANTS and self.adapter.worst_flip_nats <= FLOAT_FLIP_NATS)
            )
        )

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
    allow_unverified: bool = False,
    overwrite: bool = False,
    on_progress: OnProgress = silent,
) -> Certificate:
    """Write `out`, a GGUF LoRA for llama.cpp, and return its certificate (also kept inside, and in edgelora.json).

    `data`: rows whose prompts and answers are compared (the first 64; without it, a few built-in ones).
    Raises CertificateError, and leaves nothing behind, if llama.cpp does not compute what torch computes.
    """
    refuse_existing(out, overwrite)
    base = open_base(base_path)
    adapter = read_checked(adapter_path, base, allow_unverified=allow_unverified)
    rows = _rows_to_check(data) if data else list(DEFAULT_CHECK)
    with staged(out, overwrite=overwrite) as draft:
        write_adapter_gguf(draft, adapter, base, out.stem, dtype)
        certificate = run_in_child(_certify, base_path, adapter_path, draft, rows, on_progress=on_progress)
        if not certificate.passed:
            raise CertificateError(
                what=f"{out}: llama.cpp does not compute with it what torch does "
                f"(mean KL {certificate.adapter.kl_mean:.2g}, allowed {certificate.kl_limit:.2g}; "
                f"same top {certificate.adapter.same_top:.1%}; equal ids {certificate.equal_ids} "
                f"of {certificate.n_prompts})",
                why="the export or this build of llama.cpp is wrong for this model",
                fix="please report it with the output of `edgelora doctor`; nothing was written",
            )
        if adapter.contract is not None:
            fill_reserved(draft, CERTIFICATE_KEY, json.dumps(certificate.as_dict()))
    if adapter.contract is not None:
        signed = adapter.contract.model_copy(update={"certificate": certificate.as_dict()})
        write_text(adapter_path / FILE_NAME, signed.model_dump_json(indent=2) + "\n", overwrite=True)
    return certificate


def _rows_to_check(data: Path) -> list[Conversation]:
    """The first rows in which something is learned: what comes before it is compared with it."""
    rows = [row for row in read_conversations(data) if any(turn_weights(row))][:CHECKED_ROWS]
    if not rows:
        raise DataError(
            what=f"{data}: no row has an answer to compare",
            why="every assistant message in it has the weight 0",
            fix="pass other rows with --data, or leave it out",
        )
    return rows


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


def _certify(
    base_path: Path, adapter_path: Path, gguf: Path, rows: Sequence[Conversation], on_progress: OnProgress
) -> Certificate:
    """Both models on the same tokens in equal shapes: first the bare base, then with the adapter."""
    import torch

    from edgelora.base.decoder import build_decoder
    from edgelora.peft.inject import attach
    from runtime.engine import Engine

    base = open_base(base_path)
    adapter = read_adapter(adapter_path, base.linears)
    base = base.as_trained(adapter.contract)
    examples = [encode_conversation(row, base.tokenizer, base.template) for row in rows]
    groups = [examples[i : i + ROWS_TOGETHER] for i in range(0, len(examples), ROWS_TOGETHER)]
    n_ctx = context_for(base, max(len(e) for e in examples))
    torch.set_num_threads(physical_cores())
    decoder = build_decoder(base)
    pace = Pace(2 * len(groups))
    with Engine(base, n_ctx=n_ctx, n_sequences=ROWS_TOGETHER) as engine, torch.no_grad():
        texts = (tokenize_chat(base.tokenizer, base.template, row) for row in rows)
        equal = sum(difference_of_chat(base.tokenizer, engine.model, text) is None for text in texts)

        def pairs() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for group in groups:
                batch = pack(group)
                tokens, positions = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.positions)
                hidden = decoder(tokens, positions, list(batch.segment_starts), batch.prefix)
                reference = decoder.logits_of(hidden[torch.from_numpy(batch.labels != IGNORE)]).numpy()
                wanted = [(e.loss_mask.nonzero()[0] - 1).tolist() for e in group]  # what predicts the learned tokens
                yield reference, engine.logits([e.input_ids.tolist() for e in group], wanted)
                speed, eta = pace.step(batch.n_tokens)
                on_progress(Progress("check", pace.done, pace.total, tokens_per_s=speed, eta_s=eta))

        floor = fidelity(pairs())
        attach(decoder, adapter)
        engine.load("candidate", gguf, allow_unverified=True)
        engine.use({"candidate": 1.0})
        adapted = fidelity(pairs())
    exact = base.quant in FLOAT_QUANTS
    return Certificate(
        base_quant=base.quant,
        n_prompts=len(examples),
        equal_ids=equal,
        floor=floor,
        adapter=adapted,
        kl_limit=FLOAT_KL if exact else max(NOISE_FLOOR, NOISE_RATIO * floor.kl_mean),
        same_top_limit=1.0 if exact else floor.same_top - SAME_TOP_SLACK,
    )
