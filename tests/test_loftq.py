"""LoftQ: it starts where PEFT's does on the same quantized weights, nearer to the original, and goes on from there."""

from __future__ import annotations

import json

import pytest
import torch
from example_runs import configs, example_rows
from gguf.constants import GGMLQuantizationType as Type
from resumed import require_same_when_resumed
from same_tokens import IDS

from converters.plan import QuantizeOptions
from converters.quantize import write_quantized
from edgelora.base.decoder import build_decoder
from edgelora.base.model import open_base
from edgelora.base.weights import Dense
from edgelora.errors import ConfigError
from edgelora.files.contract import read_contract
from edgelora.peft import loftq
from edgelora.peft.adapter import CONFIG, read_adapter
from edgelora.peft.inject import attach, inject
from edgelora.progress import silent
from edgelora.training.original import Originals
from edgelora.training.run import run_training
from edgelora.training.settle import settle

RANK, ALPHA = 4, 6


@pytest.fixture(scope="module")
def original(tiny):
    return open_base(tiny.path)


@pytest.fixture(scope="module")
def base(make_tiny):
    return open_base(make_tiny(Type.Q4_0).path)


@pytest.fixture(scope="module")
def settings(base, tiny, tmp_path_factory):
    """`settings(out, **changes)`: four steps of LoftQ over the Q4_0 file of the F32 model."""
    return configs(
        base=base.path, data=example_rows(tmp_path_factory.mktemp("rows") / "train.jsonl", 0, 8), method="loftq",
        original=tiny.path, rank=RANK, alpha=ALPHA, learning_rate=5e-3, batch_rows=4, warmup_steps=1, dtype="f32",
        device="cpu", save_every=1, keep_checkpoints=10,
    )  # fmt: skip


def exact_svd(weight, rank, _):
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    return u[:, :rank], s[:rank], vt[:rank]


def start_of(delta):
    with torch.no_grad():
        return delta.scale * delta.lora_B @ delta.lora_A


# -- PEFT is the oracle -------------------------------------------------------------------------------------------


def test_it_starts_where_peft_starts_on_weights_that_bitsandbytes_quantized(original, tiny, monkeypatch):
    bitsandbytes = pytest.importorskip("bitsandbytes.functional", reason="the oracle of NF4 is not installed")
    from peft.utils.loftq_utils import _low_rank_decomposition

    monkeypatch.setattr(loftq, "leading", exact_svd)
    decoder = build_decoder(original, "nf4")
    inject(decoder, "loftq", RANK, ALPHA, seed=0, original=Originals(original))
    for name, linear in decoder.linears.items():
        weight = torch.from_numpy(tiny.weights[f"{name}.weight"].copy())
        coded = bitsandbytes.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
        theirs = _low_rank_decomposition(weight - bitsandbytes.dequantize_4bit(*coded), RANK)
        torch.testing.assert_close(start_of(linear.delta), theirs["L"] @ theirs["R"], atol=1e-6, rtol=1e-4)


# -- invariants ---------------------------------------------------------------------------------------------------


def test_at_full_rank_it_is_the_originals_function_and_at_half_nearer_to_it(make_tiny, original):
    decoder, whole = build_decoder(open_base(make_tiny(Type.Q4_K).path)), build_decoder(original)
    decoder.embedding, decoder.head = whole.embedding, whole.head  # these have no adapter
    wanted = whole.logits(IDS)
    away = [float((decoder.logits(IDS) - wanted).norm())]
    for share in (2, 1):
        for name, linear in decoder.linears.items():
            rank = min(linear.weight.shape) // share
            linear.delta = loftq.from_original(linear.weight, Originals(original)(name), rank, 9.0, torch.Generator())
        away.append(float((decoder.logits(IDS) - wanted).norm()))
    assert away[0] > away[1] > away[2]
    torch.testing.assert_close(decoder.logits(IDS), wanted, atol=1e-4, rtol=1e-4)


def test_what_a_rank_makes_up_for_is_as_much_as_any_of_its_size_could(base, original):
    decoder = build_decoder(base)
    inject(decoder, "loftq", RANK, ALPHA, seed=0, original=Originals(original))
    for name, linear in decoder.linears.items():
        lost = Originals(original)(name) - linear.weight.dequantize()
        least = float(torch.linalg.svdvals(lost)[RANK:].norm())
        assert least * (1 - 1e-5) <= float((lost - start_of(linear.delta)).norm()) <= least * 1.005 < float(lost.norm())


def test_directions_in_which_nothing_was_lost_learn_as_a_loras():
    weight = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
    lost = torch.outer(torch.arange(12.0), torch.arange(8.0))  # of rank 1
    for changed, at_first in ((torch.zeros_like(weight), 0), (lost, 1)):
        delta = loftq.from_original(Dense(weight), weight + changed, 3, 6.0, torch.Generator().manual_seed(1))
        torch.testing.assert_close(start_of(delta), changed, atol=1e-4, rtol=1e-4)
        assert delta.lora_A.detach().any(1).all()
        assert delta.lora_B.detach().any(0).tolist() == [True] * at_first + [False] * (3 - at_first)


def test_a_run_ends_in_a_plain_lora_that_says_what_it_began_from(settings, base, original, tmp_path):
    run = run_training(settings(tmp_path / "mine"))
    described = json.loads((run.out / CONFIG).read_text())
    assert (described["r"], described["lora_alpha"]) == (RANK, ALPHA)
    assert "init_lora_weights" not in described  # PEFT's own "loftq" would quantize the base anew
    contract = read_contract((run.out / "edgelora.json").read_text(), "edgelora.json")
    assert contract.base_file == base.base_file
    assert contract.training["choices"]["original"]["value"] == f"{original.path.name} (F32)"
    assert "original" not in contract.training
    facts = json.loads((run.folder / "run.json").read_text())
    assert facts["digests"]["original"] == original.base_file.sha256
    decoder = build_decoder(base)
    inject(decoder, "loftq", RANK, ALPHA, seed=0, original=Originals(original))
    begun = decoder.logits(IDS)
    attach(decoder, read_adapter(run.out, base.layers))
    assert float((decoder.logits(IDS) - begun).norm()) > 0.01  # four steps have moved it


def test_a_run_goes_on_from_its_checkpoint_without_an_svd(settings, tmp_path, monkeypatch):
    config = settings(tmp_path / "mine")
    run_training(config)
    monkeypatch.setattr(loftq, "leading", None)
    require_same_when_resumed(config, 2)


def test_a_base_that_is_quantized_on_opening_is_its_own_original(settings, tiny, original):
    config = settings("-", base=tiny.path, original=None, base_dtype="nf4")
    choice = settle(config, original).choices["original"]
    assert choice.value == f"{tiny.path.name} (F32)"
    assert "held as nf4" in choice.why


# -- what is refused ----------------------------------------------------------------------------------------------


def test_without_an_original_it_is_asked_for(settings, base):
    with pytest.raises(ConfigError) as e:
        settle(settings("-", original=None), base)
    assert str(e.value).splitlines() == [
        f"--method loftq without --original: {base.path} is Q4_0",
        "  why: the adapter starts at what quantization took away, the difference to the weights before it",
        "  fix: pass --original MODEL: the F16, BF16 or F32 model that the base was made from",
    ]


def test_an_original_that_is_none_is_refused(settings, base, make_tiny, original):
    faults = {
        "quantized": (make_tiny(Type.Q8_0).path, base, "it is Q8_0"),
        "another": (make_tiny(seed=1).path, base, "is not the original of"),
        "the same": (original.path, original, "nothing is quantized"),
    }
    for wrong, over, said in faults.values():
        with pytest.raises(ConfigError) as e:
            settle(settings("-", original=wrong, base=over.path), over)
        assert said in e.value.what
    with pytest.raises(ConfigError, match="lora has no use for it"):
        settle(settings("-", method="lora"), base)


def test_the_bases_own_weights_dequantized_are_no_original(settings, base, tmp_path):
    write_quantized(base.path, tmp_path / "dequantized.gguf", QuantizeOptions("F16"), silent, {})
    with pytest.raises(ConfigError, match="its weights are those of"):
        settle(settings("-", original=tmp_path / "dequantized.gguf"), base)
