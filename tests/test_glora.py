"""GLoRA against PEFT's, with biases and without; its bias terms as one vector; merged, through llama.cpp."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from merging import as_a_lora, require_merged_computes
from peft import GloraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file
from same_tokens import IDS, loss_of
from stirred import Stir
from test_vectors import family  # noqa: F401

from edgelora.base.decoder import build_decoder
from edgelora.base.model import open_base
from edgelora.errors import AdapterError
from edgelora.peft.adapter import PREFIX, TENSORS, Adapter, read_adapter, write_adapter
from edgelora.peft.glora import GloraDelta, Path
from edgelora.peft.inject import attach
from edgelora.pipeline.exit_plan import plan
from edgelora.pipeline.export import ExportOptions
from edgelora.pipeline.import_adapter import export_as_lora
from edgelora.pipeline.patch import patch

PARTS = {"A.Xd", "A.Xu", "B.Xd", "B.Xu", "bias.C", "bias.D", "bias.E"}
# PEFT 0.21 asks transformers 5.23 for an attribute it has renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def trained(base, folder=None):
    """A decoder with a stirred GLoRA on it, and the adapter."""
    return Stir(rank=4, alpha=1.0, by=0.2).on(base, "glora", folder=folder)


def pefts(model, **settings):
    given = {"r": 4, "target_modules": "all-linear", "config_C": "vector", "config_D_E": "vector", **settings}
    return get_peft_model(model, GloraConfig(**given)).eval()


@pytest.mark.parametrize("name", ["llama", "qwen2"])  # with a bias everywhere, and on q, k and v
def test_peft_computes_the_same_outputs_and_gradients(family, name):  # noqa: F811
    made = family(name)
    decoder, _ = trained(open_base(made.folder))
    theirs = pefts(copy.deepcopy(made.theirs))
    named = {
        key.removeprefix(PREFIX).replace(".default", ""): p for key, p in theirs.named_parameters() if p.requires_grad
    }
    ours = {}
    for key, parameter in decoder.named_parameters():
        module, _, part = key.partition(".delta.")
        path, value = part.replace("bias.", "").partition(".")[::2]
        ours[f"{module}.glora_{path}.{value or 'X'}"] = parameter
    assert set(ours) == set(named)
    for key, parameter in ours.items():
        named[key].data.copy_(parameter.detach().view(named[key].shape))
    found = theirs(IDS[None], labels=IDS[None])
    torch.testing.assert_close(decoder.logits(IDS), found.logits[0].detach(), atol=1e-4, rtol=1e-5)
    loss_of(decoder).backward()
    found.loss.backward()
    for key, parameter in ours.items():
        assert parameter.grad.any(), key
        wanted = named[key].grad.view(parameter.shape)
        torch.testing.assert_close(parameter.grad, wanted, atol=2e-5, rtol=1e-3, msg=key)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3"])
def test_peft_computes_the_same_from_the_files(family, tmp_path, name):  # noqa: F811
    """D ∘ c + E + W C is saved as E: to this model it is the same."""
    made = family(name)
    decoder, _ = trained(open_base(made.folder), tmp_path / "mine")
    theirs = PeftModel.from_pretrained(copy.deepcopy(made.theirs), tmp_path / "mine").eval()
    with torch.no_grad():
        torch.testing.assert_close(decoder.logits(IDS), theirs(IDS[None]).logits[0], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "settings"),
    [("gemma3", {}), ("gemma3", {"config_C": "lora", "config_D_E": "constant"}),
     ("llama", {"config_C": "none", "config_D_E": "none"})],
)  # fmt: skip
def test_what_peft_saved_computes_the_same_here(family, tmp_path, name, settings):  # noqa: F811
    made = family(name)
    base = open_base(made.folder)
    torch.manual_seed(0)
    theirs = pefts(copy.deepcopy(made.theirs), init_weights=False, **settings)
    theirs.save_pretrained(tmp_path)
    decoder = build_decoder(base)
    before = decoder.logits(IDS)
    attach(decoder, read_adapter(tmp_path, base.layers))
    assert float((decoder.logits(IDS) - before).abs().max()) > 0.1
    torch.testing.assert_close(decoder.logits(IDS), theirs(IDS[None]).logits[0].detach(), atol=1e-4, rtol=1e-4)


def test_a_shift_of_a_bias_is_one_number_or_one_for_each_row(family, tmp_path):  # noqa: F811
    """PEFT's config_D_E = constant, with D at zero."""
    base = open_base(family("llama").folder)
    _, adapter = trained(base, tmp_path / "mine")
    module = base_module(adapter)
    tensors = load_file(tmp_path / "mine" / TENSORS)
    for part in ("D", "E"):
        tensors[f"{PREFIX}{module}.glora_{part}.X"] = np.full(1, 0.25 if part == "E" else 0, np.float32)
    save_file(tensors, tmp_path / "mine" / TENSORS)
    change = read_adapter(tmp_path / "mine", base.layers).change(module)
    assert np.array_equal(change.bias, np.full(base.linears[module][0], 0.25, np.float32))


def base_module(adapter):
    return next(name for name in adapter.linears if name.endswith("q_proj"))


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3"])
def test_llama_cpp_computes_the_same_once_it_is_merged(family, tmp_path, name):  # noqa: F811
    base = open_base(family(name).gguf)
    decoder, _ = trained(base, tmp_path / "mine")
    live = decoder.logits(IDS)
    require_merged_computes(base, tmp_path / "mine", IDS, live, atol=1e-4)


def without(adapter, *zero, ending=""):
    """The same adapter where these of its tensors are zero, in layers whose names end so."""
    tensors = {
        module: {n: np.zeros_like(t) if n in zero and module.endswith(ending) else t for n, t in parts.items()}
        for module, parts in adapter.tensors.items()
    }
    return Adapter(adapter.config, tensors)


@pytest.mark.parametrize("zero", ["glora_A.Xd", "glora_A.Xu"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_without_its_other_paths_it_leaves_as_a_lora(family, tmp_path, name, zero):  # noqa: F811
    """W + B is all that is left of it: torch with the GLoRA, llama.cpp with the file, and the plain LoRA of PEFT's."""
    base = open_base(family(name).gguf)
    _, whole = trained(base)
    adapter = without(whole, zero, "glora_E.X")
    write_adapter(tmp_path / "mine", adapter)
    found = plan(base.path, tmp_path / "mine", allow_unverified=True)
    assert (found.door, found.hot_swappable) == ("adapter", True)
    decoder = build_decoder(base)
    before = decoder.logits(IDS)
    for linear, module in ((decoder.linears[m], m) for m in adapter.linears):
        a, b = (Path(*(torch.from_numpy(adapter.tensors[module][f"glora_{p}.X{x}"]) for x in "du")) for p in "AB")
        linear.delta = GloraDelta(a, b)
    live = decoder.logits(IDS).detach()
    assert float((live - before).abs().max()) > 0.1
    apart = as_a_lora(base, adapter, tmp_path / "a.gguf", IDS, live)
    assert (apart.same_top, apart.kl_mean <= 1e-5) == (1.0, True)
    export_as_lora(base.path, tmp_path / "mine", tmp_path / "plain", allow_unverified=True)
    plain = read_adapter(tmp_path / "plain", base.layers)
    assert plain.config["peft_type"] == "LORA"
    attach(decoder, plain)
    torch.testing.assert_close(decoder.logits(IDS), live, atol=1e-5, rtol=1e-5)


def test_one_path_more_in_one_layer_and_it_is_none(family, tmp_path):  # noqa: F811
    base = open_base(family("llama").gguf)
    _, whole = trained(base)
    cases = {
        "patched": without(whole, "glora_A.Xd"),  # biases are floats, and what is B A lies over them
        "merged": without(without(whole, "glora_A.Xd", ending="_proj"), "glora_E.X", ending="q_proj"),
    }
    one = {**cases["merged"].tensors, base_module(whole): whole.tensors[base_module(whole)]}
    cases["merged"] = Adapter(whole.config, one)
    for door, adapter in cases.items():
        write_adapter(tmp_path / door, adapter)
        found = plan(base.path, tmp_path / door, allow_unverified=True)
        assert (found.door, "adapter" in found.open) == (door, False)
    made = patch(base.path, tmp_path / "patched", tmp_path / "made.gguf", ExportOptions(allow_unverified=True))
    assert made.certificate.passed


def test_a_layer_without_a_bias_gets_none(family):  # noqa: F811
    decoder, _ = trained(open_base(family("qwen2").folder))
    parts = {name: {key for key, _ in linear.delta.named_parameters()} for name, linear in decoder.linears.items()}
    assert {name for name, found in parts.items() if found == PARTS} == {
        name for name in parts if name.endswith(("q_proj", "k_proj", "v_proj"))
    }
    assert all(len(found) in (4, 7) for found in parts.values())


def test_bias_terms_that_only_the_base_could_tell_are_refused(family, tmp_path):  # noqa: F811
    made = family("llama")
    base = open_base(made.folder)
    torch.manual_seed(0)
    pefts(copy.deepcopy(made.theirs), init_weights=False).save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path, base.layers)
    with pytest.raises(AdapterError) as e:
        adapter.change(base_module(adapter))
    assert str(e.value).splitlines() == [
        "model.layers.0.self_attn.q_proj: glora_C or glora_D is not zero",
        "  why: what they make of a bias depends on the base's weights, and on the bias it has",
        "  fix: train it with --method glora, which saves the same as glora_E",
    ]


def test_other_supports_of_its_paths_are_refused(family, tmp_path):  # noqa: F811
    made = family("gemma3")
    pefts(copy.deepcopy(made.theirs), config_A_B="vector").save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="config_A_B is vector, and lora is all that is read here"):
        read_adapter(tmp_path, open_base(made.folder).layers)
