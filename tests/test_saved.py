"""`bias` and `modules_to_save` beside a LoRA: against PEFT in both directions, and through every way out."""

from __future__ import annotations

import copy
import json
import shutil

import numpy as np
import pytest
import torch
from exact import draw
from gguf.constants import GGMLQuantizationType as Type
from merging import require_merged_computes
from peft import LoraConfig, PeftModel, get_peft_model
from resumed import require_same_when_resumed
from safetensors.numpy import load_file, save_file
from same_tokens import IDS, loss_of
from stirred import Stir
from test_resume import data, settings  # noqa: F401
from test_vectors import family  # noqa: F401
from torch.nn import functional

from converters.merge import Part
from converters.merge_to_hf import write_merged_folder
from converters.patch import plan_patch, write_patched, write_rest
from edgelora.architectures.names import EMBEDDING, HEAD
from edgelora.base.decoder import build_decoder
from edgelora.base.model import open_base
from edgelora.base.weights import Dense
from edgelora.config import TrainConfig
from edgelora.errors import AdapterError, ConfigError, ExportError
from edgelora.evaluate.fidelity import fidelity
from edgelora.nn import loss, products
from edgelora.nn.loss import Target
from edgelora.nn.trained_head import TrainedHeadCrossEntropy
from edgelora.peft import saved
from edgelora.peft.adapter import CONFIG, PREFIX, TENSORS, read_adapter
from edgelora.peft.blend import blend
from edgelora.peft.inject import attach, inject, without_adapter
from edgelora.peft.methods import METHODS
from edgelora.peft.saved import SavedDelta
from edgelora.peft.targets import Where
from edgelora.pipeline.exit_plan import plan, through
from edgelora.pipeline.export import ExportOptions
from edgelora.pipeline.merge import MergeOptions, Wanted, write_gguf
from edgelora.pipeline.patch import patch
from edgelora.training.adapter_footprint import adapter_numbers
from edgelora.training.base_footprint import Model
from edgelora.training.run import run_training
from edgelora.training.settle import settle
from runtime.scorer import ScoringEngine

RANK, ALPHA = 4, 6
# PEFT's on a base with biases on q, k and v, and one matrix for embedding and head
BESIDE = {
    "all": {"bias": "all"},
    "lora_only": {"bias": "lora_only"},
    "norms": {"modules_to_save": ("norm",)},
    "layers": {"modules_to_save": ("k_proj", "down_proj")},
    "embedding": {"modules_to_save": ("embed_tokens",)},
    "everything": {"bias": "all", "modules_to_save": ("layers.1.mlp.down_proj", "model.norm", "lm_head")},
}
# PEFT 0.21 asks transformers 5.23 for an attribute it has renamed
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.usefixtures("own_home"),
]


@pytest.fixture(scope="module")
def made(family):  # noqa: F811
    return family("qwen2")


def where_of(asked):
    return Where(("q_proj", "up_proj"), **asked)


def stirred(base, asked, method="lora", folder=None):
    """A decoder with an adapter that has learned something, and the adapter."""
    return Stir(RANK, ALPHA, by=0.2).on(base, method, where_of(asked), folder)


def read(folder, base):
    return read_adapter(folder, base.layers)


@pytest.mark.parametrize("asked", BESIDE.values(), ids=BESIDE)
def test_peft_computes_the_same_outputs_and_gradients(made, tmp_path, asked):
    base = open_base(made.folder)
    decoder, _ = stirred(base, asked, folder=tmp_path / "mine")
    theirs = PeftModel.from_pretrained(copy.deepcopy(made.theirs), tmp_path / "mine", is_trainable=True).eval()
    found = theirs(IDS[None], labels=IDS[None])
    torch.testing.assert_close(decoder.logits(IDS), found.logits[0].detach(), atol=1e-4, rtol=1e-5)
    loss_of(decoder).backward()
    found.loss.backward()
    gradients = {
        name.removeprefix(PREFIX).replace(".default", "").replace(".modules_to_save", "").replace(".base_layer", ""): p
        for name, p in theirs.named_parameters() if p.requires_grad
    }  # fmt: skip
    for name, parameter in decoder.named_parameters():
        short = name.replace(".delta.delta", ".weight").replace(".delta", "").replace(".inner", "")
        wanted = gradients.pop(short if short in gradients else f"{short}.weight").grad
        torch.testing.assert_close(parameter.grad, wanted, atol=1e-5, rtol=1e-4, msg=name)
    assert set(gradients) <= {"lm_head.weight"}  # the same tensor


THEIRS = {
    "all": {"bias": "all"},
    "all, and a layer with a bias": {"bias": "all", "modules_to_save": ["k_proj", "norm"]},
    "lora_only": {"bias": "lora_only", "use_dora": True},
    "embedding": {"modules_to_save": ["embed_tokens", "down_proj"], "ensure_weight_tying": True},
}


def save_pefts(made, folder, **asked):
    """PEFT's own, moved by what is random; its logits."""
    torch.manual_seed(0)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["q_proj", "up_proj"], **asked)
    theirs = get_peft_model(copy.deepcopy(made.theirs), config).eval()
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * (torch.rand(parameter.shape) - 0.5)
    theirs.save_pretrained(folder)
    return theirs(IDS[None]).logits[0].detach()


@pytest.mark.parametrize("asked", THEIRS.values(), ids=THEIRS)
def test_what_peft_saved_computes_the_same_here(made, tmp_path, asked):
    theirs, base = save_pefts(made, tmp_path, **asked), open_base(made.folder)
    decoder = build_decoder(base)
    before, adapter = decoder.logits(IDS), read(tmp_path, base)
    attach(decoder, adapter)
    assert float((decoder.logits(IDS) - before).abs().max()) > 0.1
    torch.testing.assert_close(decoder.logits(IDS), theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings:UserWarning")
@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_half_of_one_matrix_is_refused_with_the_way_to_two(made, tmp_path, module):
    save_pefts(made, tmp_path, modules_to_save=[module])
    with pytest.raises(AdapterError, match=r"one of embedding and head stays as it was.*edgelora untie"):
        read(tmp_path, open_base(made.folder))


@pytest.mark.parametrize("modules", [("embed_tokens",), ("lm_head",)], ids=lambda m: m[0])
def test_of_two_matrices_one_is_trained_as_peft_does(make_tiny, transformers_model, tmp_path, modules):
    tiny = make_tiny(tied=False)
    base = open_base(tiny.path)
    decoder, _ = stirred(base, {"modules_to_save": modules}, folder=tmp_path / "mine")
    theirs = PeftModel.from_pretrained(transformers_model(tiny), tmp_path / "mine", is_trainable=True).eval()
    found = theirs(IDS[None], labels=IDS[None])
    torch.testing.assert_close(decoder.logits(IDS), found.logits[0].detach(), atol=1e-4, rtol=1e-5)
    loss_of(decoder).backward()
    found.loss.backward()
    (ours,) = [p.grad for name, p in decoder.named_parameters() if modules[0] in name]
    (wanted,) = [p.grad for name, p in theirs.named_parameters() if modules[0] in name and p.requires_grad]
    torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", [n for n, row in METHODS.items() if row.peft_type == "LORA" and not row.waits])
def test_whatever_lora_it_stands_beside_it_computes_the_same_when_read_again(made, tmp_path, method):
    base = open_base(made.gguf)
    decoder, _ = stirred(base, {"bias": "all", "modules_to_save": ("k_proj", "lm_head")}, method, tmp_path / "mine")
    live = decoder.logits(IDS)
    adapter = read(tmp_path / "mine", base)
    attach(decoder, adapter)
    torch.testing.assert_close(decoder.logits(IDS), live, atol=1e-4, rtol=1e-5)
    assert adapter.vocabularies == [EMBEDDING]
    assert "bias" in adapter.tensors["model.layers.0.self_attn.v_proj"]


# -- the ways out -------------------------------------------------------------------------------------------------

WHOLE = {"bias": "all", "modules_to_save": ("layers.1.mlp.down_proj", "norm", "embed_tokens")}


def test_merged_it_computes_the_same_in_torch_and_llama_cpp(made, tmp_path):
    base = open_base(made.gguf)
    decoder, _ = stirred(base, WHOLE, folder=tmp_path / "mine")
    require_merged_computes(base, tmp_path / "mine", IDS, decoder.logits(IDS))


@pytest.mark.parametrize(
    ("method", "where"),
    [
        ("lora", Where(modules_to_save=("embed_tokens",))),
        ("full", Where()),
        ("token_rows", Where(token_indices=(3, 7))),
    ],
    ids=["lora", "full", "token_rows"],
)
def test_a_head_that_a_checkpoint_of_one_matrix_stores_too_stays_its_embedding(made, tmp_path, method, where):
    folder = shutil.copytree(made.folder, tmp_path / "base")
    stored = load_file(folder / "model.safetensors")
    before = stored[f"{EMBEDDING}.weight"]
    save_file(stored | {f"{HEAD}.weight": before}, folder / "model.safetensors", metadata={"format": "pt"})
    base = open_base(folder)
    Stir(RANK, ALPHA, by=0.2).on(base, method, where, tmp_path / "mine")
    (tmp_path / "merged").mkdir()
    write_merged_folder(tmp_path / "merged", base, [Part(read(tmp_path / "mine", base), 0.5, "0" * 64, "mine")])
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert np.array_equal(merged[f"{HEAD}.weight"], merged[f"{EMBEDDING}.weight"])
    assert np.abs(merged[f"{HEAD}.weight"] - before).max() > 0.01


def test_several_are_blended_as_they_are_merged(made, tmp_path):
    base, parts = open_base(made.gguf), []
    for i, (asked, scale) in enumerate([(WHOLE, 0.5), ({"bias": "lora_only", "modules_to_save": ("norm",)}, -0.25)]):
        stirred(base, asked, folder=tmp_path / str(i))
        parts.append(Part(read(tmp_path / str(i), base), scale, f"{i}" * 64, str(i)))
    write_gguf(tmp_path / "merged.gguf", base, parts, Wanted.read("F32", MergeOptions()))
    decoder = build_decoder(base)
    blend(decoder, [(part.adapter, part.scale) for part in parts])
    merged = build_decoder(open_base(tmp_path / "merged.gguf"))
    torch.testing.assert_close(decoder.logits(IDS), merged.logits(IDS), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    ("method", "asked"), [("dora", {"bias": "all"}), ("lora", WHOLE)], ids=["biases", "everything"]
)
def test_llama_cpp_computes_the_same_over_a_patched_base(made, tmp_path, method, asked):
    base = open_base(made.gguf)
    decoder, _ = stirred(base, asked, method, tmp_path / "mine")
    found = plan(made.gguf, tmp_path / "mine", allow_unverified=True)
    assert (found.door, found.exact) == ("patched", True)
    assert "llama.cpp adds B A x to W x and nothing else" in found.others["adapter"]
    with pytest.raises(ExportError, match="--door out: it leaves as patched"):
        through(found, "adapter", tmp_path / "mine")
    adapter = read(tmp_path / "mine", base)
    planned = plan_patch(base, adapter)
    assert planned.error <= 1e-7
    write_patched(tmp_path / "patched.gguf", base, planned, Part(adapter, 1.0, "0" * 64, "mine"))
    write_rest(tmp_path / "rest.gguf", base, planned, "mine", None, "F32")
    with ScoringEngine(open_base(tmp_path / "patched.gguf"), n_ctx=64, threads=1) as engine:
        engine.load("rest", tmp_path / "rest.gguf", allow_unverified=True)
        engine.use({"rest": 1.0})
        theirs = engine.logits([IDS.tolist()], [list(range(len(IDS)))])
    assert fidelity([(decoder.logits(IDS).numpy(), theirs)]).kl_mean <= 1e-5


@pytest.mark.parametrize(("kind", "becomes", "least"), [(Type.Q8_0, Type.Q8_0, 1e-3), (Type.Q4_K, Type.F16, 1e-4)],
                         ids=["Q8_0", "Q4_K"])  # fmt: skip
def test_over_blocks_what_storing_an_embedding_lost_is_counted(make_tiny, tmp_path, kind, becomes, least):
    """End to end, certified; the norms' F32 is what was trained, and no other tensor changes."""
    base = open_base(make_tiny(kind).path)
    _, adapter = stirred(base, {"modules_to_save": ("norm", "embed_tokens")}, folder=tmp_path / "mine")
    found = plan(base.path, tmp_path / "mine", allow_unverified=True)
    assert (found.door, found.exact) == ("patched", True)
    made = patch(base.path, tmp_path / "mine", tmp_path / "patched.gguf", ExportOptions(allow_unverified=True))
    assert made.certificate.passed
    assert made.path.stat().st_size + made.rest.stat().st_size == pytest.approx(found.size_bytes, rel=0.05)
    written = open_base(made.path)
    for name, info in base.file.tensors.items():
        assert written.file.tensors[name].type == (becomes if name == "token_embd.weight" else info.type)
        if name != "token_embd.weight":
            assert np.array_equal(base.file.rows(name), written.file.rows(name)) == ("norm" not in name)
    wanted = adapter.tensors[EMBEDDING]["weight"]
    off = written.tensors.matrix(f"{EMBEDDING}.weight").floats() - wanted
    assert made.error == pytest.approx(np.sqrt((off**2).sum() / (wanted**2).sum()), rel=1e-3)
    assert least < made.error < 10 * least
    assert f"storing token_embd.weight as {becomes.name} lost {made.error:.2g} of its size" in made.notes[0]
    for module in adapter.norms:
        np.testing.assert_allclose(written.tensors.vector(f"{module}.weight"), adapter.norm(module), rtol=1e-6)


def test_linear_layers_are_saved_whole_over_floats_alone(make_tiny):
    base = open_base(make_tiny(Type.Q8_0).path)
    config = TrainConfig(base=base.path, data="rows.jsonl", out="out", modules_to_save=("down_proj", "embed_tokens"))
    with pytest.raises(ConfigError) as e:
        settle(config, base, 10**10)
    assert str(e.value).splitlines() == [
        f"--method lora --modules-to-save down_proj: {base.path} is Q8_0",
        "  why: it changes every weight by a little of its own, which blocks of a few bits cannot take up",
        "  fix: pass --base-dtype f32, or bf16 for half the memory; --method lora trains over blocks as they are",
    ]
    with pytest.raises(ConfigError, match="the base's weights are quantized"):
        inject(build_decoder(base), "lora", RANK, ALPHA, 0, Where(modules_to_save=("down_proj",)))


# -- the head -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how",
    [Target(), Target(softcap=3.0), Target(smoothing=0.1), Target(compute=torch.bfloat16)],
    ids=["plain", "bent", "smoothed", "bfloat16"],
)
def test_cross_entropy_under_a_trained_head_is_torchs(monkeypatch, how):
    monkeypatch.setattr(loss, "LOGITS", 5 * 40)  # five positions at once
    hidden, own, delta, each = (
        draw(*shape, seed=i).float() for i, shape in enumerate([(12, 8), (40, 8), (40, 8), (12,)])
    )
    labels = torch.arange(12) % 7
    ours, theirs = ([one.clone().requires_grad_() for one in (hidden, delta)] for _ in range(2))
    nll = TrainedHeadCrossEntropy.apply(ours[0], ours[1], Dense(own), labels, how)
    z = theirs[0] @ (own + theirs[1]).T
    z = z if how.softcap is None else how.softcap * torch.tanh(z / how.softcap)
    wanted = functional.cross_entropy(z, labels, reduction="none", label_smoothing=how.smoothing)
    narrow = how.compute is not None
    # where bfloat16 can be summed in float32, logits are of rounded factors (test_compiled.py)
    error = 0.05 if narrow and products.exist(how.compute) else 1e-5
    torch.testing.assert_close(nll, wanted, atol=error, rtol=1e-5)
    for one in (nll, wanted):
        (one * each).sum().backward()
    for found, one in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found.grad, one.grad, atol=0.05 if narrow else 1e-5, rtol=0.05 if narrow else 1e-4)


def test_an_embedding_that_is_the_head_has_one_gradient_in_a_step(tiny):
    decoder = build_decoder(open_base(tiny.path))
    inject(decoder, "lora", RANK, ALPHA, 0, Where(modules_to_save=("embed_tokens",)))
    (parameter,) = decoder.model.embed_tokens.parameters()
    loss_of(decoder).backward()
    once, place = parameter.grad.clone(), parameter.grad.data_ptr()
    loss_of(decoder).backward()
    assert parameter.grad.data_ptr() == place
    torch.testing.assert_close(parameter.grad, 2 * once)
    before = decoder.logits(IDS)
    with torch.no_grad():
        parameter += 1
    with without_adapter(decoder):
        assert torch.equal(decoder.logits(IDS), before)


def test_what_is_saved_is_put_together_a_few_rows_at_a_time(monkeypatch):
    """Beside the card: it has no room for the whole embedding in float32."""
    own = draw(12, 8).float()
    delta = SavedDelta(Dense(own))
    with torch.no_grad():
        delta.delta += 1
    monkeypatch.setattr(saved, "ROWS_AT_ONCE", 5)
    monkeypatch.setattr(Dense, "dequantize", None)
    assert torch.equal(delta.tensors()["weight"], own + 1)
    assert bool((delta.delta == 1).all())


# -- a run --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(made, settings, tmp_path_factory):  # noqa: F811
    """The config of a whole run."""
    config = settings(
        tmp_path_factory.mktemp("runs") / "mine", base=made.folder, max_steps=2, eval_every=2, lora_dropout=0.1, **WHOLE
    )
    run_training(config)
    return config


def test_a_resumed_run_is_the_uninterrupted_one(run):
    require_same_when_resumed(run, 1)


def test_a_run_leaves_what_it_trained_whole(run):
    base, tensors = open_base(run.base), load_file(run.out / TENSORS)
    whole = read(run.out, base)
    assert (whole.vocabularies, len(whole.norms)) == ([EMBEDDING], len(base.norms))
    assert np.array_equal(tensors[f"{PREFIX}{HEAD}.weight"], tensors[f"{PREFIX}{EMBEDDING}.weight"])
    assert {name.rpartition(".")[2] for name in whole.linears if "bias" in whole.tensors[name]} == {
        "q_proj", "k_proj", "v_proj",
    }  # fmt: skip
    moved = tensors[f"{PREFIX}{EMBEDDING}.weight"] - base.tensors.matrix(f"{EMBEDDING}.weight").floats()
    assert 0 < np.abs(moved).max() < 0.1
    told = json.loads((run.out / CONFIG).read_text())
    wanted = {"bias": "all", "modules_to_save": list(WHOLE["modules_to_save"]), "ensure_weight_tying": True}
    assert {name: told[name] for name in wanted} == wanted


@pytest.mark.parametrize("asked", [{}, WHOLE], ids=["none", "everything"])
def test_the_plan_counts_what_is_trained(made, asked):
    base = open_base(made.folder)
    decoder = build_decoder(base)
    inject(decoder, "lora", RANK, ALPHA, 0, Where(**asked))
    config = TrainConfig(base=made.folder, data="rows.jsonl", out="out", rank=RANK, **asked)
    assert adapter_numbers(Model.of(base), config) == sum(p.numel() for p in decoder.parameters())


# -- what is refused ----------------------------------------------------------------------------------------------

FAULTS = {
    "a name that is no layer's": ("lora", {"modules_to_save": ("lm_haed", "mlp")}, "did you mean lm_head"),
    "a method of its own": ("ia3", {"bias": "all"}, "nothing that --method ia3 could use"),
    "no layer left": ("lora", {"modules_to_save": ("proj", "norm")}, "modules_to_save leaves no layer to adapt"),
    "a target": (
        "lora",
        {"target_modules": ("q_proj", "up_proj"), "modules_to_save": ("q_proj",)},
        "modules_to_save leaves no q_proj to adapt",
    ),
    "one that waits": ("alora", {"modules_to_save": ("norm",)}, "it waits for its invocation"),
}


@pytest.mark.parametrize(("method", "asked", "said"), FAULTS.values(), ids=FAULTS)
def test_what_cannot_be_trained_is_refused(made, method, asked, said):
    with pytest.raises(ConfigError, match=said):
        inject(build_decoder(open_base(made.folder)), method, RANK, ALPHA, 0, Where(**asked))


def test_biases_are_refused_where_there_are_none(tiny):
    with pytest.raises(ConfigError) as e:
        inject(build_decoder(open_base(tiny.path)), "lora", RANK, ALPHA, 0, Where(bias="all"))
    assert str(e.value).splitlines() == [
        "bias all: no layer of this model has a bias",
        "  why: PEFT trains the biases that a model has, and here these are none",
        "  fix: leave it out; --method bitfit trains biases, and gives one to every layer",
    ]
