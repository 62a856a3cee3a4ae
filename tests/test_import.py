"""Adapters that other programs wrote: what is imported computes what it computed there, or is refused by its name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType as Type
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file
from same_tokens import IDS
from test_architectures import CASES, seeded
from test_export import IDS as ROWS
from test_export import make_adapter, torch_logits

from converters.adapter_from_peft import plain_name
from converters.adapter_to_gguf import write_adapter_gguf
from edgelora.architectures.names import gguf_row_order
from edgelora.base import ggml
from edgelora.base.decoder import build_decoder
from edgelora.base.model import open_base
from edgelora.cli import run
from edgelora.errors import AdapterError, EdgeloraError, OutputError
from edgelora.evaluate.fidelity import fidelity
from edgelora.peft.adapter import CONFIG, MAGNITUDE, TENSORS, VIRTUAL, Adapter, read_adapter, write_adapter
from edgelora.peft.inject import adapter_config, attach, collect, inject
from edgelora.peft.targets import Where
from edgelora.pipeline.import_adapter import export_as_lora, import_adapter
from runtime.scorer import ScoringEngine

Q = "model.layers.0.self_attn.q_proj"
# PEFT 0.21 asks transformers 5.23 for an attribute it has renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def base(tiny):
    return open_base(tiny.path)


def imported(base, source, folder, **options):
    import_adapter(base.path, source, folder, **{"allow_unverified": True, **options})
    return read_adapter(folder, base.layers)


# -- GGUF ---------------------------------------------------------------------------------------------------------


def write_as_llama_cpp(path, base, pairs, alpha, kind=Type.F32):
    """A LoRA as convert_lora_to_gguf.py leaves it: A and B as PEFT has them, one α, the rows of q and k permuted."""
    writer = gguf.GGUFWriter(path, base.architecture.gguf_name)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    for module, (a, b) in pairs.items():
        order = gguf_row_order(base.architecture, base.config, module)
        for half, values in (("lora_a", a), ("lora_b", b if order is None else b[order])):
            blocks = ggml.quantize(np.ascontiguousarray(values), kind)
            writer.add_tensor(f"{base.tensor_of(module)}.{half}", blocks, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def drawn_pairs(base, ranks, strength=0.05):
    """A and B of every linear layer, of these ranks by turns."""
    draw, pairs = np.random.default_rng(3), {}
    for i, (module, (d_out, d_in)) in enumerate(base.linears.items()):
        rank = ranks[i % len(ranks)]
        a, b = draw.normal(0, d_in**-0.5, (rank, d_in)), draw.normal(0, strength, (d_out, rank))
        pairs[module] = (a.astype(np.float32), b.astype(np.float32))
    return pairs


@pytest.fixture(scope="module")
def engine(base):
    with ScoringEngine(base, n_ctx=256, n_sequences=2, threads=2) as engine:
        yield engine


def llama_logits(engine, adapter):
    engine.load(adapter.parent.name, adapter, allow_unverified=True)
    engine.use({adapter.parent.name: 1.0})
    return np.concatenate([engine.logits([row], [list(range(len(row)))]) for row in ROWS])


@pytest.mark.parametrize(
    ("ranks", "alpha", "kind"),
    [((4,), 8.0, Type.F32), ((4, 2), 3.0, Type.F16), ((4, 2), 0.0, Type.F32), ((32,), 48.0, Type.Q8_0)],
    ids=["α of one rank", "α of two ranks", "α = 0", "Q8_0"],
)
def test_a_gguf_computes_as_in_llama_cpp(base, engine, tmp_path, ranks, alpha, kind):
    write_as_llama_cpp(tmp_path / "a.gguf", base, drawn_pairs(base, ranks), alpha, kind)
    adapter = imported(base, tmp_path / "a.gguf", tmp_path / "mine")
    assert {len(parts["lora_A"]) for parts in adapter.tensors.values()} == set(ranks)
    ours, theirs = torch_logits(base, adapter), llama_logits(engine, tmp_path / "a.gguf")
    found = fidelity([(ours, theirs)]).kl_mean
    assert found <= (5e-4 if kind == Type.Q8_0 else 1e-5)  # beside Q8_0 llama.cpp rounds activations to 8 bits
    assert fidelity([(torch_logits(base), theirs)]).kl_mean > 100 * found


@pytest.fixture(scope="module")
def llama_cpps_converter():
    """convert_lora_to_gguf.py, in the folder of llama.cpp's tools or above it, as its source builds them."""
    folder = Path(os.environ.get("EDGELORA_LLAMA_TOOLS", "nowhere")).resolve()
    found = [place / "convert_lora_to_gguf.py" for place in (folder, *folder.parents[:2])]
    script = next((path for path in found if path.is_file()), None)
    return script or pytest.skip("EDGELORA_LLAMA_TOOLS names no folder with llama.cpp's convert_lora_to_gguf.py")


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3"])
def test_what_llama_cpps_converter_wrote_is_what_peft_saved(
    llama_cpps_converter, tmp_path, vocabulary, write_tokenizer, name
):
    model = seeded(CASES[name])
    model.save_pretrained(tmp_path / "hf")
    write_tokenizer(tmp_path / "hf", vocabulary, None)
    config = LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, target_modules="all-linear")
    get_peft_model(model, config).save_pretrained(tmp_path / "theirs")
    options = ["--base", tmp_path / "hf", "--outfile", tmp_path / "a.gguf", "--outtype", "f32"]
    subprocess.run([sys.executable, llama_cpps_converter, *options, tmp_path / "theirs"], check=True)
    base = open_base(tmp_path / "hf")
    ours, theirs = (
        imported(base, tmp_path / "a.gguf", tmp_path / "mine"),
        read_adapter(tmp_path / "theirs", base.layers),
    )
    assert set(ours.tensors) == set(theirs.tensors) == set(base.linears)
    for module in base.linears:
        np.testing.assert_array_equal(ours.pair(module).a, theirs.pair(module).a)
        np.testing.assert_array_equal(ours.pair(module).b, theirs.pair(module).b)


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 32.0}}])
def test_from_peft_to_gguf_and_back_no_bit_is_lost(base, tmp_path, settings):
    before = make_adapter(base, **settings)
    write_adapter_gguf(tmp_path / "a.gguf", before, base, "a", "F32")
    after = imported(base, tmp_path / "a.gguf", tmp_path / "mine", allow_unverified=False)
    assert set(after.tensors) == set(base.linears)
    for module in base.linears:
        for ours, theirs in zip((after.pair(module).a, after.pair(module).b),
                                (before.pair(module).a, before.pair(module).b), strict=True):  # fmt: skip
            np.testing.assert_array_equal(ours, theirs)
    assert after.contract == before.contract


def test_an_imported_adapter_names_its_base_from_then_on(base, make_tiny, tmp_path):
    write_as_llama_cpp(tmp_path / "a.gguf", base, drawn_pairs(base, (4,)), 8.0)
    with pytest.raises(AdapterError, match="does not say which base"):
        import_adapter(base.path, tmp_path / "a.gguf", tmp_path / "mine")
    contract = imported(base, tmp_path / "a.gguf", tmp_path / "mine").contract
    assert contract.base == base.fingerprint
    assert contract.training["imported"]["from"] == "GGUF"
    again = imported(base, tmp_path / "mine", tmp_path / "again", allow_unverified=False)
    assert again.contract == contract
    with pytest.raises(AdapterError, match="does not belong to"):
        import_adapter(make_tiny(seed=7).path, tmp_path / "mine", tmp_path / "other", allow_unverified=True)


def test_another_base_and_what_does_not_fit_it_are_told_in_one_error(base, make_tiny, tmp_path):
    other, mine = make_tiny(seed=7).path, make_adapter(base)
    narrow = {**mine.tensors, Q: {**mine.tensors[Q], "lora_A": mine.tensors[Q]["lora_A"][:, :64]}}
    fault = f"{Q}: A is (4, 64) and B (256, 4), expected (r, 256) and (256, r)"
    for name, contract in (("mine", mine.contract), ("foreign", None)):
        write_adapter(tmp_path / name, replace(mine, tensors=narrow, contract=contract))
    with pytest.raises(AdapterError) as error:
        import_adapter(other, tmp_path / "mine", tmp_path / "out")
    before, _, after = error.value.what.partition("the norm weights are others; ")
    assert before == f"{tmp_path / 'mine'} does not belong to {other}: "
    assert after.endswith(fault)
    with pytest.raises(AdapterError) as error:
        import_adapter(other, tmp_path / "foreign", tmp_path / "out")
    assert error.value.what == f"{tmp_path / 'foreign'}: {fault}; it does not say which base it belongs to"
    assert error.value.fix.startswith("pass the base it was trained on; ")
    a, b = (mine.tensors[Q][half] for half in ("lora_A", "lora_B"))
    write_as_llama_cpp(tmp_path / "a.gguf", base, {Q: (a[:, :64], b)}, 8.0)
    with pytest.raises(AdapterError, match=r"expected \(r, 256\) with B's r 4; it does not say which base"):
        import_adapter(other, tmp_path / "a.gguf", tmp_path / "out")
    with pytest.raises(AdapterError) as error:
        import_adapter(base.path, other, tmp_path / "out")
    assert error.value.what == f"{other}: general.type is 'model', expected 'adapter'"


# -- MLX ----------------------------------------------------------------------------------------------------------


def write_mlx(folder, tensors, **settings):
    """As mlx-lm's `train` leaves it."""
    folder.mkdir()
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, folder / "adapters.safetensors")
    parameters = {"rank": 4, "scale": 20.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]}
    config = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(config | settings))


def mlx_tensors(module=Q, shape=(256, 256), rank=4):
    draw, (d_out, d_in) = np.random.default_rng(4), shape
    a, b = draw.normal(0, d_in**-0.5, (d_in, rank)), draw.normal(0, 0.02, (rank, d_out))
    return {f"{module}.lora_a": a.astype(np.float32), f"{module}.lora_b": b.astype(np.float32)}


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("prefix", ["", "language_model."], ids=["text", "sees too"])
def test_mlx_computes_what_its_formula_says(base, tiny, tmp_path, kind, prefix):
    """Of mlx_lm/tuner/lora.py and dora.py, in numpy: mlx runs on Apple's machines only."""
    tensors, w = mlx_tensors(), tiny.weights[f"{Q}.weight"]
    a, b = tensors.values()
    x = np.random.default_rng(0).normal(size=(7, 256)).astype(np.float32)
    wanted = x @ w.T + 20.0 * ((x @ a) @ b)
    if kind == "dora":
        m = np.linalg.norm(w, axis=1) * np.random.default_rng(1).uniform(0.8, 1.2, len(w)).astype(np.float32)
        tensors[f"{Q}.m"] = m
        wanted *= m / np.linalg.norm(w + (20.0 * b.T) @ a.T, axis=1)
    write_mlx(tmp_path / "mlx", {f"{prefix}{name}": value for name, value in tensors.items()}, fine_tune_type=kind)
    adapter = imported(base, tmp_path / "mlx", tmp_path / "mine")
    assert list(adapter.tensors) == [Q]
    decoder = build_decoder(base)
    attach(decoder, adapter)
    with torch.no_grad():
        np.testing.assert_allclose(decoder.linears[Q](torch.from_numpy(x)).numpy(), wanted, atol=1e-4, rtol=1e-4)


MLX_FAULTS = {
    "full": ({}, {"fine_tune_type": "full"}, "fine_tune_type is full"),
    "first": ({}, {"lora_parameters": {"rank": 4, "scale": 10.0, "alpha": 16.0}}, "alpha is 16.0 beside a scale"),
    "scaleless": ({}, {"lora_parameters": {"rank": 4}}, "scale is None"),
    "experts": (
        {"model.layers.0.mlp.switch_mlp.up_proj.lora_a": np.zeros((2, 4, 256), np.float32)}, {}, "experts of a mixture",
    ),
    "embedding": (mlx_tensors("model.embed_tokens", (256, 512)), {}, "model.embed_tokens is of the token embeddings"),
    "turned": ({f"{Q}.lora_a": np.zeros((4, 256), np.float32)}, {}, r"A is \(256, 4\) and B \(256, 4\), expected"),
    "no lengths": ({}, {"fine_tune_type": "dora"}, "m is missing"),
}  # fmt: skip


@pytest.mark.parametrize("case", MLX_FAULTS)
def test_what_of_mlx_is_no_lora_here_is_named(base, tmp_path, case):
    tensors, settings, said = MLX_FAULTS[case]
    write_mlx(tmp_path / "mlx", mlx_tensors() | tensors, **settings)
    with pytest.raises(AdapterError, match=said):
        imported(base, tmp_path / "mlx", tmp_path / "mine")
    assert not (tmp_path / "mine").exists()


# -- PEFT ---------------------------------------------------------------------------------------------------------

LAYOUTS = {
    "suffixes": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
    "regex": {"target_modules": r".*\.(q|v)_proj", "exclude_modules": ["layers.0.self_attn.v_proj"]},
    "patterns": {
        "target_modules": "all-linear", "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6},
        "alpha_pattern": {r"layers\.\d+\.self_attn\.v_proj": 20}, "use_rslora": True,
    },
    "dora": {"target_modules": ["q_proj", "o_proj"], "use_dora": True},
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_peft_saved_computes_the_same_here_and_in_peft(base, tiny, transformers_model, tmp_path, layout):
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, **LAYOUTS[layout])
    theirs = get_peft_model(transformers_model(tiny), config).eval()
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            parameter.data *= 1.1 if "magnitude" in name else 0.3
    theirs.save_pretrained(tmp_path / "theirs")
    adapter = imported(base, tmp_path / "theirs", tmp_path / "mine")
    decoder = build_decoder(base)
    attach(decoder, adapter)
    wanted = theirs(IDS[None]).logits[0].detach()
    torch.testing.assert_close(decoder.logits(IDS), wanted, atol=1e-4, rtol=1e-4)
    again = PeftModel.from_pretrained(transformers_model(tiny), tmp_path / "mine").eval()
    torch.testing.assert_close(again(IDS[None]).logits[0].detach(), wanted, atol=1e-5, rtol=1e-5)


OLD_NAMES = {
    "the adapter's own name": lambda name: name.replace(".weight", ".default.weight"),
    "no prefix": lambda name: name.removeprefix("base_model.model."),
    "torch.compile": lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."),
    "FSDP": lambda name: name.replace("model.layers", "model._fsdp_wrapped_module.layers"),
    "a model that sees": lambda name: name.replace("model.model.layers", "model.model.language_model.layers"),
    "an older one that sees": lambda name: name.replace("model.model.layers", "model.language_model.model.layers"),
    "lengths with .weight": lambda name: name.replace(MAGNITUDE, f"{MAGNITUDE}.weight"),
}  # fmt: skip


@pytest.fixture(scope="module")
def plain(base, tmp_path_factory):
    """A DoRA in the layout of today."""
    adapter = make_adapter(base, use_dora=True)
    tensors = {module: {**parts, MAGNITUDE: np.full(base.linears[module][0], 1.5, np.float32)}
               for module, parts in adapter.tensors.items()}  # fmt: skip
    folder = tmp_path_factory.mktemp("plain") / "dora"
    write_adapter(folder, replace(adapter, tensors=tensors, contract=None))
    return folder


@pytest.mark.parametrize("layout", OLD_NAMES)
def test_every_layout_is_the_same_adapter(base, plain, tmp_path, layout):
    folder, rename = tmp_path / "old", OLD_NAMES[layout]
    folder.mkdir()
    (folder / CONFIG).write_bytes((plain / CONFIG).read_bytes())
    tensors = {rename(name): value for name, value in load_file(plain / TENSORS).items()}
    assert set(tensors) != set(load_file(plain / TENSORS))
    save_file(tensors, folder / TENSORS)
    imported(base, folder, tmp_path / "mine")
    for name, value in load_file(plain / TENSORS).items():
        np.testing.assert_array_equal(load_file(tmp_path / "mine" / TENSORS)[name], value)


SEEN = "base_model.model.model.vision_tower.layers.0.q_proj.lora_A.weight"
PEFT_FAULTS = {
    "experts": ({}, {"target_parameters": ["mlp.experts.gate_up_proj"]}, "target_parameters is set"),
    "expert": ("model.layers.0.block_sparse_moe.experts.3.w1.lora_A.weight", {}, r"experts\.3\.w1.* the experts of a"),
    "modules_to_save": ("base_model.model.lm_head.weight", {"modules_to_save": ["lm_head"]},
                        r"lm_head: weight is \(4, 256\), expected \(512, 256\)"),
    "tokens": ("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta",
               {"trainable_token_indices": [3]}, r"trainable_tokens_delta is \(4, 256\), expected \(1, 256\)"),
    "no tokens": ({}, {"trainable_token_indices": [3]}, "embed_tokens: trainable_tokens_delta is missing"),
    "lora_bias": (f"base_model.model.{Q}.lora_B.bias", {"lora_bias": True},
                  r"lora_B.bias is \(4, 256\), expected \(256,"),
    "bias": (f"base_model.model.{Q}.bias", {"bias": "all"}, "it has a bias, and none is trained here"),
    "embedding": ("base_model.model.model.embed_tokens.lora_embedding_A", {}, "lora_embedding_A is of the token emb"),
    "norm": ("base_model.model.model.layers.0.input_layernorm.weight", {}, "is of a norm"),
    "vision": (SEEN, {}, "of the part of the model that sees"),
    "pissa": ({}, {"init_lora_weights": "pissa"}, "changing the base's own weights"),
    "rank": ({}, {"r": 8}, rf"{Q}: its rank is 4, and its settings say 8"),
    "repeated": ({}, {"layer_replication": [[0, 2], [0, 2]]}, "layer_replication is set"),
    "another model": ("base_model.model.model.layers.9.mlp.up_proj.lora_A.weight", {}, "9.*is no linear layer"),
    "no DoRA": (f"base_model.model.{Q}.{MAGNITUDE}", {}, f"{MAGNITUDE} is not said of it"),
}  # fmt: skip


@pytest.mark.parametrize("case", PEFT_FAULTS)
def test_what_of_peft_is_no_lora_here_is_named(base, tmp_path, case):
    extra, settings, said = PEFT_FAULTS[case]
    write_adapter(tmp_path / "theirs", replace(make_adapter(base, **settings), contract=None))
    added = {extra: np.zeros((4, 256), np.float32)} if extra else {}
    save_file(load_file(tmp_path / "theirs" / TENSORS) | added, tmp_path / "theirs" / TENSORS)
    with pytest.raises(AdapterError, match=said):
        imported(base, tmp_path / "theirs", tmp_path / "mine")


INVOKED = [5, 9]


@pytest.mark.parametrize("source", ["PEFT", "GGUF"])
def test_an_alora_still_waits(base, tmp_path, source):
    before = make_adapter(base, alora_invocation_tokens=INVOKED)
    write_adapter(tmp_path / "PEFT", before)
    write_adapter_gguf(tmp_path / "GGUF", before, base, "a", "F32")
    made = import_adapter(base.path, tmp_path / source, tmp_path / "mine")
    assert (made.title, made.method) == ("aLoRA", "alora")
    after = read_adapter(tmp_path / "mine", base.layers, may_wait=True)
    assert after.invocation == tuple(INVOKED)
    np.testing.assert_array_equal(after.pair(Q).b, before.pair(Q).b)


def test_a_strange_invocation_is_refused(base, tmp_path):
    write_adapter(tmp_path / "theirs", replace(make_adapter(base, alora_invocation_tokens="hello"), contract=None))
    with pytest.raises(AdapterError, match="alora_invocation_tokens is hello, expected token ids"):
        imported(base, tmp_path / "theirs", tmp_path / "mine")
    write_adapter(tmp_path / "beyond", replace(make_adapter(base, alora_invocation_tokens=[5, 512]), contract=None))
    with pytest.raises(AdapterError, match="alora_invocation_tokens holds 512, and the base has 512 tokens"):
        imported(base, tmp_path / "beyond", tmp_path / "mine")
    write_adapter_gguf(tmp_path / "a.gguf", make_adapter(base, alora_invocation_tokens=[512]), base, "a", "F32")
    with pytest.raises(AdapterError, match="invocation_tokens holds 512, and the base has 512 tokens"):
        imported(base, tmp_path / "a.gguf", tmp_path / "mine")


@pytest.mark.parametrize("source", ["PEFT", "MLX"])
def test_all_faults_of_a_folder_are_told_at_once(base, tmp_path, source):
    """A half missing, a matrix turned, a NaN and a module that is foreign; settings too."""
    up, down, gate = (f"model.layers.0.mlp.{name}_proj" for name in ("up", "down", "gate"))
    a, b = ("lora_A.weight", "lora_B.weight") if source == "PEFT" else ("lora_a", "lora_b")
    tensors = {}
    for module in (Q, up, down, gate, "model.embed_tokens"):
        d_out, d_in = base.linears.get(module, (512, 256))
        shapes = ((4, d_in), (d_out, 4)) if source == "PEFT" else ((d_in, 4), (4, d_out))
        tensors |= {f"{module}.{half}": np.ones(shape, np.float32) for half, shape in zip((a, b), shapes, strict=True)}
    del tensors[f"{Q}.{b}"]
    tensors[f"{up}.{b}"] = tensors[f"{up}.{b}"].T
    tensors[f"{down}.{a}"][0, 0] = np.nan
    if source == "MLX":
        write_mlx(tmp_path / "theirs", tensors, lora_parameters={})
    else:
        write_adapter(tmp_path / "theirs", replace(make_adapter(base, lora_alpha="much"), contract=None))
        named = {f"base_model.model.{name}": np.ascontiguousarray(value) for name, value in tensors.items()}
        save_file(named, tmp_path / "theirs" / TENSORS)
    with pytest.raises(AdapterError) as error:
        imported(base, tmp_path / "theirs", tmp_path / "mine")
    found = error.value.what.split("; ")
    assert len(found) == 5, found
    for said in (
        "lora_alpha is much" if source == "PEFT" else "scale is None", f"{Q}: {b.removesuffix('.weight')} is missing",
        "model.embed_tokens is of the token embeddings", f"{up}: A is", f"{down}: it holds NaN",
    ):  # fmt: skip
        assert any(said in fault for fault in found), said


def saved(base, folder, method, where):
    """An adapter of this method as it starts."""
    decoder = build_decoder(base)
    inject(decoder, method, 4, 6.0, seed=0, targets=where)
    adapter = Adapter(adapter_config(decoder, method, 4, 6.0, "b", where), collect(decoder))
    write_adapter(folder, adapter)
    return adapter


@pytest.mark.parametrize(
    ("method", "title", "next_"),
    [
        ("token_rows", "trained token rows", "export"), ("longlora", "LoRA with whole tensors", "export"),
        ("ia3", "IA3", "export"), ("layernorm", "LayerNorm tuning", "export"), ("houlsby", "Houlsby adapter", "eval"),
    ],
)  # fmt: skip
def test_what_is_no_lora_is_imported_as_what_it_is(base, tmp_path, capsys, method, title, next_):
    where = Where(token_indices=(3, 77)) if method == "token_rows" else Where()
    before = saved(base, tmp_path / "theirs", method, where)
    words = ["import", str(base.path), str(tmp_path / "theirs"), "--out", str(tmp_path / "mine")]
    assert run([*words, "--allow-unverified-base", "--json"]) == 0
    told = capsys.readouterr()
    made = json.loads(told.out)
    named = {"longlora": "lora"}.get(method, method)  # the groups it learned in are in no file
    assert (made["title"], made["method"]) == (title, named)
    assert f": {title} from PEFT on {len(before.tensors)} layers" in told.err
    assert f" {next_} " in told.err.partition("next: ")[2]
    after = read_adapter(tmp_path / "mine", base.layers)
    assert after.contract.method == named
    assert dict(after.config) == json.loads(json.dumps(before.config))
    ours, theirs = (load_file(tmp_path / folder / TENSORS) for folder in ("mine", "theirs"))
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value)


@pytest.mark.parametrize("kind", VIRTUAL)
def test_what_stands_before_prompts_is_not_imported(base, tmp_path, kind):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / CONFIG).write_text(json.dumps({"peft_type": kind}))
    save_file({"prompt_embeddings": np.ones((4, 256), np.float32)}, tmp_path / "theirs" / TENSORS)
    with pytest.raises(AdapterError, match="nothing to import") as error:
        imported(base, tmp_path / "theirs", tmp_path / "mine")
    assert "takes this folder as it is" in error.value.fix


def test_a_name_is_taken_apart_or_left():
    assert plain_name(f"base_model.model.{Q}.lora_A.weight") == (Q, "lora_A")
    assert plain_name(f"base_model.model.{Q}.lora_B.default.weight") == (Q, "lora_B")
    assert plain_name(f"base_model.model.{Q}.{MAGNITUDE}") == (Q, MAGNITUDE)
    assert plain_name(f"base_model.model.{Q}.lora_B.default.bias")[1] == ""


# -- out to PEFT --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "rslora", "pissa", "multilora", "vera", "adalora"])
def test_what_is_a_lora_leaves_as_one_bit_for_bit(base, tmp_path, method):
    """And is imported as what it is."""
    decoder = build_decoder(base)
    inject(decoder, method, 4, 6.0, seed=0)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(torch.rand(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    before = Adapter(adapter_config(decoder, method, 4, 6.0, "b"), collect(decoder))
    write_adapter(tmp_path / "mine", before)
    words = ["export", str(base.path), str(tmp_path / "mine"), "--as-lora", "--out", str(tmp_path / "plain")]
    assert run([*words, "--allow-unverified-base"]) == 0
    after = read_adapter(tmp_path / "plain", base.layers)
    assert after.config["peft_type"] == "LORA"
    assert not after.config["use_rslora"]
    again = imported(base, tmp_path / "mine", tmp_path / "again")
    assert again.config["peft_type"] == before.config["peft_type"]
    for found in (after, again):
        assert set(found.tensors) == set(before.tensors)
        for module in found.tensors:
            np.testing.assert_array_equal(found.pair(module).a, before.pair(module).a)
            np.testing.assert_array_equal(found.pair(module).b, before.pair(module).b)


def test_nothing_is_written_over_what_it_is_made_from(base, plain):
    """`plain` is a DoRA: its folder as a LoRA, or as another's, would be all that is left."""
    for write in (export_as_lora, import_adapter):
        with pytest.raises(OutputError, match="it would be written over"):
            write(base.path, plain, plain, allow_unverified=True, overwrite=True)


def test_a_dora_is_no_lora(base, plain, tmp_path):
    with pytest.raises(AdapterError, match=r"DoRA is no plain LoRA: .*_proj multiplies rows; .* and 11 more"):
        export_as_lora(base.path, plain, tmp_path / "plain", allow_unverified=True)
    assert not (tmp_path / "plain").exists()


# -- bad input, and the command -----------------------------------------------------------------------------------


def test_what_is_no_adapter_is_refused(base, plain, tmp_path):
    for source, said in (
        (tmp_path / "none", "no such file"),
        (tmp_path, "no adapter here"),
        (plain.parent, f"pass {plain}"),
        (base.path, "general.type is 'model'"),
    ):
        with pytest.raises(EdgeloraError) as error:
            imported(base, source, tmp_path / "mine")
        assert said in str(error.value)


def test_all_faults_of_a_gguf_are_told_at_once(base, tmp_path):
    pairs = drawn_pairs(base, (4,))
    name = "model.layers.1.mlp.up_proj"
    pairs[Q] = (pairs[Q][0][:, :128], pairs[Q][1])
    pairs[name] = (pairs[name][0] * np.nan, pairs[name][1])
    write_as_llama_cpp(tmp_path / "a.gguf", base, pairs, 8.0)
    with pytest.raises(AdapterError, match=r"attn_q\.weight\.lora_a is \(4, 128\).*; blk\.1\.ffn_up.* holds NaN"):
        imported(base, tmp_path / "a.gguf", tmp_path / "mine")


def test_a_foreign_tensor_of_a_gguf_hides_nothing(base, tmp_path):
    pairs = drawn_pairs(base, (4,))
    pairs[Q] = (pairs[Q][0] * np.nan, pairs[Q][1])
    write_as_llama_cpp(tmp_path / "a.gguf", base, pairs, 8.0)
    content = (tmp_path / "a.gguf").read_bytes()
    (tmp_path / "a.gguf").write_bytes(content.replace(b"blk.1.ffn_up", b"blk.9.ffn_up"))
    with pytest.raises(AdapterError, match=r"gguf: blk\.0\.attn_q.* holds NaN.*; blk\.9\.ffn_up.* is no linear layer"):
        imported(base, tmp_path / "a.gguf", tmp_path / "mine")


def test_a_gguf_with_adapted_experts_says_so(base, tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 8.0)
    for half, shape in (("lora_a", (2, 4, 256)), ("lora_b", (2, 512, 4))):
        writer.add_tensor(f"blk.0.ffn_up_exps.weight.{half}", np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(AdapterError, match=r"ffn_up_exps\.weight is of the experts of a mixture"):
        imported(base, tmp_path / "a.gguf", tmp_path / "mine")


def test_the_command_tells_what_it_made(base, tmp_path, capsys):
    write_mlx(tmp_path / "mlx", mlx_tensors())
    words = ["import", str(base.path), str(tmp_path / "mlx"), "--out", str(tmp_path / "mine"), "--json"]
    assert run(words) == 1
    assert "pass --allow-unverified-base" in capsys.readouterr().err
    assert run([*words, "--allow-unverified-base"]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out) == {
        "path": str(tmp_path / "mine"), "kind": "MLX", "title": "plain LoRA", "method": "lora", "layers": 1,
        "ranks": [4], "notes": [],
    }  # fmt: skip
    assert ": plain LoRA from MLX on 1 layers, rank 4" in told.err
    assert "next: " in told.err
