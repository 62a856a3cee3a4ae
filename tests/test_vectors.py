"""IA³, BitFit and LayerNorm tuning: what they compute against PEFT, and through every way that they leave by."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from merging import require_merged_computes
from peft import IA3Config, LNTuningConfig, PeftModel, get_peft_model
from pefts import require_pefts_gradients
from safetensors.numpy import load_file, save_file
from same_tokens import IDS, loss_of
from stirred import Stir

from converters.base_to_gguf import write_base_gguf
from converters.merge import Part
from converters.merge_to_hf import write_merged_folder
from edgelora.base.decoder import build_decoder
from edgelora.base.model import open_base
from edgelora.errors import AdapterError, ConfigError, ExportError
from edgelora.nn.norm import RMSNorm
from edgelora.peft.adapter import CONFIG, PREFIX, TENSORS, read_adapter, write_adapter
from edgelora.peft.blend import blend
from edgelora.peft.change import Change, LoraPair
from edgelora.peft.inject import attach, inject, without_adapter
from edgelora.pipeline.inspect import inspect
from edgelora.pipeline.merge import MergeOptions, Wanted, write_gguf

SIZES = {
    "vocab_size": 512, "hidden_size": 256, "intermediate_size": 384, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 1 / 16, "num_hidden_layers": 2,
    "tie_word_embeddings": True, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# a Llama with biases, Qwen2's on q, k and v, and Gemma 3, whose norms multiply by w + 1
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("Qwen2Config", {}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 32, "query_pre_attn_scalar": 32}),
}
METHODS = ["ia3", "bitfit", "layernorm"]
BIASED = {"llama": (), "qwen2": ("q_proj", "k_proj", "v_proj"), "gemma3": ("q_proj", "k_proj", "v_proj")}
# PEFT 0.21 asks transformers 5.23 for an attribute it has renamed, and does not know the norms of any model
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),
]


@dataclass(frozen=True)
class Family:
    """A seeded model of transformers, the folder that holds it, and its GGUF in F32."""

    theirs: Any
    folder: Path
    gguf: Path


@pytest.fixture(scope="module")
def family(tmp_path_factory, vocabulary, write_tokenizer):
    made: dict[str, Family] = {}

    def make(name: str) -> Family:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            kind, settings = FAMILIES[name]
            torch.manual_seed(0)
            config = getattr(transformers, kind)(**SIZES, **settings)
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
            with torch.no_grad():
                for values in model.parameters():
                    if values.ndim == 1:
                        values += 0.2 * torch.randn(values.shape)
            model.save_pretrained(folder)
            write_tokenizer(folder, vocabulary, "{% for m in messages %}{{ m.content }}{% endfor %}")
            gguf = folder.with_suffix(".gguf")
            write_base_gguf(gguf, open_base(folder), "F32")
            made[name] = Family(model, folder, gguf)
        return made[name]

    return make


trained = Stir(rank=1, alpha=1.0, by=0.8).on


# -- PEFT is the oracle -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("method", ["ia3", "layernorm"])
def test_peft_computes_the_same_outputs_and_gradients(family, tmp_path, name, method):
    made = family(name)
    decoder, _ = trained(open_base(made.folder), method, folder=tmp_path / "mine")
    theirs = PeftModel.from_pretrained(copy.deepcopy(made.theirs), tmp_path / "mine", is_trainable=True).eval()
    found = theirs(IDS[None], labels=IDS[None])
    torch.testing.assert_close(decoder.logits(IDS), found.logits[0].detach(), atol=1e-4, rtol=1e-5)
    loss_of(decoder).backward()
    found.loss.backward()
    require_pefts_gradients(decoder, theirs, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("method", ["ia3", "layernorm"])
def test_what_peft_saved_computes_the_same_here(family, tmp_path, method):
    made = family("gemma3")
    base = open_base(made.folder)
    config: Any = IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
    if method == "layernorm":
        config = LNTuningConfig(target_modules=["input_layernorm", "q_norm", "norm"])
    theirs = get_peft_model(copy.deepcopy(made.theirs), config).eval()
    for _, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            parameter.data += 0.5 * torch.rand(parameter.shape)
    theirs.save_pretrained(tmp_path)
    decoder = build_decoder(base)
    before = decoder.logits(IDS)
    attach(decoder, read_adapter(tmp_path, base.layers))
    assert float((decoder.logits(IDS) - before).abs().max()) > 0.1
    torch.testing.assert_close(decoder.logits(IDS), theirs(IDS[None]).logits[0].detach(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-4)])
def test_the_gradient_of_a_norms_weight_is_that_of_the_function(dtype, tolerance):
    """float64 against finite differences; float32, which compiled code computes, against float64."""
    draw = torch.Generator().manual_seed(0)
    x, w = (torch.randn(shape, generator=draw, dtype=torch.float64) for shape in ((2, 3, 32), (32,)))
    if dtype is torch.float64:
        inputs = [x.requires_grad_(), w.requires_grad_()]
        assert torch.autograd.gradcheck(lambda *a: RMSNorm.apply(*a, 1e-5), inputs, atol=tolerance)
        return
    found = []
    for kind in (torch.float64, dtype):
        inputs = [one.detach().to(kind).clone().requires_grad_() for one in (x, w)]
        RMSNorm.apply(*inputs, 1e-5).square().sum().backward()
        found.append([one.grad.double() for one in inputs])
    for exact, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, exact, atol=tolerance, rtol=tolerance)


# -- merged -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_llama_cpp_computes_the_same_once_it_is_merged(family, tmp_path, name, method):
    base = open_base(family(name).gguf)
    decoder, adapter = trained(base, method, BIASED[name] if method == "bitfit" else ())
    live, plain = decoder.logits(IDS), build_decoder(base).logits(IDS)
    assert float((live - plain).abs().max()) > 0.1
    write_adapter(tmp_path / "mine", adapter)
    require_merged_computes(base, tmp_path / "mine", IDS, live)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_transformers_computes_the_same_once_it_is_merged_into_a_folder(family, tmp_path, name, method):
    if (name, method) == ("gemma3", "bitfit"):
        targets: tuple[str, ...] = ("q_proj",)  # its config gives a bias to all of q, k, v and o
    else:
        targets = BIASED[name] if method == "bitfit" else ()
    base = open_base(family(name).folder)
    decoder, adapter = trained(base, method, targets)
    (tmp_path / "merged").mkdir()
    write_merged_folder(tmp_path / "merged", base, [Part(adapter, 1.0, "0" * 64, "mine")])
    theirs, told = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not told["unexpected_keys"]
    assert set(told["missing_keys"]) <= {"lm_head.weight"}
    with torch.no_grad():
        torch.testing.assert_close(decoder.logits(IDS), theirs.eval()(IDS[None]).logits[0], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_two_at_their_scales_are_the_blend_of_them(family, tmp_path, method):
    """Over a base with biases, each change is measured from the base's own."""
    base = open_base(family("llama").gguf)
    _, adapter = trained(base, method)
    decoder = build_decoder(base)
    blend(decoder, [(adapter, 0.5), (adapter, -0.2)])
    parts = [Part(adapter, scale, "0" * 64, "mine") for scale in (0.5, -0.2)]
    write_gguf(tmp_path / "merged.gguf", base, parts, Wanted.read("F32", MergeOptions()))
    merged = build_decoder(open_base(tmp_path / "merged.gguf"))
    torch.testing.assert_close(merged.logits(IDS), decoder.logits(IDS), atol=1e-5, rtol=1e-5)


def test_a_bias_that_llama_cpp_does_not_load_is_refused(family, tmp_path):
    base = open_base(family("qwen2").gguf)
    _, adapter = trained(base, "bitfit")
    with pytest.raises(ExportError) as e:
        write_gguf(tmp_path / "x", base, [Part(adapter, 1.0, "0", "mine")], Wanted.read("F32", MergeOptions()))
    assert str(e.value).splitlines() == [
        f"{base.path}: llama.cpp has no bias for mlp.down_proj, mlp.gate_proj, mlp.up_proj, self_attn.o_proj of this "
        "family",
        "  why: a file of the architecture qwen2 that holds one does not load",
        "  fix: train with --target-modules q_proj --target-modules k_proj --target-modules v_proj, whose biases it "
        "loads; or merge into a Hugging Face folder (--to HF) where that has them",
    ]


def test_a_bias_that_transformers_has_not_is_refused(family, tmp_path):
    base = open_base(family("qwen2").folder)
    _, adapter = trained(base, "bitfit", ("down_proj",))
    with pytest.raises(ExportError, match=r"transformers has no bias for mlp\.down_proj"):
        write_merged_folder(tmp_path, base, [Part(adapter, 1.0, "0", "mine")])


# -- files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_without_its_adapter_a_model_is_the_base(family, method):
    base = open_base(family("gemma3").folder)
    decoder, _ = trained(base, method)
    with without_adapter(decoder):
        assert torch.equal(decoder.logits(IDS), build_decoder(base).logits(IDS))
    assert all(layer.delta is not None for layer in decoder.adaptable.values() if list(layer.parameters()))


DAMAGE = {
    ("ia3", "of another width"): (lambda t, k: t.update({k: np.ones((3, 1), np.float32)}), "ia3_l is (3, 1), expected"),
    ("bitfit", "of another width"): (lambda t, k: t.update({k: np.ones(3, np.float32)}), "bias is (3,), expected (25"),
    ("layernorm", "of another width"): (lambda t, k: t.update({k: np.ones(3, np.float32)}), "its weight is (3,), exp"),
    ("layernorm", "no number"): (lambda t, k: t[k].__setitem__(0, np.nan), "NaN"),
    ("layernorm", "no norm"): (
        lambda t, _: t.update({f"{PREFIX}lm_head.ln_tuning_layers.weight": np.ones(3, np.float32)}),
        "lm_head: it is no norm of this model",
    ),
    ("bitfit", "a stranger"): (lambda t, _: t.update({"x.bias": np.ones(3, np.float32)}), "is no part of a BitFit"),
}  # fmt: skip


@pytest.mark.parametrize(("method", "damage"), DAMAGE)
def test_a_damaged_one_is_refused(family, tmp_path, method, damage):
    base = open_base(family("llama").folder)
    trained(base, method, folder=tmp_path / "mine")
    change, said = DAMAGE[method, damage]
    tensors = load_file(tmp_path / "mine" / TENSORS)
    change(tensors, next(iter(tensors)))
    save_file(tensors, tmp_path / "mine" / TENSORS)
    with pytest.raises(AdapterError) as e:
        read_adapter(tmp_path / "mine", base.layers)
    assert said in e.value.what


def test_a_method_that_this_version_does_not_know_is_refused(family, tmp_path):
    base = open_base(family("llama").folder)
    trained(base, "bitfit", folder=tmp_path / "mine")
    config = json.loads((tmp_path / "mine" / CONFIG).read_text())
    assert config["peft_type"] == "EDGELORA"
    (tmp_path / "mine" / CONFIG).write_text(json.dumps(config | {"method": "of tomorrow"}))
    with pytest.raises(AdapterError, match="of the kind EDGELORA of tomorrow, which is not read here") as refused:
        read_adapter(tmp_path / "mine", base.layers)
    assert refused.value.why == "what its tensors do to a layer is not known here"


@pytest.mark.parametrize(
    ("method", "targets"),
    [("ia3", {"k_proj": 2, "v_proj": 2, "down_proj": 2}), ("layernorm", {"norm": 1, "input_layernorm": 2})],
)
def test_one_is_inspected(family, tmp_path, method, targets):
    trained(open_base(family("llama").folder), method, folder=tmp_path / "mine")
    facts: Any = inspect(tmp_path / "mine")
    assert not facts.faults
    assert targets.items() <= facts.targets.items()
    assert facts.export.why.startswith("as a patched base, ")
    assert (facts.export.answer, facts.merge.answer, facts.chat.answer) == ("yes", "yes", "export first")


def test_a_norm_that_there_is_not_is_named_with_those_there_are(family):
    decoder = build_decoder(open_base(family("llama").folder))
    with pytest.raises(ConfigError) as e:
        inject(decoder, "layernorm", 1, 1.0, seed=0, targets=["inputlayernorm"])
    assert "no norm of this model is named inputlayernorm" in e.value.what
    assert e.value.fix == "did you mean input_layernorm?"


# -- a change -----------------------------------------------------------------------------------------------------


def test_a_change_is_the_formula_in_any_order_of_rows():
    draw = np.random.default_rng(0)
    w, whole = draw.normal(size=(2, 6, 5)).astype(np.float32)
    a, b = draw.normal(size=(2, 5)).astype(np.float32), draw.normal(size=(6, 2)).astype(np.float32)
    m, rows, bias, c = draw.normal(size=(4, 6)).astype(np.float32)
    columns, order = draw.normal(size=5).astype(np.float32), draw.permutation(6)
    change = Change(LoraPair(a, b, m), rows, columns, whole, bias)
    turned = w + b @ a
    turned *= (m / np.linalg.norm(turned, axis=1))[:, None]
    wanted = np.diag(rows) @ (turned + whole) @ np.diag(columns) - w
    np.testing.assert_allclose(change.change(w), wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(change.of(order).change(w[order]), wanted[order], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(change.of(slice(2, 4)).change(w[2:4]), wanted[2:4], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(change.change_of_bias(c), rows * c + bias - c, rtol=1e-5, atol=1e-5)
    assert not change.is_pair
    assert Change(LoraPair(a, b)).is_pair
