"""New rows of tokens as a LoRA of one-hot rows: transformers with these rows in its matrices is the oracle."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from same_tokens import IDS

from converters.adapter_to_gguf import write_pairs
from converters.token_pairs import token_pairs
from converters.untie import write_untied
from edgelora.base.decoder import build_decoder
from edgelora.base.model import open_base
from edgelora.cli import run
from edgelora.errors import AdapterError, ExportError
from edgelora.evaluate.fidelity import fidelity
from edgelora.files.adapter_check import check_adapter, own_shapes
from edgelora.files.gguf import GGUFFile
from edgelora.peft.adapter import Adapter, write_adapter
from edgelora.peft.change import LoraPair
from edgelora.peft.inject import adapter_config, collect, inject
from edgelora.peft.targets import Where
from runtime.scorer import ScoringEngine

TOKENS = np.array([3, 77, 500])
IDS = IDS.clone()
IDS[[2, 9, 10, 20]] = torch.tensor([77, 500, 77, 3])


def shapes(base):
    return {name: info.shape for name, info in base.file.tensors.items()}


@pytest.mark.parametrize("tied", [True, False], ids=["untied from a tied one", "with a head of its own"])
def test_llama_cpp_computes_with_the_new_rows(make_tiny, transformers_model, tmp_path, tied):
    tiny, draw = make_tiny(tied=tied), np.random.default_rng(0)
    base = open_base(tiny.path)
    rows = {}
    weights = dict(tiny.weights)
    for module in ("model.embed_tokens", *([] if tied else ["lm_head"])):
        values = weights[f"{module}.weight"].copy()
        values[TOKENS] += draw.normal(0, 0.3, (3, 256)).astype(np.float32)
        weights[f"{module}.weight"], rows[module] = values, (TOKENS, values[TOKENS])
    if tied:
        write_untied(tmp_path / "untied.gguf", base)
        base = open_base(tmp_path / "untied.gguf")
        rows["lm_head"] = rows["model.embed_tokens"]
    with torch.no_grad():
        wanted = transformers_model(replace(tiny, weights=weights))(IDS[None]).logits[0].numpy()
        plain = transformers_model(tiny)(IDS[None]).logits[0].numpy()
    write_pairs(tmp_path / "a.gguf", token_pairs(base, rows), "llama", "a", "F32", None)
    with ScoringEngine(base, n_ctx=64, threads=1) as engine:
        engine.load("a", tmp_path / "a.gguf", allow_unverified=True)
        engine.use({"a": 1.0})
        theirs = engine.logits([IDS.tolist()], [list(range(len(IDS)))])
    found = fidelity([(wanted, theirs)])
    assert found.kl_mean <= 1e-5
    assert found.same_top == 1.0
    assert fidelity([(plain, theirs)]).kl_mean > 0.1
    file = GGUFFile(tmp_path / "a.gguf")
    assert own_shapes(file) == {"token_embd.weight": (512, 256), "output.weight": (512, 256)}
    check_adapter(file.path, "llama", own_shapes(file))  # without a base at hand


def test_over_a_tied_embedding_it_is_refused_before_llama_cpp_sees_it(make_tiny, tmp_path):
    tied, untied = (open_base(make_tiny(tied=one).path) for one in (True, False))
    rows = {"model.embed_tokens": (TOKENS, np.zeros((3, 256), np.float32))}
    with pytest.raises(ExportError, match="its embedding is its head too") as e:
        token_pairs(tied, rows)
    assert "edgelora untie" in e.value.fix
    write_pairs(tmp_path / "a.gguf", token_pairs(untied, rows), "llama", "a", "F32", None)
    check_adapter(tmp_path / "a.gguf", "llama", shapes(untied))
    with pytest.raises(AdapterError, match="the embedding is this base's head too"):
        check_adapter(tmp_path / "a.gguf", "llama", shapes(tied))


@pytest.mark.parametrize(
    ("a", "b", "said"),
    [
        ((511, 3), (256, 3), r"lora_a is \(511, 3\), expected \(512, 3\)"),
        ((512, 2), (256, 3), r"lora_a is \(512, 2\), expected \(512, 3\)"),
        ((512, 3), (255, 3), r"lora_b is \(255, 3\), expected \(256, 3\)"),
        ((3, 512), (256, 3), r"lora_a is \(3, 512\), expected \(512, 3\)"),
    ],
)
def test_rows_of_another_shape_never_reach_llama_cpp(make_tiny, tmp_path, a, b, said):
    base = open_base(make_tiny(tied=False).path)
    pair = LoraPair(np.zeros(a, np.float32), np.zeros(b, np.float32))
    write_pairs(tmp_path / "a.gguf", {"token_embd.weight": pair}, "llama", "a", "F32", None)
    with pytest.raises(AdapterError, match=said):
        check_adapter(tmp_path / "a.gguf", "llama", shapes(base))


def test_rows_that_were_trained_leave_as_an_adapter_where_the_head_is_its_own(make_tiny, tmp_path, capsys):
    for tied, door in ((False, "adapter"), (True, "merged")):
        tiny = make_tiny(tied=tied)
        base = open_base(tiny.path)
        decoder, where, folder = build_decoder(base), Where(token_indices=tuple(TOKENS.tolist())), tmp_path / door
        inject(decoder, "token_rows", 1, 1.0, seed=0, targets=where)
        with torch.no_grad():
            for parameter in decoder.parameters():
                parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        config = adapter_config(decoder, "token_rows", 1, 1.0, str(base.path), where)
        write_adapter(folder, Adapter(config, collect(decoder)))
        words = ["export", str(tiny.path), str(folder), "--out", f"{folder}.gguf", "--allow-unverified-base", "--json"]
        assert run([*words, "--plan"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["door"] == door
        assert ("edgelora untie" in told["others"].get("adapter", "")) == tied
        assert run(words) == 0
        assert json.loads(capsys.readouterr().out)["certificate"]["passed"]
