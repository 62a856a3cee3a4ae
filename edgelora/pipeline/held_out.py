"""What a written file is measured with, in child processes: torch over it against torch over its source, held out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from converters.imatrix import Importance
from edgelora.base.model import open_base
from edgelora.device import choose_products, compute_threads, computing
from edgelora.evaluate.fidelity import Fidelity, fidelity
from edgelora.peft.adapter import Adapter
from edgelora.pipeline.calibration import Windows
from edgelora.progress import OnProgress, Pace, Progress


def collect(source: Path, windows: np.ndarray, on_progress: OnProgress) -> Importance:
    """The importance matrix of a model, head and all, on `windows` (n, T)."""
    from edgelora.base.decoder import build_decoder
    from edgelora.base.importance import collect_importance

    base, pace = open_base(source), Pace(len(windows))

    def step(tokens: int) -> None:
        speed, eta = pace.step(tokens)
        on_progress(Progress("importance", pace.done, pace.total, tokens_per_s=speed, eta_s=eta))

    with computing(choose_products(), compute_threads()):
        found = collect_importance(build_decoder(base), base, list(windows), output=True, on_sequence=step)
    sums = {name: values.astype(np.float32) for name, values in found.sums.items()}
    return Importance(sums, found.counts, chunks=len(windows), chunk_tokens=windows.shape[1])


def held_out_kl(
    source: Path, written: Path, adapter: Adapter | None, windows: Windows, on_progress: OnProgress
) -> Fidelity:
    """KL(source ‖ written) at the scored positions of `windows`, `adapter` over what was written.

    Both in torch, in float32 products over what each file holds: bits are measured here, not llama.cpp's rounding of
    activations, which its own floor of 2e-3 to 7e-3 nats would hide small differences in.
    """
    import torch

    from edgelora.base.decoder import build_decoder
    from edgelora.peft.inject import attach

    pace = Pace(len(windows.ids))
    with computing(choose_products(), compute_threads()), torch.no_grad():
        reference, candidate = build_decoder(open_base(source)), build_decoder(open_base(written))
        attach(candidate, adapter)

        def outputs() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for ids in windows.ids:
                tokens = torch.from_numpy(ids)
                places = torch.arange(len(tokens))
                hidden = [model(tokens, places, [0, len(tokens)])[windows.scored] for model in (reference, candidate)]
                yield reference.logits_of(hidden[0]).numpy(), candidate.logits_of(hidden[1]).numpy()
                speed, eta = pace.step(len(tokens))
                on_progress(Progress("held out", pace.done, pace.total, tokens_per_s=speed, eta_s=eta))

        return fidelity(outputs())
