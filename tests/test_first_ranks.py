"""A DyLoRA leaves at any of its ranks: what torch computes with the first b, PEFT and llama.cpp do with the files."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from merging import as_a_lora
from peft import PeftModel
from same_tokens import IDS
from stirred import Stir

from converters.adapter_to_gguf import write_adapter_gguf
from edgelora.base.decoder import build_decoder
from edgelora.base.model import open_base
from edgelora.cli import run
from edgelora.errors import CertificateError, ExportError
from edgelora.peft.adapter import CONFIG, read_adapter, write_adapter
from edgelora.peft.first_ranks import DYLORA, first_ranks
from edgelora.peft.inject import attach
from edgelora.peft.lora_config import as_lora
from edgelora.peft.methods import METHODS
from edgelora.peft.targets import Where
from edgelora.pipeline.contracts import contract_over
from edgelora.pipeline.export import ExportOptions, export
from edgelora.pipeline.first_ranks import at_rank
from edgelora.pipeline.import_adapter import export_as_lora, import_adapter

RANK = 4
WHERE = Where(alpha_pattern={"q_proj": 20.0})  # of the others 6
# PEFT 0.21 asks transformers 5.23 for an attribute it has renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def base(tiny):
    return open_base(tiny.path)


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """(decoder with a DyLoRA of rank 4 on it, the same adapter, and the folder that it is in)."""
    decoder, adapter = Stir(rank=RANK, alpha=6.0, by=0.2).on(base, DYLORA, WHERE)
    contract = contract_over(base, DYLORA, training={"rank": RANK}, evaluation={"loss": 1.0})
    adapter, folder = replace(adapter, contract=contract), tmp_path_factory.mktemp("trained") / "mine"
    write_adapter(folder, adapter)
    return decoder, adapter, folder


@pytest.fixture(scope="module")
def logits_at(trained):
    """`logits_at(b)`: what torch computes with b ranks at work, as DyLoRA trains them."""
    decoder, _, _ = trained

    def logits(rank):
        for linear in decoder.linears.values():
            linear.delta.active = rank
        with torch.no_grad():
            return decoder.logits(IDS)

    return logits


def test_the_name_is_that_of_the_method():
    assert DYLORA in METHODS


@pytest.mark.parametrize("rank", [1, 3, RANK])
def test_torch_peft_and_llama_cpp_compute_the_same_at_each_rank(
    base, tiny, trained, logits_at, transformers_model, tmp_path, rank
):
    _, _, folder = trained
    live = logits_at(rank)
    with at_rank(base.path, folder, rank) as cut:
        assert cut.name == folder.name
        made = export_as_lora(base.path, cut, tmp_path / "lora")
        apart = as_a_lora(base, read_adapter(cut, base.layers), tmp_path / "a.gguf", IDS, live)
    assert not cut.exists()
    assert made.ranks == (rank,)
    theirs = PeftModel.from_pretrained(transformers_model(tiny), tmp_path / "lora")
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS[None]).logits[0], live, atol=1e-4, rtol=1e-4)
    assert apart.kl_mean <= 1e-5
    assert apart.same_top == 1.0
    assert (float((live - logits_at(None)).abs().max()) > 0.1) == (rank < RANK)


def test_a_part_of_a_part_is_the_same_and_so_it_is_of_what_left_as_a_lora(base, trained, logits_at, tmp_path):
    """A file in which B has the whole scale, and α is r, gives r/b times it: α/b."""
    _, adapter, _ = trained
    export_gguf = tmp_path / "whole.gguf"
    write_adapter_gguf(export_gguf, adapter, base, "whole", "F32")
    import_adapter(base.path, export_gguf, tmp_path / "back")
    sources = (
        first_ranks(adapter, 3, "-"),
        as_lora(adapter, base.linears, "-"),
        read_adapter(tmp_path / "back", base.layers),
    )
    decoder, live = build_decoder(base), logits_at(2)
    for source in sources:
        attach(decoder, first_ranks(source, 2, "-"))
        torch.testing.assert_close(decoder.logits(IDS), live, atol=1e-4, rtol=1e-4)


def test_what_is_trained_whole_beside_it_stays(base):
    _, adapter = Stir(rank=RANK, alpha=6.0, by=0.2).on(base, DYLORA, Where(modules_to_save=("model.norm",)))
    adapter = replace(adapter, contract=contract_over(base, DYLORA))
    cut = first_ranks(adapter, 1, "-")
    np.testing.assert_array_equal(cut.norm("model.norm"), adapter.norm("model.norm"))
    assert {cut.pair(module).rank for module in cut.linears} == {1}


def test_the_command_certifies_it_at_its_rank(base, trained, tmp_path, capsys):
    _, _, folder = trained
    words = ["export", str(base.path), str(folder), "--rank", "2", "--json"]
    assert run([*words, "--plan"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["door"], told["exact"], told["rank"]) == ("adapter", True, 2)
    assert run(["export", str(base.path), str(folder), "--plan", "--json"]) == 0
    whole = json.loads(capsys.readouterr().out)
    assert told["size_bytes"] * RANK == whole["size_bytes"] * 2
    assert "rank 2, the first of the 4 that were trained, as they learned to be used: it is exact" in told["notes"]
    assert any(note.startswith("--rank R takes its first R ranks alone, of 4") for note in whole["notes"])
    assert run([*words, "--out", str(tmp_path / "made.gguf")]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["rank"] == 2
    assert made["certificate"]["passed"]
    assert made["certificate"]["adapter"]["kl_mean"] <= 1e-4
    assert read_adapter(folder, base.layers).contract.certificate is None  # which is that of another rank


def test_a_file_with_all_ranks_is_rejected_at_another(base, trained, tmp_path, monkeypatch):
    _, adapter, folder = trained
    monkeypatch.setattr(
        "edgelora.pipeline.export.write_adapter_gguf",
        lambda out, _, base, name, dtype: write_adapter_gguf(out, adapter, base, name, dtype),
    )
    with at_rank(base.path, folder, 2) as cut, pytest.raises(CertificateError):
        export(base.path, cut, tmp_path / "made.gguf", ExportOptions("F32"))


def test_the_scores_of_all_ranks_are_not_those_of_some(trained):
    _, adapter, _ = trained
    contract = first_ranks(adapter, 2, "-").contract
    assert (contract.method, contract.evaluation, contract.certificate) == (DYLORA, {}, None)


@pytest.mark.parametrize("rank", [0, RANK + 1])
def test_a_rank_that_it_has_not_is_refused(trained, rank):
    with pytest.raises(ExportError) as error:
        first_ranks(trained[1], rank, "mine")
    assert str(error.value).splitlines() == [
        f"mine: it has no first {rank} ranks",
        "  why: it was trained to be an adapter with each number of them from 1 to 4",
        "  fix: pass a --rank of these",
    ]


@pytest.mark.parametrize(
    ("method", "how"), [("lora", "was trained by lora"), (None, "does not say how it was trained")]
)
def test_another_method_has_no_part_of_its_ranks(base, trained, method, how):
    contract = None if method is None else contract_over(base, method)
    with pytest.raises(ExportError) as error:
        first_ranks(replace(trained[1], contract=contract), 2, "mine")
    assert str(error.value).splitlines() == [
        "mine: its first 2 ranks are no adapter",
        f"  why: only a DyLoRA learns with its first ranks alone, and this one {how}: all of its ranks belong together",
        "  fix: leave --rank out; --svd-rank R writes the nearest LoRA of what changes weights alone, and its loss",
    ]


def test_errors_name_the_adapter_that_was_given(base, trained, tmp_path, capsys):
    _, _, folder = trained
    words = ["export", str(base.path), str(folder), "--rank", "2", "--out", str(tmp_path / "x")]
    assert run([*words, "--door", "patched"]) == 1
    assert f"error: {folder}: it cannot leave as patched" in capsys.readouterr().err
    assert run([*words, "--svd-rank", "2"]) == 1
    assert "error: export --rank with --svd-rank" in capsys.readouterr().err
    (tmp_path / "prompt").mkdir()
    (tmp_path / "prompt" / CONFIG).write_text(json.dumps({"peft_type": "PROMPT_TUNING"}))
    words[2] = str(tmp_path / "prompt")
    assert run(words) == 1
    assert f"error: {tmp_path / 'prompt'}: its first 2 ranks are no adapter" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["prompt"]
