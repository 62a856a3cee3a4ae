"""Houlsby adapters and MoLoRA, which no weight can hold: their formulas behind transformers are the oracle."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch
from example_runs import example_rows
from same_tokens import IDS
from stirred import Stir

from edgelora.base.decoder import build_decoder
from edgelora.base.model import open_base
from edgelora.cli import run
from edgelora.config import TrainConfig
from edgelora.errors import AdapterError, ExportError
from edgelora.peft.adapter import read_adapter
from edgelora.peft.blend import blend
from edgelora.peft.inject import attach
from edgelora.peft.lora_config import as_lora
from edgelora.pipeline.export import ExportOptions, export
from edgelora.pipeline.inspect import inspect
from edgelora.pipeline.merge import merge
from edgelora.training.run import run_training

RANK, ALPHA = 6, 9.0
METHODS = ["houlsby", "molora"]
trained = Stir(RANK, ALPHA, by=0.2).on


@pytest.fixture(scope="module")
def base(tiny):
    return open_base(tiny.path)


def houlsby(parts, x, y):  # noqa: ARG001
    down, down_bias, up, up_bias = (parts[f"adapter_{name}"] for name in "DdUu")
    return y + torch.nn.functional.gelu(y @ down.T + down_bias) @ up.T + up_bias


def molora(parts, x, y):
    """Expert by expert, with the file's tensors: its α/r is in B, and 6 ranks are 2, 1, 2 and 1 of 4 experts."""
    gates = torch.softmax(x @ parts["router"].T, -1)
    for expert, rows in enumerate([[0, 1], [2], [3, 4], [5]]):
        y = y + gates[..., expert, None] * (x @ parts["lora_A"][rows].T @ parts["lora_B"][:, rows].T)
    return y


@pytest.mark.parametrize(("method", "formula"), [("houlsby", houlsby), ("molora", molora)])
def test_it_is_the_formula_behind_each_layer_of_transformers(base, tiny, transformers_model, method, formula):
    decoder, adapter = trained(base, method)
    theirs = transformers_model(tiny)
    for name, parts in adapter.tensors.items():
        own = {part: torch.from_numpy(value) for part, value in parts.items()}
        theirs.get_submodule(name).register_forward_hook(lambda _, x, y, own=own: formula(own, x[0], y))
    found = theirs(IDS[None], labels=IDS[None])
    assert float((decoder.logits(IDS) - build_decoder(base).logits(IDS)).abs().max()) > 0.2
    torch.testing.assert_close(decoder.logits(IDS), found.logits[0].detach(), atol=1e-4, rtol=1e-5)
    hidden = decoder(IDS, torch.arange(len(IDS)), [0, len(IDS)])
    torch.testing.assert_close(decoder.nll(hidden[:-1], IDS[1:]).mean(), found.loss, atol=1e-5, rtol=0)


def test_a_bottleneck_stands_behind_both_projections_and_nowhere_else(base):
    _, adapter = trained(base, "houlsby")
    assert {name.rpartition(".")[2] for name in adapter.tensors} == {"o_proj", "down_proj"}
    assert len(adapter.tensors) == 2 * base.config.num_hidden_layers


@pytest.mark.parametrize("method", METHODS)
def test_half_of_one_is_half_of_what_its_layers_add(base, method):
    """As of every adapter, a layer at a time."""
    decoder, adapter = trained(base, method)
    name = next(iter(adapter.tensors))
    x = torch.randn(5, base.linears[name][1], generator=torch.Generator().manual_seed(0))
    live, plain = decoder.linears[name](x), build_decoder(base).linears[name](x)
    blend(decoder, [(adapter, 0.5)])
    torch.testing.assert_close(decoder.linears[name](x), (live + plain) / 2, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_products_in_bfloat16_stay_near(base, method):
    decoder, adapter = trained(base, method)
    name = next(iter(adapter.tensors))
    x = torch.randn(5, base.linears[name][1], generator=torch.Generator().manual_seed(0))
    narrow = decoder.linears[name](x.bfloat16())
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.float(), decoder.linears[name](x), atol=0.1, rtol=0.05)


@pytest.mark.parametrize("method", METHODS)
def test_one_learns_and_is_scored_in_torch(base, tiny, tmp_path, capsys, method):
    rows = example_rows(tmp_path / "rows.jsonl", 0, 8)
    run_training(TrainConfig(
        base=tiny.path, data=rows, out=tmp_path / "mine", method=method, rank=4, max_steps=4,
        batch_rows=2, warmup_steps=1, learning_rate=1e-2,
    ))  # fmt: skip
    decoder = build_decoder(base)
    attach(decoder, read_adapter(tmp_path / "mine", base.layers))
    assert float((decoder.logits(IDS) - build_decoder(base).logits(IDS)).abs().max()) > 1e-3
    losses = {}
    for words in ([], ["--adapter", str(tmp_path / "mine")]):
        assert run(["eval", str(tiny.path), *words, "--data", str(rows), "--in", "torch", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["engine"] == "torch"
        losses[bool(words)] = found["loss"]
    assert losses[True] < losses[False] - 0.05  # it learned these rows


@pytest.mark.parametrize("method", METHODS)
def test_no_door_leads_out_of_torch(base, tiny, tmp_path, method):
    _, adapter = trained(base, method, folder=tmp_path / "mine")
    with pytest.raises(ExportError, match="runs in torch alone"):
        export(tiny.path, tmp_path / "mine", tmp_path / "mine.gguf", ExportOptions(allow_unverified=True))
    with pytest.raises(ExportError, match=r"^mine: an? .* runs in torch alone"):
        merge(tiny.path, [(tmp_path / "mine", 1.0)], tmp_path / "merged.gguf", allow_unverified=True)
    for fold in (lambda: as_lora(adapter, base.linears, "-"), lambda: adapter.pair(adapter.linears[0])):
        with pytest.raises(AdapterError):
            fold()
    facts = asdict(inspect(tmp_path / "mine"))
    assert not facts["faults"]
    assert {facts[door]["answer"] for door in ("export", "merge", "chat")} == {"no"}
    assert "--in torch" in facts["export"]["why"]
