"""A base without its principal part: with the start of an adapter over it, it is nearer to the original than Q(W)."""

from __future__ import annotations

import json

import pytest
import torch
import typer
from example_runs import configs, example_rows
from gguf.constants import GGMLQuantizationType as Type
from typer.testing import CliRunner

from edgelora.base import ggml
from edgelora.base.decoder import build_decoder
from edgelora.base.model import open_base
from edgelora.cli.residual import residual
from edgelora.errors import ConfigError
from edgelora.files.contract import read_contract
from edgelora.peft.adapter import read_adapter
from edgelora.peft.inject import attach, inject
from edgelora.pipeline import residual as residuals
from edgelora.pipeline.certificate import Output
from edgelora.pipeline.residual import principal, write_residual
from edgelora.training.original import Originals
from edgelora.training.run import run_training
from edgelora.training.settle import settle

RANK = 8


@pytest.fixture(scope="module")
def original(tiny):
    return open_base(tiny.path)


@pytest.fixture(scope="module")
def rest(tiny, tmp_path_factory):
    """Q4_0 without the principal part."""
    path = tmp_path_factory.mktemp("rest") / "rest.gguf"
    made = write_residual(tiny.path, Output(path), "Q4_0", RANK)
    assert made.certificate.faults == []
    return open_base(path)


@pytest.fixture(scope="module")
def settings(rest, tiny, tmp_path_factory):
    return configs(
        base=rest.path, data=example_rows(tmp_path_factory.mktemp("rows") / "train.jsonl", 0, 4), method="loftq",
        original=tiny.path, rank=RANK, max_steps=2, dtype="f32", device="cpu",
    )  # fmt: skip


def left(base, original, name):
    """What of the original's weight the base's blocks lack, (d_out, d_in)."""
    return Originals(original)(name) - build_decoder(base).linears[name].weight.dequantize()


def test_the_file_holds_what_ggml_makes_of_the_weights_without_their_principal_part(rest, original):
    adapter = principal(original, RANK, None)
    for name, linear in build_decoder(rest).linears.items():
        weight, parts = Originals(original)(name).numpy(), adapter.tensors[name]
        without = weight - parts["lora_B"] @ parts["lora_A"]
        wanted = ggml.dequantize(ggml.quantize(without, Type.Q4_0), Type.Q4_0, weight.shape[1])
        torch.testing.assert_close(linear.weight.dequantize(), torch.from_numpy(wanted), atol=1e-6, rtol=0)


def test_with_the_adapters_start_it_is_nearer_to_the_original_than_both_quantized_and_loftq(rest, original, make_tiny):
    """Frobenius, over all layers: of Q(W), of LoftQ's first round over it, of its second, and of QPiSSA."""
    plain = open_base(make_tiny(Type.Q4_0).path)
    away = {"plain": 0.0, "loftq": 0.0, "qpissa": 0.0}
    for name in original.linears:
        for key, base, rank in (("plain", plain, 0), ("loftq", plain, RANK), ("qpissa", rest, RANK)):
            away[key] += float(torch.linalg.svdvals(left(base, original, name))[rank:].square().sum())
    assert away["qpissa"] < away["loftq"] < away["plain"]


def test_over_a_quantized_file_it_takes_out_what_peft_would_of_what_that_lost(make_tiny, original, monkeypatch):
    plain = open_base(make_tiny(Type.Q4_0).path)
    from peft.utils.loftq_utils import _low_rank_decomposition

    monkeypatch.setattr(residuals, "leading", lambda w, r, _: exact_svd(w, r))
    made = principal(original, RANK, plain)
    for name in original.linears:
        theirs = _low_rank_decomposition(left(plain, original, name), RANK)
        ours = torch.from_numpy(made.tensors[name]["lora_B"] @ made.tensors[name]["lora_A"])
        torch.testing.assert_close(ours, theirs["L"] @ theirs["R"], atol=1e-5, rtol=1e-4)


def exact_svd(weight, rank):
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    return u[:, :rank], s[:rank], vt[:rank]


def test_an_adapter_is_trained_over_it_and_belongs_to_it_alone(settings, rest, original, tmp_path):
    run = run_training(settings(tmp_path / "mine"))
    contract = read_contract((run.out / "edgelora.json").read_text(), "edgelora.json")
    assert contract.base == rest.fingerprint != original.fingerprint
    assert rest.lineage != original.lineage == ()
    decoder, ids = build_decoder(rest), torch.arange(3, 27)
    inject(decoder, "loftq", RANK, 32, seed=0, original=Originals(original))
    start = decoder.logits(ids)
    attach(decoder, read_adapter(run.out, rest.layers))
    assert (
        0 < float((decoder.logits(ids) - start).norm()) < 0.2 * float((build_decoder(rest).logits(ids) - start).norm())
    )


def test_an_adapter_that_would_not_bring_the_ranks_back_is_refused(settings, rest):
    for changes in ({"method": "lora", "original": None}, {"rank": RANK - 1}, {"target_modules": ("q_proj",)}):
        with pytest.raises(ConfigError, match=f"{RANK} ranks were taken out"):
            settle(settings("-", **changes), rest)


def test_another_original_is_refused(settings, rest, make_tiny, tmp_path):
    with pytest.raises(ConfigError, match="is not the original of"):
        settle(settings("-", original=make_tiny(seed=1).path), rest)
    with pytest.raises(ConfigError, match="is not the original of"):
        write_residual(make_tiny(seed=1).path, Output(tmp_path / "x.gguf"), "Q4_0", RANK, rest.path)
    with pytest.raises(ConfigError, match="it is Q4_0"):
        write_residual(rest.path, Output(tmp_path / "x.gguf"), "Q4_0", RANK)
    with pytest.raises(ConfigError, match="rank 200"):
        write_residual(make_tiny(seed=1).path, Output(tmp_path / "x.gguf"), "Q4_0", 200)


def test_the_command(tiny, make_tiny, tmp_path):
    app = typer.Typer()
    app.command()(residual)
    out, over = tmp_path / "rest.gguf", make_tiny(Type.Q4_0).path
    asked = [str(tiny.path), "--to", "Q4_0", "--rank", "4", "--over", str(over), "--out", str(out), "--json"]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.output
    made = json.loads(done.stdout)
    assert (made["type"], made["rank"], made["size_bytes"]) == ("Q4_0", 4, out.stat().st_size)
    assert made["certificate"]["passed"]
