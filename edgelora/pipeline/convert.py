"""A base → a GGUF in floats that llama.cpp runs: converted, compared with the torch decoder, and only then named."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from converters.base_to_gguf import shortened_context, write_base_gguf
from edgelora.base.model import open_base
from edgelora.child import run_in_child
from edgelora.device import physical_cores
from edgelora.errors import CertificateError
from edgelora.evaluate.fidelity import Fidelity, fidelity
from edgelora.files.atomic import refuse_existing, staged
from edgelora.files.contract import CERTIFICATE_KEY
from edgelora.files.gguf import fill_reserved
from edgelora.pipeline.export import FLOAT_QUANTS
from edgelora.progress import OnProgress, Pace, Progress, silent

# llama.cpp rounds activations to the type of the weights that it multiplies them with: little over F16, more over BF16.
KL_LIMIT = {"F32": 1e-4, "F16": 1e-4, "BF16": 1e-2}
FLIP_LIMIT = {"F32": 0.05, "F16": 0.05, "BF16": 1.0}

CHECK_TEXTS = (
    "The harbour was quiet in the early morning. A few boats lay at the pier, and an old man mended his nets without "
    "looking up. “You are late,” he said. She laughed: it was only ten past six, after all.",
    "def mean(values: list[float]) -> float:\n    if not values:\n        return 0.0\n"
    "    return sum(values) / len(values)",
    "In 2024 the firm sold 1,234,567 units (up 12.5 %), earned $98.7m and employed 3,210 people in 14 countries.",
    "Größe, façade, naïve, señor, Þing, Łódź; Ελλάδα, Москва, 東京, 서울, नमस्ते 🙂👩\u200d🚀 — ½ ≠ 0,5"
    "\t\ttabs,  two blanks\n\n\nnew lines.",
)


@dataclass(frozen=True)
class Converted:
    """The file that was written, how far llama.cpp is from torch with it, and what its user should know about it."""

    path: Path
    size_bytes: int
    fidelity: Fidelity
    notes: list[str]


def convert(
    base_path: Path,
    out: Path,
    *,
    dtype: str = "F16",
    template: str | None = None,
    overwrite: bool = False,
    on_progress: OnProgress = silent,
) -> Converted:
    """Write the base at `base_path` to `out` as `dtype`, with a chosen chat template if it has none.

    Raises CertificateError, and leaves nothing behind, if llama.cpp does not compute what torch computes, or gives a
    text other token ids; ExportError and BaseModelError for what is known to differ.
    """
    refuse_existing(out, overwrite)
    base = open_base(base_path)
    if template is not None:
        base = base.with_template(template)
    with staged(out, overwrite=overwrite) as draft:
        write_base_gguf(draft, base, dtype, on_progress)
        found, other_ids = run_in_child(_compare, base_path, draft, on_progress=on_progress)
        if other_ids or not (found.kl_mean <= KL_LIMIT[dtype] and found.worst_flip_nats <= FLIP_LIMIT[dtype]):
            raise CertificateError(
                what=f"{out}: llama.cpp does not compute with it what torch does (mean KL {found.kl_mean:.2g}, allowed "
                f"{KL_LIMIT[dtype]:.2g}; {other_ids} of {len(CHECK_TEXTS)} texts have other token ids)",
                why="the conversion or this build of llama.cpp is wrong for this model",
                fix="please report it with the output of `edgelora doctor`; nothing was written",
            )
        certificate: dict[str, Any] = {"passed": True, "kl_limit": KL_LIMIT[dtype], "base": found.as_dict()}
        fill_reserved(draft, CERTIFICATE_KEY, json.dumps(certificate))
    notes = []
    if base.quant not in FLOAT_QUANTS:
        notes.append(
            f"these weights were {base.quant}: as {dtype} they take more room and are no better, and quantizing them "
            f"again adds a second error to the first"
        )
    if (shorter := shortened_context(base)) is not None:
        notes.append(
            f"its context ends at {shorter[0]} tokens instead of {shorter[1]}: llama.cpp computes something else beyond"
        )
    if base.template_source is None:
        notes.append("it has no chat template; --chat-template chatml gives it one")
    return Converted(out, out.stat().st_size, found, notes)


def _compare(base_path: Path, gguf: Path, on_progress: OnProgress) -> tuple[Fidelity, int]:
    """torch over the original against llama.cpp over the file, and how many texts get other ids there."""
    import torch

    from edgelora.base.decoder import build_decoder
    from edgelora.pipeline.evaluate import context_for
    from runtime.engine import Engine

    base, written = open_base(base_path), open_base(gguf)
    texts = [base.tokenizer.encode(text).ids[: written.context] for text in CHECK_TEXTS]
    torch.set_num_threads(physical_cores())
    decoder, pace = build_decoder(base), Pace(len(texts))
    with Engine(written, n_ctx=context_for(written, max(map(len, texts)))) as engine, torch.no_grad():
        ids = [engine.model.tokenize(text, parse_special=False)[: written.context] for text in CHECK_TEXTS]

        def pairs() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for tokens in texts:
                yield decoder.logits(torch.tensor(tokens)).numpy(), engine.logits([tokens], [list(range(len(tokens)))])
                _, eta = pace.step(len(tokens))
                on_progress(Progress("check", pace.done, pace.total, eta_s=eta))

        found = fidelity(pairs())
    return found, sum(ours != theirs for ours, theirs in zip(texts, ids, strict=True))
