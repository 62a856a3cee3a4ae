"""Doors over three architectures: what llama.cpp computes with the files is what torch computed with the adapter.

Others stand beside what they are about: a LoRA and soft prompts in test_exit_plan.py, patched bases in test_patch.py,
merged vectors in test_vectors.py, the real model in test_real_doors.py. Everything is F32 here, whose rounding is a
mean KL far below 1e-4 and changes no likeliest token.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from merging import require_merged_computes
from same_tokens import IDS
from stirred import Stir
from test_vectors import FAMILIES, family
from torch import Tensor

from converters.adapter_to_gguf import write_adapter_gguf
from converters.untie import write_untied
from edgelora.base.decoder import build_decoder
from edgelora.base.model import Base, open_base
from edgelora.evaluate.fidelity import fidelity
from edgelora.peft.adapter import Adapter
from edgelora.peft.targets import Where
from runtime.scorer import ScoringEngine

__all__ = ["family"]

TOKENS = (3, 77, 500)
ROW = IDS.clone()
ROW[[2, 9, 10, 20]] = torch.tensor([77, 500, 77, 3])
INVOKED = (500, 77)  # at 9 alone

stirred = Stir(rank=4, alpha=6.0, by=0.1).on


def require_llama_cpp_computes(base: Base, adapter: Adapter, out: Path, live: Tensor) -> None:
    """With the adapter as a LoRA in `out`, which may wait for its invocation, the logits `live` (T, V) of ROW."""
    write_adapter_gguf(out, adapter, base, "a", "F32")
    with ScoringEngine(base, n_ctx=64, threads=1) as engine:
        engine.load_own("a", out)
        engine.use({"a": 1.0})
        theirs = engine.logits([ROW.tolist()], [list(range(len(ROW)))])
    found = fidelity([(live.numpy(), theirs)])
    assert found.kl_mean <= 1e-4
    assert found.same_top == 1.0


@pytest.mark.parametrize("name", FAMILIES)
def test_an_alora_wakes_in_llama_cpp_where_it_does_in_torch(family, tmp_path, name):
    base = open_base(family(name).gguf)
    decoder, adapter = stirred(base, "alora", Where(alora_invocation_tokens=INVOKED))
    live, plain = decoder.logits(ROW), build_decoder(base).logits(ROW)
    assert torch.equal(live[:9], plain[:9])
    assert float((live[9:] - plain[9:]).abs().max()) > 0.1
    require_llama_cpp_computes(base, adapter, tmp_path / "a.gguf", live)


@pytest.mark.parametrize("name", FAMILIES)
def test_new_rows_of_tokens_leave_as_a_lora_over_the_untied_base(family, tmp_path, name):
    """Gemma multiplies what its embedding gives, the new rows too."""
    write_untied(tmp_path / "untied.gguf", open_base(family(name).gguf))
    base = open_base(tmp_path / "untied.gguf")
    decoder, adapter = Stir(rank=1, alpha=1.0, by=0.5).on(base, "token_rows", Where(token_indices=TOKENS))
    assert len(adapter.token_rows) == 2
    live = decoder.logits(ROW)
    require_llama_cpp_computes(base, adapter, tmp_path / "a.gguf", live)
    assert float((live - build_decoder(base).logits(ROW)).abs().max()) > 0.1


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("method", ["lora", "dora", "full"])
def test_merged_it_computes_the_same_in_torch_and_llama_cpp(family, tmp_path, name, method):
    """`full` has every matrix, the norms and the embedding, which is the head too."""
    base = open_base(family(name).gguf)
    decoder, _ = stirred(base, method, folder=tmp_path / "mine")
    live = decoder.logits(ROW).detach()
    assert float((live - build_decoder(base).logits(ROW)).abs().max()) > 0.1
    require_merged_computes(base, tmp_path / "mine", ROW, live)
