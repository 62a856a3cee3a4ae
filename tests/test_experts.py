"""Adapters of a mixture's experts: llama.cpp computes them, and what it does not compare is compared before it."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from merging import as_a_lora
from peft import LoraConfig, get_peft_model
from stirred import Stir
from test_architectures import CASES, seeded
from test_export import IDS

from converters.base_to_gguf import write_base_gguf
from edgelora.base.decoder import build_decoder
from edgelora.base.model import open_base
from edgelora.errors import AdapterError
from edgelora.evaluate.fidelity import fidelity
from edgelora.files.adapter_check import check_adapter, own_shapes
from edgelora.files.gguf import GGUFFile
from edgelora.peft.adapter import Adapter, read_adapter
from edgelora.peft.adapter import write_adapter as write_folder
from edgelora.pipeline.inspect_adapter import gguf_adapter
from runtime.scorer import ScoringEngine

# PEFT 0.21 asks transformers 5.23 for an attribute it has renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
UP, DOWN, Q, RANK, ALPHA = "blk.0.ffn_up_exps.weight", "blk.1.ffn_down_exps.weight", "blk.0.attn_q.weight", 3, 6.0


@pytest.fixture(scope="module")
def mixture(tmp_path_factory, vocabulary, write_tokenizer):
    """Mixtral with four experts, as a GGUF in F32."""
    folder = tmp_path_factory.mktemp("mixture")
    seeded(CASES["mixtral"]).save_pretrained(folder / "hf")
    write_tokenizer(folder / "hf", vocabulary, None)
    write_base_gguf(folder / "mixtral.gguf", open_base(folder / "hf"), "F32")
    return open_base(folder / "mixtral.gguf")


def write_adapter(path, shapes, kind=np.float32, targets=(UP, DOWN)):
    """(E, r, d_in) and (E, d_out, r) for each target, and returns them; shapes: of the base."""
    draw, pairs = np.random.default_rng(0), {}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", ALPHA)
    for target in targets:
        n, d_out, d_in = shapes[target]
        pairs[target] = (draw.normal(0, d_in**-0.5, (n, RANK, d_in)).astype(kind),
                         draw.normal(0, 0.1, (n, d_out, RANK)).astype(kind))  # fmt: skip
        for half, values in zip(("lora_a", "lora_b"), pairs[target], strict=True):
            writer.add_tensor(f"{target}.{half}", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return pairs


def shapes_of(base):
    return {name: info.shape for name, info in base.file.tensors.items()}


def logits(base, adapter=None):
    with ScoringEngine(base, n_ctx=128, n_sequences=2, threads=2) as engine:
        if adapter is not None:
            engine.load("a", adapter, allow_unverified=True)
            engine.use({"a": 1.0})
        return np.concatenate([engine.logits([row], [list(range(len(row)))]) for row in IDS])


@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_llama_cpp_adds_each_experts_own(mixture, tmp_path, kind):
    """Against a base whose experts hold W + α/r B A."""
    pairs = write_adapter(tmp_path / "a.gguf", shapes_of(mixture), kind)
    merged = tmp_path / "merged.gguf"
    merged.write_bytes(mixture.path.read_bytes())
    for target, (a, b) in pairs.items():
        info = mixture.file.tensors[target]
        with merged.open("r+b") as f:
            f.seek(info.offset)
            weights = mixture.file.rows(target).view(np.float32).reshape(info.shape)
            f.write((weights + ALPHA / RANK * (b.astype(np.float32) @ a.astype(np.float32))).astype(np.float32))
    theirs = logits(open_base(merged))
    assert fidelity([(logits(mixture, tmp_path / "a.gguf"), theirs)]).kl_mean <= 1e-5
    assert fidelity([(logits(mixture), theirs)]).kl_mean > 1e-3


def test_the_number_of_experts_is_compared(mixture, tmp_path):
    """llama.cpp would read and write beyond the end (ggml-org/llama.cpp#29128)."""
    shapes = shapes_of(mixture)
    for n in (2, 8):
        write_adapter(tmp_path / "a.gguf", {UP: (n, *shapes[UP][1:])}, targets=(UP,))
        with pytest.raises(AdapterError, match=rf"ffn_up_exps\.weight\.lora_a is for {n} experts, and the base has 4"):
            check_adapter(tmp_path / "a.gguf", "llama", shapes)
    write_adapter(tmp_path / "a.gguf", {Q: (4, 64, 64)}, targets=(Q,))
    with pytest.raises(AdapterError, match="has 3 dimensions, expected 2"):
        check_adapter(tmp_path / "a.gguf", "llama", shapes)


def test_what_is_known_of_it_without_a_base(mixture, tmp_path):
    write_adapter(tmp_path / "a.gguf", shapes_of(mixture))
    file = GGUFFile(tmp_path / "a.gguf")
    assert own_shapes(file) == {target: shapes_of(mixture)[target] for target in (UP, DOWN)}
    facts = gguf_adapter(file)
    assert facts.faults == []
    assert facts.ranks == {RANK: 2}


REFUSED = [
    "  why: of a mixture edgelora adapts the layers around its experts, and without the rest this adapter would "
    "compute something else",
    "  fix: merge it where it was trained (PEFT's merge_and_unload), save that and `edgelora convert` it; or train "
    "the layers of attention alone (--target-modules q_proj --target-modules v_proj)",
]


@pytest.mark.parametrize(
    "names",
    [("block_sparse_moe.experts.3.w1", "block_sparse_moe.gate"), ("mlp.experts.3.up_proj", "mlp.gate")],
    ids=["mixtral", "qwen3_moe"],
)
def test_an_adapter_of_single_experts_is_refused_with_the_way_out(mixture, tmp_path, names):
    """Under the names that PEFT gave them while transformers had a module for each."""
    pair = {"lora_A": np.ones((2, 256), np.float32), "lora_B": np.ones((384, 2), np.float32)}
    tensors = {f"model.layers.0.{name}": pair for name in names}
    write_folder(tmp_path / "mine", Adapter({"peft_type": "LORA", "r": 2, "lora_alpha": 2}, tensors))
    with pytest.raises(AdapterError) as refused:
        read_adapter(tmp_path / "mine", mixture.layers)
    expert, router = tensors
    what, *rest = str(refused.value).splitlines()
    assert f"{expert} is of the experts of a mixture" in what
    assert f"{router} is of a mixture's router" in what
    assert rest == REFUSED


@pytest.fixture(scope="module", params=["mixtral", "qwen3_moe"])
def pefts(request, tmp_path_factory, vocabulary, write_tokenizer):
    """(the folder of a mixture, PEFT's model with an adapter of its experts' parameters, the folder of that)."""
    folder, name = tmp_path_factory.mktemp(request.param), request.param
    model = seeded(CASES[name])
    model.save_pretrained(folder / "hf")
    write_tokenizer(folder / "hf", vocabulary, None)
    torch.manual_seed(0)
    config = LoraConfig(
        r=2, lora_alpha=4, init_lora_weights=False, target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )  # fmt: skip
    theirs = get_peft_model(model, config).eval()
    theirs.save_pretrained(folder / "adapter")
    return folder / "hf", theirs, folder / "adapter"


def test_an_adapter_of_pefts_target_parameters_leaves_by_the_way_that_its_refusal_names(
    pefts, vocabulary, write_tokenizer, tmp_path
):
    hf, theirs, adapter = pefts
    with pytest.raises(AdapterError) as refused:
        read_adapter(adapter, open_base(hf).layers)
    what, *rest = str(refused.value).splitlines()
    assert "target_parameters is set: A and B are of the stacked experts of a mixture; model.layers.0.mlp.exp" in what
    assert "q_proj" not in what
    assert rest == REFUSED
    ids = torch.tensor(IDS[0])
    with torch.no_grad():
        wanted, plain = theirs(ids[None]).logits[0], build_decoder(open_base(hf)).logits(ids)
    theirs.merge_and_unload().save_pretrained(tmp_path / "merged")
    write_tokenizer(tmp_path / "merged", vocabulary, None)
    write_base_gguf(tmp_path / "merged.gguf", open_base(tmp_path / "merged"), "F32")
    found = build_decoder(open_base(tmp_path / "merged.gguf")).logits(ids)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert float((plain - wanted).abs().max()) > 0.1


def test_a_lora_of_the_layers_around_the_experts_leaves_as_one(mixture, tmp_path):
    ids = torch.tensor(IDS[0])
    decoder, adapter = Stir(rank=2, alpha=4.0, by=0.4).on(mixture, "lora")
    live = decoder.logits(ids)
    found = as_a_lora(mixture, adapter, tmp_path / "a.gguf", ids, live)
    assert found.kl_mean <= 1e-4
    assert found.same_top == 1.0
    assert float((build_decoder(mixture).logits(ids) - live).abs().max()) > 0.1
