"""Full fine-tuning against transformers, whose own weights are trained; what it leaves as, asks for and says."""

from __future__ import annotations

import pytest
import torch
import transformers
from gguf.constants import GGMLQuantizationType as Type
from merging import require_merged_computes
from safetensors.numpy import load_file
from same_tokens import IDS, loss_of

from converters.merge import Part
from converters.merge_to_hf import write_merged_folder
from edgelora.base.decoder import build_decoder
from edgelora.base.model import open_base
from edgelora.config import TrainConfig
from edgelora.errors import ConfigError
from edgelora.peft.adapter import PREFIX, TENSORS, Adapter, read_adapter, write_adapter
from edgelora.peft.inject import adapter_config, attach, collect, inject, without_adapter
from edgelora.training.adapter_footprint import adapter_numbers
from edgelora.training.base_footprint import Model
from edgelora.training.footprint import Load, footprint
from edgelora.training.memory import SHARE, Machine, what_would_fit
from edgelora.training.optim import build_optimizer
from edgelora.training.settle import settle
from edgelora.training.whole import optimizer_of
from edgelora.words import size

ENOUGH = 10**10  # bytes


def config_of(base, **settings):
    return TrainConfig(base=base, data="rows.jsonl", out="out", method="full", **settings)


def trained(base, steps=3, rate=3e-3):
    """A decoder after some steps of AdamW over all weights, and the adapter."""
    decoder = build_decoder(base)
    inject(decoder, "full", 1, 1.0, seed=0)
    optimizer = build_optimizer(decoder.named_parameters(), config_of(base.path, learning_rate=rate))
    for _ in range(steps):
        loss_of(decoder).backward()
        optimizer.step()
        optimizer.zero_grad()
    return decoder, Adapter(adapter_config(decoder, "full", 1, 1.0, str(base.path)), collect(decoder))


def test_it_learns_what_transformers_learns(tiny, transformers_model):
    """Every tensor, by torch's own AdamW."""
    decoder, _ = trained(open_base(tiny.path))
    theirs = transformers_model(tiny)
    own = dict(theirs.named_parameters())
    start = {name: p.detach().clone() for name, p in own.items()}
    optimizer = torch.optim.AdamW(own.values(), lr=3e-3, weight_decay=0)
    for _ in range(3):
        theirs(IDS[None], labels=IDS[None]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert set(own) == {f"{name}.weight" for name in decoder.adaptable}
    for name, linear in {**decoder.linears, **decoder.vocabularies}.items():
        moved = own[f"{name}.weight"].detach() - start[f"{name}.weight"]
        assert (linear.delta.delta - moved).abs().mean() < 1e-3 * moved.abs().mean()  # 1 in 10⁵ gradients is near zero
    with torch.no_grad():
        torch.testing.assert_close(decoder.logits(IDS), theirs(IDS[None]).logits[0], atol=2e-3, rtol=1e-3)


def test_merged_it_computes_the_same_in_llama_cpp_and_transformers(tiny, tmp_path):
    base = open_base(tiny.path)
    decoder, adapter = trained(base)
    live = decoder.logits(IDS)
    assert float((live - build_decoder(base).logits(IDS)).abs().max()) > 0.1
    write_adapter(tmp_path / "mine", adapter)
    require_merged_computes(base, tmp_path / "mine", IDS, live)


def test_it_is_merged_into_a_folder(tiny, transformers_model, write_tokenizer, vocabulary, tmp_path):
    transformers_model(tiny).save_pretrained(tmp_path / "base")
    write_tokenizer(tmp_path / "base", vocabulary, None)
    base = open_base(tmp_path / "base")
    decoder, adapter = trained(base)
    (tmp_path / "merged").mkdir()
    write_merged_folder(tmp_path / "merged", base, [Part(adapter, 1.0, "0" * 64, "mine")])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(decoder.logits(IDS), theirs(IDS[None]).logits[0], atol=1e-4, rtol=1e-5)


def test_the_file_holds_what_was_added_to_each_weight(tiny, tmp_path):
    base = open_base(tiny.path)
    decoder, adapter = trained(base)
    write_adapter(tmp_path / "mine", adapter)
    tensors = load_file(tmp_path / "mine" / TENSORS)
    matrices = {f"{PREFIX}{m}.delta" for m in (*base.linears, *base.vocabularies)}
    assert set(tensors) == matrices | {f"{PREFIX}{m}.weight" for m in base.norms}
    assert sum(t.nbytes for t in tensors.values()) == 4 * sum(p.numel() for p in decoder.parameters())
    live = decoder.logits(IDS)
    with without_adapter(decoder):  # what preferences are measured against
        assert torch.equal(decoder.logits(IDS), build_decoder(base).logits(IDS))
    attach(decoder, read_adapter(tmp_path / "mine", base.layers))
    assert torch.equal(decoder.logits(IDS), live)


def test_no_sum_of_weights_is_kept_for_the_backward_pass(tiny):
    decoder = build_decoder(open_base(tiny.path))
    inject(decoder, "full", 1, 1.0, seed=0)
    own, kept = {p.data_ptr() for p in decoder.parameters()}, []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss_of(decoder)
    weights = {tuple(linear.weight.shape) for linear in decoder.linears.values()}
    assert not [t.shape for t in kept if tuple(t.shape) in weights and t.data_ptr() not in own]


# -- what it asks for ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["full", "galore", "lors"])
def test_over_blocks_it_is_refused(make_tiny, method):
    base = open_base(make_tiny(Type.Q4_0).path)
    config = config_of(base.path).model_copy(update={"method": method})
    with pytest.raises(ConfigError) as e:
        settle(config, base, ENOUGH)
    assert str(e.value).splitlines() == [
        f"--method {method}: {base.path} is Q4_0",
        "  why: it changes every weight by a little of its own, which blocks of a few bits cannot take up",
        "  fix: pass --base-dtype f32, or bf16 for half the memory; --method lora trains over blocks as they are",
    ]
    with pytest.raises(ConfigError, match="is held as nf4"):
        settle(config.model_copy(update={"base_dtype": "nf4"}), base, ENOUGH)
    with pytest.raises(ConfigError, match=f"--method {method}: the base's weights are quantized"):
        inject(build_decoder(base), method, 4, 8.0, seed=0)
    assert settle(config.model_copy(update={"base_dtype": "f32"}), base, ENOUGH).config.base_dtype == "f32"


def test_where_memory_is_short_it_takes_adafactor(tiny):
    model, config = Model.of(open_base(tiny.path)), config_of(tiny.path, rank=1)
    moments = 8 * adapter_numbers(model, config)
    assert optimizer_of(config, model, 4 * moments) == (config, {})
    found, choices = optimizer_of(config, model, 4 * moments - 4)
    assert found.optimizer == choices["optimizer"].value == "adafactor"
    asked = config_of(tiny.path, rank=1, optimizer="adamw")
    assert optimizer_of(asked, model, moments) == (asked, {})


def test_the_size_of_its_file_is_said_before_it_is_trained(tiny):
    base = open_base(tiny.path)
    plan = settle(config_of(base.path), base, ENOUGH)
    matrices = {**base.linears, **base.vocabularies}.values()
    numbers = sum(d_out * d_in for d_out, d_in in matrices) + sum(base.norms.values())
    assert plan.choices["size"].value == size(4 * numbers)
    assert plan.config.learning_rate == 1e-4  # a tenth of a LoRA's


def test_what_would_fit_is_no_quantized_base(tiny):
    base = open_base(tiny.path)
    model, load = Model.of(base), Load(64, 64, True)
    config = config_of(base.path, rank=1, dtype="f32", base_dtype="f32", optimizer="adamw", recompute="full")
    config = config.model_copy(update={"max_length": 64, "micro_batch_tokens": 64})
    fixes = []
    for change in ({"optimizer": "adafactor"}, {"method": "lora"}):
        room = footprint(model, config.model_copy(update=change), load, process=1).total
        fixes.append(what_would_fit(model, config, config, load, Machine("cpu", int(room / SHARE) + 2, 1)))
    assert fixes == ["pass --optimizer adafactor", "pass --method lora"]
