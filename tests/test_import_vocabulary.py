"""What PEFT trains beside A and B of linear layers, each against PEFT itself, in torch and in llama.cpp: rows of
tokens, a LoRA of the embedding or the head, biases of B."""

from __future__ import annotations

import json
from dataclasses import fields

import numpy as np
import pytest
import torch
from merging import require_merged_computes
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import MontecloraConfig, VeloraConfig
from safetensors.numpy import load_file, save_file
from same_tokens import IDS, NEARLY_TIED

from converters.adapter_to_gguf import write_adapter_gguf
from converters.merge import Part
from converters.patch import plan_patch, write_patched, write_rest
from converters.untie import write_untied
from edgelora.base.decoder import build_decoder
from edgelora.base.model import open_base
from edgelora.errors import AdapterError, ExportError
from edgelora.evaluate.fidelity import fidelity
from edgelora.peft.adapter import CONFIG, TENSORS, read_adapter
from edgelora.peft.inject import attach
from edgelora.peft.lora_settings import SETTINGS
from edgelora.pipeline.compose import ComposeOptions, compose_adapters
from edgelora.pipeline.exit_plan import plan
from edgelora.pipeline.import_adapter import export_as_lora, import_adapter
from edgelora.pipeline.inspect_adapter import peft_adapter
from runtime.scorer import ScoringEngine

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*invalid shape"),  # PEFT's own, on biases of B
    pytest.mark.filterwarnings("ignore:.lora_bias=True. was passed but the targeted layer:UserWarning"),
]

TOKENS = [3, 77, 500]
LAYERS = ["q_proj", "down_proj"]
IDS = IDS.clone()
IDS[[2, 9, 10, 20]] = torch.tensor([77, 500, 77, 3])
BESIDE = {
    "rows": {"trainable_token_indices": TOKENS},
    "rows by name": {"trainable_token_indices": {"embed_tokens": TOKENS, "lm_head": TOKENS}},
    "rows and norms": {"trainable_token_indices": TOKENS, "modules_to_save": ["norm"]},
    "rows of a DoRA": {"trainable_token_indices": TOKENS, "use_dora": True},
    "embedding": {
        "target_modules": [*LAYERS, "embed_tokens"],
        "alpha_pattern": {"embed_tokens": 3},
        "use_rslora": True,
    },
    "head": {"target_modules": r".*\.(q|down)_proj|lm_head", "rank_pattern": {"lm_head": 2}},
    "both, tied": {"target_modules": [*LAYERS, "embed_tokens"], "ensure_weight_tying": True},
    "both": {"target_modules": [*LAYERS, "embed_tokens", "lm_head"]},
    "biases of B": {"lora_bias": True, "use_rslora": True},
}
ALONE = ["embedding", "head"]  # what one matrix for both cannot be
PATCHED = ["rows and norms", "rows of a DoRA", "biases of B"]  # what is more than B A
TIED = ["rows", "both, tied", "embedding"]


def saved_by_peft(model, transformers_model, folder, beside):
    """PEFT's folder of a LoRA with this beside it, all of it random; its logits."""
    torch.manual_seed(0)
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "init_lora_weights": False, "target_modules": LAYERS, **beside})
    theirs = get_peft_model(transformers_model(model), config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad:
                few = "trainable_tokens" in name or "norm" in name or name.endswith("bias")
                parameter.mul_(1.1 if "magnitude" in name else 0.3 if "lora_" in name else 1)
                parameter.add_(0.3 * torch.randn(parameter.shape) if few else 0)
        theirs.save_pretrained(folder)
        return theirs(IDS[None]).logits[0]


@pytest.fixture(scope="module")
def bases(make_tiny):
    """With one matrix for embedding and head, and with two."""
    return {tied: (model := make_tiny(tied=tied), open_base(model.path)) for tied in (True, False)}


@pytest.fixture(
    scope="module", ids=lambda case: f"{case[0]}{' over one matrix' * case[1]}",
    params=[*((name, True) for name in TIED), *((name, False) for name in BESIDE if name != "both, tied")],
)  # fmt: skip
def case(request, bases, transformers_model, tmp_path_factory):
    name, tied = request.param
    folder = tmp_path_factory.mktemp("theirs")
    return name, *bases[tied], folder, saved_by_peft(bases[tied][0], transformers_model, folder, BESIDE[name])


def test_what_peft_saved_computes_the_same_and_leaves_by_its_doors(case, transformers_model, tmp_path):
    name, model, base, theirs, wanted = case
    if name in ALONE and base.layers.tied:
        with pytest.raises(AdapterError, match=r"one of embedding and head stays .* this base has one matrix for both"):
            import_adapter(base.path, theirs, tmp_path / "mine", allow_unverified=True)
        with pytest.raises(AdapterError) as refused:
            read_adapter(theirs, base.layers)
        assert "`edgelora untie BASE --out FILE`" in refused.value.fix
        return
    import_adapter(base.path, theirs, tmp_path / "mine", allow_unverified=True)
    for folder in (theirs, tmp_path / "mine"):
        decoder = build_decoder(base)
        attach(decoder, read_adapter(folder, base.layers))
        torch.testing.assert_close(decoder.logits(IDS), wanted, atol=1e-4, rtol=1e-4)
    assert float((wanted - build_decoder(base).logits(IDS)).abs().max()) > 0.1
    again = PeftModel.from_pretrained(transformers_model(model), tmp_path / "mine").eval()
    torch.testing.assert_close(again(IDS[None]).logits[0].detach(), wanted, atol=1e-5, rtol=1e-5)

    require_merged_computes(base, tmp_path / "mine", IDS, wanted, atol=1e-4)
    assert peft_adapter(tmp_path / "mine").faults == []
    found = plan(base.path, tmp_path / "mine", allow_unverified=True)
    adapter = read_adapter(tmp_path / "mine", base.layers)
    if name in PATCHED:
        assert (found.door, found.exact) == ("patched", True)
        planned = plan_patch(base, adapter)
        write_patched(tmp_path / "patched.gguf", base, planned, Part(adapter, 1.0, "0" * 64, "mine"))
        write_rest(tmp_path / "a.gguf", base, planned, "a", None, "F32")
        base = open_base(tmp_path / "patched.gguf")
    elif base.layers.tied:
        assert found.door == "merged"
        assert "`edgelora untie" in found.notes[0]
        with pytest.raises(ExportError, match="its embedding is its head too"):
            write_adapter_gguf(tmp_path / "a.gguf", adapter, base, "a", "F32")
        write_untied(tmp_path / "untied.gguf", base)
        tied, base = base, open_base(tmp_path / "untied.gguf")
        write_adapter_gguf(tmp_path / "a.gguf", read_adapter(tmp_path / "mine", base.layers), base, "a", "F32")
        with pytest.raises(AdapterError) as refused:
            import_adapter(tied.path, tmp_path / "a.gguf", tmp_path / "again", allow_unverified=True)
        assert "`edgelora untie BASE --out FILE`" in refused.value.fix
    else:
        assert (found.door, found.exact) == ("adapter", True)
        write_adapter_gguf(tmp_path / "a.gguf", adapter, base, "a", "F32")
    with ScoringEngine(base, n_ctx=64, threads=1) as engine:
        engine.load_own("a", tmp_path / "a.gguf")
        engine.use({"a": 1.0})
        seen = engine.logits([IDS.tolist()], [list(range(len(IDS)))])
    judged = fidelity([(wanted.numpy(), seen)])
    assert judged.kl_mean <= 1e-5
    assert judged.same_top == 1.0 or judged.worst_flip_nats <= NEARLY_TIED
    if name not in PATCHED:  # and the GGUF becomes PEFT's again
        import_adapter(base.path, tmp_path / "a.gguf", tmp_path / "again", allow_unverified=True)
        decoder = build_decoder(base)
        attach(decoder, read_adapter(tmp_path / "again", base.layers))
        torch.testing.assert_close(decoder.logits(IDS), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("name", "tied"), [("both", False), ("both, tied", True)])
def test_loras_of_the_vocabulary_are_folded_and_composed(bases, transformers_model, tmp_path, name, tied):
    """Of a sum each ΔW is PEFT's own dense one, the embedding's among them; over one matrix the head has it too."""
    model, base = bases[tied]
    saved_by_peft(model, transformers_model, tmp_path / "theirs", BESIDE[name] | {"use_rslora": True})
    parts = [(tmp_path / "theirs", 0.5), (tmp_path / "theirs" / ".." / "plain", -0.25)]
    export_as_lora(base.path, tmp_path / "theirs", tmp_path / "plain", allow_unverified=True)
    assert not json.loads((tmp_path / "plain" / CONFIG).read_text())["use_rslora"]
    made = compose_adapters(base.path, parts, tmp_path / "sum", ComposeOptions(report=True, allow_unverified=True))
    assert {layer.module for layer in made.layers} > set(base.vocabularies)
    for folder, weight in (("plain", 1.0), ("sum", 0.25)):
        theirs = PeftModel.from_pretrained(transformers_model(model), tmp_path / "theirs").base_model.model
        found = PeftModel.from_pretrained(transformers_model(model), tmp_path / folder).base_model.model
        for (at, one), (where, other) in zip(changes_of(theirs), changes_of(found), strict=True):
            assert at == where
            torch.testing.assert_close(other, weight * one, atol=1e-5, rtol=1e-4)


def changes_of(model):
    """PEFT's dense ΔW of each layer."""
    return [
        (name, layer.get_delta_weight("default").detach())
        for name, layer in model.named_modules() if hasattr(layer, "get_delta_weight")
    ]  # fmt: skip


def test_over_one_matrix_nothing_is_left_beside_a_patched_base(bases, transformers_model, tmp_path):
    """A DoRA with rows of tokens: the rows would be a LoRA of the embedding, which is the head too."""
    model, base = bases[True]
    saved_by_peft(model, transformers_model, tmp_path / "theirs", BESIDE["rows of a DoRA"])
    found = plan(base.path, tmp_path / "theirs", allow_unverified=True)
    assert found.door == "merged"
    assert "`edgelora untie" in found.others["patched"]
    with pytest.raises(ExportError, match="its embedding is its head too"):
        plan_patch(base, read_adapter(tmp_path / "theirs", base.layers))


@pytest.mark.parametrize("tied", [True, False], ids=["one matrix", "two"])
def test_whole_matrices_that_peft_saved_without_naming_them_are_read(bases, transformers_model, tmp_path, tied):
    """`save_embedding_layers`: a LoRA over a base whose embedding was made another before."""
    model, base = bases[tied]
    changed = transformers_model(model)
    with torch.no_grad():
        changed.get_input_embeddings().weight.mul_(1.5)
    theirs = get_peft_model(changed, LoraConfig(r=4, init_lora_weights=False, target_modules=LAYERS)).eval()
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=True)
    assert peft_adapter(tmp_path / "theirs").faults == []
    import_adapter(base.path, tmp_path / "theirs", tmp_path / "mine", allow_unverified=True)
    decoder = build_decoder(base)
    attach(decoder, read_adapter(tmp_path / "mine", base.layers))
    torch.testing.assert_close(decoder.logits(IDS), theirs(IDS[None]).logits[0].detach(), atol=1e-4, rtol=1e-4)


OLD_NAMES = {
    "the adapter's own name": lambda name: name.replace("_delta", "_delta.mine").replace(".weight", ".mine.weight"),
    "no prefix": lambda name: name.removeprefix("base_model.model."),
    "torch.compile": lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."),
    "FSDP": lambda name: name.replace("model.model.", "model._fsdp_wrapped_module.model."),
}  # fmt: skip


def test_names_of_other_trainers_are_taken_as_pefts(bases, transformers_model, tmp_path):
    model, base = bases[False]
    saved_by_peft(model, transformers_model, tmp_path / "theirs", BESIDE["rows by name"])
    usual = load_file(tmp_path / "theirs" / TENSORS)
    import_adapter(base.path, tmp_path / "theirs", tmp_path / "mine", allow_unverified=True)
    wanted = load_file(tmp_path / "mine" / TENSORS)
    for rename in OLD_NAMES.values():
        old = {rename(name): values for name, values in usual.items()}
        assert old.keys() != usual.keys()
        save_file(old, tmp_path / "theirs" / TENSORS)
        import_adapter(base.path, tmp_path / "theirs", tmp_path / "mine", allow_unverified=True, overwrite=True)
        found = load_file(tmp_path / "mine" / TENSORS)
        assert found.keys() == wanted.keys()
        assert all(np.array_equal(found[name], values) for name, values in wanted.items())


def test_an_embedding_of_another_base_is_told_by_what_peft_saved_of_it(bases, transformers_model, tmp_path):
    model, base = bases[False]
    saved_by_peft(model, transformers_model, tmp_path / "theirs", BESIDE["both"])
    tensors = load_file(tmp_path / "theirs" / TENSORS)
    (name,) = (one for one in tensors if one.endswith("lm_head.base_layer.weight"))
    save_file(tensors | {name: tensors[name] * -1}, tmp_path / "theirs" / TENSORS)
    with pytest.raises(AdapterError, match=r"lm_head: the matrix \(512, 256\) that is saved with it is not the base's"):
        import_adapter(base.path, tmp_path / "theirs", tmp_path / "mine", allow_unverified=True)


# -- every setting of PEFT's --------------------------------------------------------------------------------------


def test_each_setting_of_pefts_has_its_row():
    assert set(SETTINGS) == {field.name for field in fields(LoraConfig)}


@pytest.mark.parametrize(
    "settings",
    [{"velora_config": VeloraConfig(num_groups=4)}, {"monteclora_config": MontecloraConfig()},
     {"init_lora_weights": "mica"}, {"layers_to_transform": [1], "exclude_modules": ["down_proj"]}],
    ids=["velora", "monteclora", "mica", "some layers"],
)  # fmt: skip
def test_what_is_said_not_to_matter_does_not(bases, transformers_model, tmp_path, settings):
    model, base = bases[False]
    torch.manual_seed(0)
    config = LoraConfig(**{"r": 4, "target_modules": LAYERS, "init_lora_weights": False, **settings})
    theirs = get_peft_model(transformers_model(model), config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape))
    theirs.save_pretrained(tmp_path / "theirs")
    import_adapter(base.path, tmp_path / "theirs", tmp_path / "mine", allow_unverified=True)
    decoder = build_decoder(base)
    attach(decoder, read_adapter(tmp_path / "mine", base.layers))
    torch.testing.assert_close(decoder.logits(IDS), theirs(IDS[None]).logits[0].detach(), atol=1e-4, rtol=1e-4)


REFUSED = {
    "DoRA of the head": ({"use_dora": True, "target_modules": ["q_proj", "lm_head"]}, "use_dora is set: lengths of"),
    "tokens": ({"trainable_token_indices": [3, 3]}, "trainable_token_indices names a token twice"),
    "no tokens": ({"trainable_token_indices": {"lm_head": "all"}}, "trainable_token_indices of lm_head is all"),
    "of another kind": ({"peft_type": "IA3", "lora_bias": True}, "lora_bias is set in an IA3"),
    "a router": ({"arrow_config": {"top_k": 3}}, "arrow_config is set: a router chooses among adapters for every"),
}  # fmt: skip


@pytest.mark.parametrize("case_", REFUSED)
def test_what_is_refused_is_named_with_the_nearest_door(bases, transformers_model, tmp_path, case_):
    settings, said = REFUSED[case_]
    model, base = bases[False]
    saved_by_peft(model, transformers_model, tmp_path, {})
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | settings))
    for read in (lambda: read_adapter(tmp_path, base.layers),
                 lambda: import_adapter(base.path, tmp_path, tmp_path / "mine", allow_unverified=True)):  # fmt: skip
        with pytest.raises(AdapterError) as refused:
            read()
        assert said in refused.value.what
        if " is set: " in said:
            assert "merge it" in refused.value.fix
            assert "edgelora convert" in refused.value.fix or "convert the result" in refused.value.fix
