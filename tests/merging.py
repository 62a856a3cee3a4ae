"""An adapter behind a door: llama.cpp computes with the file what torch did with the adapter."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from converters.adapter_to_gguf import write_adapter_gguf
from converters.merge import Part
from edgelora.base.decoder import build_decoder
from edgelora.base.model import Base, open_base
from edgelora.evaluate.fidelity import Fidelity, fidelity
from edgelora.evaluate.thresholds import FLOATS
from edgelora.peft.adapter import Adapter, read_adapter
from edgelora.pipeline.merge import MergeOptions, Wanted, write_gguf
from runtime.scorer import ScoringEngine


def require_merged_computes(base: Base, folder: Path, ids: Tensor, live: Tensor, atol: float = 1e-5) -> None:
    """Merged as F32, torch too. `live` (T, V): the logits of `ids` (T,) with the adapter in `folder` on; the merged
    file is written beside it."""
    parts = [Part(read_adapter(folder, base.layers), 1.0, "0" * 64, "mine")]
    out = folder.with_name("merged.gguf")
    write_gguf(out, base, parts, Wanted.read("F32", MergeOptions()))
    merged = open_base(out)
    torch.testing.assert_close(build_decoder(merged).logits(ids), live, atol=atol, rtol=1e-5)
    with ScoringEngine(merged, n_ctx=64, threads=1) as engine:
        theirs = engine.logits([ids.tolist()], [list(range(len(ids)))])
    found = fidelity([(live.numpy(), theirs)])
    assert found.kl_mean <= 1e-5
    assert found.same_top == 1.0 or found.worst_flip_nats <= FLOATS.flip_nats  # two tokens as likely as each other


def as_a_lora(base: Base, adapter: Adapter, out: Path, ids: Tensor, live: Tensor) -> Fidelity:
    """The same of a LoRA in F32 over the base, written to `out`: how far llama.cpp's logits are from `live`."""
    write_adapter_gguf(out, adapter, base, "a", "F32")
    with ScoringEngine(base, n_ctx=64, threads=1) as engine:
        engine.load("a", out, allow_unverified=True)
        engine.use({"a": 1.0})
        theirs = engine.logits([ids.tolist()], [list(range(len(ids)))])
    return fidelity([(live.detach().numpy(), theirs)])
