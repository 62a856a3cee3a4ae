"""Every row of THE TABLE against transformers and against llama.cpp, and through a GGUF file and back.

Models are seeded, 256 wide, with one whole pattern of layers and one more, and prompts longer than the window.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from gguf.constants import GGMLQuantizationType
from safetensors.numpy import save_file

from converters.base_to_gguf import plan, shortened_context, write_base_gguf
from edgelora.architectures import ARCHITECTURES, Rope
from edgelora.architectures.metadata import context_in_llama_cpp, gguf_metadata
from edgelora.architectures.names import gguf_place, is_norm, tensor_shapes
from edgelora.base.decoder import build_decoder
from edgelora.base.model import open_base
from edgelora.errors import BaseModelError, ExportError
from edgelora.peft.inject import inject
from runtime.binding import Context, Entry, Model

SIZES = {
    "vocab_size": 512, "hidden_size": 256, "intermediate_size": 384, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 1 / 16, "num_hidden_layers": 2,
    "tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
WINDOW, LENGTH = 16, 61
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
GEMMA = {"head_dim": 32, "sliding_window": WINDOW, "query_pre_attn_scalar": 32, "tie_word_embeddings": True}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 5e5,
          "original_max_position_embeddings": 32}  # fmt: skip
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.75,
        "short_factor": [1 + i / 50 for i in range(24)], "long_factor": [1 + i / 5 for i in range(24)]}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 32}


@dataclass(frozen=True)
class Case:
    """A model of transformers: its class of config, what it sets besides SIZES, and whether llama.cpp can run it."""

    config: type
    settings: dict[str, Any]
    in_llama_cpp: bool = True


def case(kind: str, in_llama_cpp: bool = True, **settings: Any) -> Case:
    return Case(getattr(transformers, f"{kind}Config"), settings, in_llama_cpp)


llama = partial(case, "Llama")

CASES: dict[str, Case] = {
    "llama": llama(tie_word_embeddings=True),
    "llama-biased": llama(attention_bias=True, mlp_bias=True, head_dim=32),
    "llama-linear": llama(rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}),
    "llama-dynamic": llama(
        rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}, max_position_embeddings=32
    ),
    "llama-yarn": llama(rope_parameters=YARN),
    "llama-yarn-factor": llama(rope_parameters={**YARN, "attention_factor": 1.25}),
    "llama-yarn-betas": llama(rope_parameters={**YARN, "beta_fast": 16, "beta_slow": 2}, in_llama_cpp=False),
    "llama-yarn-mscale": llama(rope_parameters={**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}),
    "llama-yarn-smooth": llama(rope_parameters={**YARN, "truncate": False}, in_llama_cpp=False),
    "llama-llama3": llama(rope_parameters=LLAMA3),
    "mistral": case("Mistral", sliding_window=WINDOW, head_dim=32),
    "mistral-open": case("Mistral", sliding_window=None),
    "mixtral": case("Mixtral", num_local_experts=4, num_experts_per_tok=2),
    "qwen2": case("Qwen2", use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
    "qwen3": case("Qwen3", head_dim=32),
    "qwen3_moe": case(
        "Qwen3Moe", head_dim=32, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=96, norm_topk_prob=True
    ),
    "qwen3_moe-raw": case(
        "Qwen3Moe", head_dim=32, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=96, norm_topk_prob=False,
        in_llama_cpp=False,
    ),
    "gemma2": case("Gemma2", **GEMMA, num_hidden_layers=3),
    "gemma2-uncapped": case("Gemma2", **GEMMA, attn_logit_softcapping=None, in_llama_cpp=False),
    "gemma3_text": case("Gemma3Text", **GEMMA, num_hidden_layers=7),
    "gemma3_text-scaled": case(
        "Gemma3Text", **GEMMA, num_hidden_layers=7,
        rope_parameters={"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                         "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}},
    ),
    "gemma3_text-scalar": case("Gemma3Text", **{**GEMMA, "query_pre_attn_scalar": 48}, in_llama_cpp=False),
    "phi3": case("Phi3", sliding_window=WINDOW),
    "phi3-long": case(
        "Phi3", original_max_position_embeddings=256, max_position_embeddings=1024, rope_parameters=LONG,
        partial_rotary_factor=0.75,
    ),
    "smollm3": case("SmolLM3", num_hidden_layers=5),
    "smollm3-every-third": case("SmolLM3", num_hidden_layers=5, no_rope_layer_interval=3, in_llama_cpp=False),
    "olmo2": case("Olmo2"),
    "granite": case(
        "Granite", embedding_multiplier=3.0, logits_scaling=2.0, residual_multiplier=0.5, attention_multiplier=0.1
    ),
}  # fmt: skip
RUNNABLE = [name for name, c in CASES.items() if c.in_llama_cpp]


@dataclass(frozen=True)
class Family:
    """One case made: transformers' model, and the folder that holds it."""

    theirs: Any
    folder: Path


@pytest.fixture(scope="module")
def family(tmp_path_factory, vocabulary, write_tokenizer) -> Callable[[str], Family]:
    """`family(name)`: the seeded model of a case, saved as transformers saves it, with a tokenizer beside it."""
    made: dict[str, Family] = {}
    torch.set_num_threads(1)

    def make(name: str) -> Family:
        if name not in made:
            folder = tmp_path_factory.mktemp("checkpoint")
            model = seeded(CASES[name])
            model.save_pretrained(folder)
            write_tokenizer(folder, vocabulary, TEMPLATE)
            made[name] = Family(model, folder)
        return made[name]

    return make


def seeded(case: Case) -> Any:
    """Random matrices, and vectors that are neither zeros nor ones but multiples of 1/256: w + 1 - 1 is exact."""
    config = case.config(**{**SIZES, **case.settings})
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for values in model.parameters():
            if values.ndim == 1:
                values += torch.randint(-64, 65, values.shape, generator=draw) / 256
    return model


def ids(length: int = LENGTH) -> torch.Tensor:
    return torch.randint(3, 512, (length,), generator=torch.Generator().manual_seed(length))


def test_every_row_of_the_table_has_a_case():
    assert {name.partition("-")[0] for name in CASES} == set(ARCHITECTURES)


# -- (1) transformers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "length"), [*itertools.product(CASES, (1, LENGTH)), ("phi3-long", 301)])
def test_logits_are_those_of_transformers(family, name, length):
    made = family(name)
    with torch.no_grad():
        theirs = made.theirs(ids(length)[None]).logits[0]  # (T, V)
    ours = build_decoder(open_base(made.folder)).logits(ids(length))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_packed_segments_are_computed_as_if_alone(family, name):
    decoder = build_decoder(open_base(family(name).folder))
    lengths = (37, 1, 301, 21) if name == "phi3-long" else (37, 1, 21)  # on both sides of its original context
    starts = np.cumsum([0, *lengths]).tolist()
    row, positions = torch.cat([ids(n) for n in lengths]), torch.cat([torch.arange(n) for n in lengths])
    packed = decoder.logits_of(decoder(row, positions, starts))
    torch.testing.assert_close(packed, torch.cat([decoder.logits(ids(n)) for n in lengths]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text", "mistral", "qwen3_moe"])
def test_a_shared_prefix_longer_than_the_window_changes_nothing(family, name):
    decoder = build_decoder(open_base(family(name).folder))
    prefix, tails = ids(29), (ids(7), ids(20))
    whole = [decoder.logits(torch.cat([prefix, tail])) for tail in tails]
    positions = torch.cat([torch.arange(29), *(29 + torch.arange(len(t)) for t in tails)])
    shared = decoder.logits_of(decoder(torch.cat([prefix, *tails]), positions, [29, 36, 56], 29))
    expected = torch.cat([whole[0][:29], whole[0][29:], whole[1][29:]])
    torch.testing.assert_close(shared, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["gemma2", "phi3", "granite", "qwen3_moe", "olmo2", "llama-biased"])
def test_gradients_at_the_embedding_are_those_of_transformers(family, name):
    made = family(name)
    decoder = build_decoder(open_base(made.folder))
    row = ids(33)
    inputs = made.theirs.get_input_embeddings()(row).detach()
    theirs = inputs.clone().requires_grad_()
    logits = made.theirs(inputs_embeds=theirs[None]).logits[0]
    torch.nn.functional.cross_entropy(logits[:-1], row[1:], reduction="sum").backward()
    # Gemma multiplies inside its embedding, Granite behind it, as the decoder does
    scale = decoder.config.embedding_multiplier if name == "gemma2" else 1.0
    ours = (inputs / scale).requires_grad_()
    decoder.embedding = Given(ours)
    loss = decoder.nll(decoder(row, torch.arange(33), [0, 33])[:-1], row[1:]).sum()
    loss.backward()
    torch.testing.assert_close(ours.grad, theirs.grad * scale, atol=1e-4, rtol=1e-4)


class Given:
    """An embedding that hands out these rows, so that a gradient can reach them."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.values = rows

    def gather(self, _: torch.Tensor) -> torch.Tensor:
        return self.values


# -- (2) llama.cpp ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def converted(family, tmp_path_factory) -> Callable[[str], Path]:
    """`converted(name)`: the case as a GGUF in F32."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name) / "base.gguf"
            write_base_gguf(made[name], open_base(family(name).folder), "F32")
        return made[name]

    return make


def llama_cpp_logits(path: Path, row: torch.Tensor, n_ctx: int) -> np.ndarray:
    """float32 (T, V) with keys and values in float32 and no flash attention."""
    model = Model(path)
    context = Context(model, n_ctx=n_ctx, n_sequences=1, threads=1, exact=True)
    try:
        return context.decode([Entry(token, i, 0, True) for i, token in enumerate(row.tolist())]).copy()
    finally:
        context.close()
        model.close()


@pytest.mark.parametrize("name", RUNNABLE)
def test_llama_cpp_computes_what_the_decoder_computes(family, converted, name):
    base = open_base(family(name).folder)
    longest = context_in_llama_cpp(base.architecture, base.config)
    row = ids(min(LENGTH, longest))
    ours = build_decoder(base).logits(row).numpy()
    theirs = llama_cpp_logits(converted(name), row, n_ctx=longest)
    # llama.cpp looks gelu up in a table of float16, so Gemma is held to the range of its logits, eight times wider
    spread = ours.std() if base.config.hidden_act == "silu" else np.ptp(ours)
    assert np.abs(ours - theirs).max() <= 1e-3 * spread
    assert (ours.argmax(-1) == theirs.argmax(-1)).all()


@pytest.mark.parametrize("name", RUNNABLE)
def test_a_converted_base_says_and_computes_the_same(family, converted, name):
    """Opened again, the GGUF has the fingerprint, the tokenizer and the logits of the checkpoint."""
    ours, again = open_base(family(name).folder), open_base(converted(name))
    assert again.fingerprint == ours.fingerprint
    assert again.tokenizer.sha256 == ours.tokenizer.sha256
    assert again.template_source == ours.template_source
    inside = ids(min(LENGTH, context_in_llama_cpp(ours.architecture, ours.config)))
    torch.testing.assert_close(
        build_decoder(again).logits(inside), build_decoder(ours).logits(inside), atol=2e-6, rtol=0
    )


@pytest.mark.parametrize("name", [n for n in CASES if n not in RUNNABLE])
def test_what_llama_cpp_would_compute_otherwise_is_refused(family, tmp_path, name):
    with pytest.raises(ExportError, match=r"llama\.cpp would compute otherwise"):
        write_base_gguf(tmp_path / "base.gguf", open_base(family(name).folder), "F32")


@pytest.mark.parametrize(
    ("name", "expected"),
    [("mistral", (WINDOW, 128)), ("phi3", (WINDOW, 128)), ("phi3-long", (256, 1024)), ("gemma2", None)],
)
def test_a_context_ends_where_llama_cpp_ignores_the_window(family, converted, name, expected):
    base = open_base(family(name).folder)
    assert shortened_context(base) == expected
    written = open_base(converted(name)).config.max_position_embeddings
    assert written == (expected[0] if expected else 128)


# -- (3) names, rows and norms ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNNABLE)
def test_a_gguf_gives_back_the_very_tensors(family, converted, name):
    """GGUF → HF names: bit for bit what transformers saved."""
    checkpoint, again = open_base(family(name).folder), open_base(converted(name))
    shift = np.float32(checkpoint.architecture.norm_shift)
    shapes = tensor_shapes(checkpoint.architecture, checkpoint.config, checkpoint.biased)
    assert set(shapes) == set(checkpoint.tensors.shapes())
    for tensor, shape in shapes.items():
        stored = checkpoint.source.rows(tensor).view(np.float32).reshape(shape)
        if len(shape) == 1:
            found = again.tensors.vector(tensor) - (shift if is_norm(tensor) else 0)
        else:
            found = again.tensors.matrix(tensor).floats()
        np.testing.assert_array_equal(found.view(np.uint32), stored.view(np.uint32), err_msg=tensor)


@pytest.mark.parametrize("name", RUNNABLE)
def test_every_tensor_of_a_gguf_has_one_hf_name(converted, name):
    base = open_base(converted(name))
    places = [
        gguf_place(base.architecture, base.config, t)
        for t in tensor_shapes(base.architecture, base.config, base.biased)
    ]
    assert len(set(places)) == len(places)
    extra = set(base.file.tensors) - {place.name for place in places}
    assert extra <= {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}


# -- the rows -----------------------------------------------------------------------------------------------------


def old_config(family, name: str, **changes: Any) -> dict[str, Any]:
    config = json.loads((family(name).folder / "config.json").read_text())
    return {k: v for k, v in {**config, **changes}.items() if v is not ...}


@pytest.mark.parametrize(
    ("name", "scaling"),
    [
        ("llama-llama3", {k: v for k, v in LLAMA3.items() if k != "rope_theta"}),
        ("llama-linear", {"type": "linear", "factor": 4.0}),
        ("llama-yarn", {k: v for k, v in YARN.items() if k != "rope_theta"}),
    ],
)
def test_an_old_config_with_rope_scaling_says_the_same(family, name, scaling):
    read = ARCHITECTURES["llama"].read_hf
    new = old_config(family, name)
    theta = new["rope_parameters"]["rope_theta"]
    old = {**new, "rope_parameters": ..., "rope_scaling": scaling, "rope_theta": theta}
    assert read({k: v for k, v in old.items() if v is not ...}) == read(new)


def test_an_old_gemma3_config_says_the_same(family):
    read = ARCHITECTURES["gemma3_text"].read_hf
    old = old_config(family, "gemma3_text", rope_parameters=..., layer_types=..., rope_theta=1e6,
                     rope_local_base_freq=1e4, sliding_window_pattern=6)  # fmt: skip
    assert read(old) == read(old_config(family, "gemma3_text"))


@pytest.mark.parametrize(
    "changes",
    [{"rope_parameters": None}, {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}},
     {"rope_parameters": {"sliding_attention": {"rope_type": "default"}, "full_attention": {"rope_theta": 1e6}}}],
    ids=["null", "without sliding", "without theta"],
)  # fmt: skip
def test_gemma3s_sliding_layers_keep_their_own_rope(family, changes):
    config = ARCHITECTURES["gemma3_text"].read_hf(old_config(family, "gemma3_text", **changes))
    assert (config.rope.theta, config.rope_local.theta) == (1e6, 1e4)


@pytest.mark.parametrize("name", ["rope_theta", "rope_scaling", "original_max_position_embeddings", "head_dim"])
def test_a_null_is_a_missing_key(family, name):
    old = {"rope_parameters": ..., "rope_theta": 1e4}
    read = ARCHITECTURES["llama"].read_hf
    assert read(old_config(family, "llama", **{**old, name: None})) == read(old_config(family, "llama", **old))


def test_phi3_without_a_window_says_zero(family):
    architecture = ARCHITECTURES["phi3"]
    config = architecture.read_hf(old_config(family, "phi3", sliding_window=None))
    assert gguf_metadata(architecture, config)["phi3.attention.sliding_window"] == 0


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 0.0}}, "cannot be used"),
        ("llama", {"rope_parameters": {"rope_theta": float("nan")}}, "cannot be used"),
        ("llama", {"rope_parameters": {"rope_theta": -1}}, "cannot be used"),
        ("phi3", {"partial_rotary_factor": 1.5, "rope_parameters": ...}, "cannot be used"),
        ("qwen2", {"max_window_layers": "all", "layer_types": ...}, "max_window_layers"),
        ("llama", {"hidden_size": "256"}, "hidden_size is '256'"),
        ("llama", {"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ("llama", {"num_attention_heads": ...}, "num_attention_heads is missing"),
        ("llama", {"num_key_value_heads": 3}, "3 key-value heads cannot be"),
        ("llama", {"vocab_size": True}, "vocab_size is True"),
        ("llama", {"rms_norm_eps": "tiny"}, "rms_norm_eps"),
        ("llama", {"hidden_act": "relu"}, "the activation 'relu' is not known"),
        ("llama", {"rope_parameters": {"rope_type": "spiral"}}, "the rope scaling spiral is not known"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": "much"}}, "cannot be used"),
        ("llama", {"rope_parameters": ["linear"]}, "cannot be used"),
        ("llama", {"rope_parameters": {"rope_type": "linear"}}, "cannot be used"),
        ("phi3-long", {"rope_parameters": {**LONG, "long_factor": [1.0]}}, "cannot be used"),
        ("gemma2", {"layer_types": ["full_attention"]}, "layer_types"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers"),
        ("mixtral", {"num_experts_per_tok": 9}, "9 of 4 experts"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "some layers have no experts"),
        ("granite", {"residual_multiplier": 0}, "residual_multiplier is 0"),
    ],
)
def test_a_config_that_cannot_be_is_refused(family, name, changes, said):
    with pytest.raises(BaseModelError, match=said):
        ARCHITECTURES[name.partition("-")[0]].read_hf(old_config(family, name, **changes))


def test_an_unknown_family_is_refused_with_those_there_are(family, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(old_config(family, "llama", model_type="mamba")))
    (tmp_path / "model.safetensors").write_bytes((family("llama").folder / "model.safetensors").read_bytes())
    with pytest.raises(BaseModelError, match="architecture mamba") as fault:
        open_base(tmp_path)
    assert all(row in fault.value.why for row in ARCHITECTURES)


def test_adding_a_family_is_a_file_and_a_row(monkeypatch, tmp_path):
    """The file that CONTRIBUTING.md shows, and its row in THE TABLE: it opens, computes, learns and converts."""
    text = (Path(__file__).resolve().parent.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    example = text.split("```python\n")[1].split("```")[0]
    written: dict[str, Any] = {}
    exec(compile(example, "CONTRIBUTING.md", "exec"), written)
    monkeypatch.setitem(ARCHITECTURES, "brandnew", written["BRANDNEW"])
    config = {**SIZES, "model_type": "brandnew", "head_dim": 32}
    (tmp_path / "config.json").write_text(json.dumps(config))
    draw = np.random.default_rng(0)
    shapes = tensor_shapes(written["BRANDNEW"], written["read_hf"](config))
    weights = {name: draw.normal(0, 0.05, shape).astype(np.float32) for name, shape in shapes.items()}
    save_file(weights, tmp_path / "model.safetensors")
    base = open_base(tmp_path)
    decoder = build_decoder(base)
    parameters = inject(decoder, "lora", 4, 8.0, 0)
    decoder.nll(decoder(ids(), torch.arange(LENGTH), [0, LENGTH])[:-1], ids()[1:]).sum().backward()
    assert len(parameters) == 2 * len(base.linears) == 28
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters)
    assert {target.sources[0] for target in plan(base, GGMLQuantizationType.F16).values()} == set(shapes)


def test_the_table_is_the_only_place_that_names_families():
    """A family that needs a new block adds the block: nothing outside its file asks which family a model is of."""
    root = Path(__file__).resolve().parent.parent
    names = {row for row in ARCHITECTURES if row not in ("llama",)}
    for house in ("edgelora", "converters", "runtime"):
        for path in (root / house).rglob("*.py"):
            if path.parent.name not in ("architectures", "data"):  # tokenizers are known by other names
                text = path.read_text(encoding="utf-8")
                found = [n for n in names if f'"{n}"' in text or f"== '{n}'" in text]
                assert "model_type ==" not in text, path
                assert not found, (path, found)


def test_bases_of_one_family_have_one_rope_for_each_kind_of_layer(family):
    config = open_base(family("gemma3_text").folder).config
    assert [config.rope_of(i) == Rope(1e4, 32) for i in range(7)] == [True] * 5 + [False, True]
    assert [config.window(i) for i in range(7)] == [WINDOW] * 5 + [None, WINDOW]
