"""A patched base: every type's scales against ggml's own floats, and the whole against torch and llama.cpp."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from same_tokens import IDS, NEARLY_TIED
from test_vectors import BIASED, FAMILIES, family, trained

from converters.merge import Part
from converters.patch import LARGEST_ERROR, plan_patch, write_patched, write_rest
from converters.scaled_rows import SCALES, scale_rows
from edgelora.base import ggml
from edgelora.base.decoder import build_decoder
from edgelora.base.model import open_base
from edgelora.errors import AdapterError
from edgelora.evaluate.fidelity import fidelity
from edgelora.evaluate.thresholds import FLOATS
from edgelora.pipeline.export import ExportOptions
from edgelora.pipeline.patch import patch
from runtime.scorer import ScoringEngine

Type = GGMLQuantizationType
DIGEST = "0" * 64
__all__ = ["family"]


def blocks_of(kind: Type, n: int = 6, n_blocks: int = 3) -> np.ndarray:
    """Any bytes, with scales that are ordinary float16 numbers."""
    draw, (_, size) = np.random.default_rng(kind.value), GGML_QUANT_SIZES[kind]
    blocks = draw.integers(0, 256, (n, n_blocks, size), dtype=np.uint8)
    for at in SCALES[kind]:
        scales = draw.uniform(0.001, 0.02, (n, n_blocks, 1)).astype(np.float16)
        blocks[:, :, at : at + 2] = scales.view(np.uint8)
    return blocks.reshape(n, -1)


def floats(rows: np.ndarray, kind: Type) -> np.ndarray:
    per_block, size = GGML_QUANT_SIZES[kind]
    return ggml.dequantize(rows, kind, rows.shape[1] // size * per_block)


# -- blocks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SCALES, ids=lambda kind: kind.name)
def test_a_power_of_two_multiplies_every_weight_exactly(kind):
    rows, factors = blocks_of(kind), np.array([1, 2, 0.5, -1, 4, 0], np.float32)
    np.testing.assert_array_equal(floats(scale_rows(rows, kind, factors), kind), floats(rows, kind) * factors[:, None])


@pytest.mark.parametrize("kind", SCALES, ids=lambda kind: kind.name)
def test_another_factor_costs_one_rounding_of_each_scale(kind):
    rows = blocks_of(kind)
    factors = np.random.default_rng(0).uniform(0.7, 1.4, len(rows)).astype(np.float32)
    wanted, scaled = floats(rows, kind) * factors[:, None], scale_rows(rows, kind, factors)
    found = floats(scaled, kind)
    per_block, size = GGML_QUANT_SIZES[kind]
    # |x| ≤ d q + m, each of which is wrong by 2⁻¹¹ at most
    largest = np.abs(wanted).reshape(-1, per_block).max(1, keepdims=True)
    bound = 2.0**-11 * (3 if len(SCALES[kind]) > 1 else 1) * largest
    assert (np.abs(found - wanted).reshape(-1, per_block) <= bound * 1.001).all()
    changed = (scaled != rows).reshape(len(rows), -1, size).any((0, 1))
    assert set(np.flatnonzero(changed)) <= {at + i for at in SCALES[kind] for i in (0, 1)}


# -- the whole ----------------------------------------------------------------------------------------------------


def patched(tmp_path, base, adapter) -> tuple[Any, Any]:
    """The patched base and what was planned; the rest of the adapter beside it, if there is one."""
    plan = plan_patch(base, adapter)
    write_patched(tmp_path / "patched.gguf", base, plan, Part(adapter, 1.0, DIGEST, "mine"))
    if plan.rest:
        write_rest(tmp_path / "rest.gguf", base, plan, "mine", None, "F32")
    return open_base(tmp_path / "patched.gguf"), plan


def in_llama_cpp(base, tmp_path) -> np.ndarray:
    with ScoringEngine(base, n_ctx=64, threads=1) as engine:
        if (tmp_path / "rest.gguf").exists():
            engine.load("rest", tmp_path / "rest.gguf", allow_unverified=True)
            engine.use({"rest": 1.0})
        return engine.logits([IDS.tolist()], [list(range(len(IDS)))])


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("method", ["dora", "longlora", "ia3", "bitfit", "layernorm"])
def test_llama_cpp_computes_the_same_over_a_patched_base(family, tmp_path, name, method):
    base = open_base(family(name).gguf)
    decoder, adapter = trained(base, method, BIASED[name] if method == "bitfit" else ())
    live = decoder.logits(IDS).detach()
    written, plan = patched(tmp_path, base, adapter)
    assert bool(plan.rest) == (method in ("dora", "longlora"))
    assert {p.how for p in plan.patches.values()} <= {"replaced" if method == "longlora" else "scaled"}
    assert plan.error <= 1e-7
    found = fidelity([(live.numpy(), in_llama_cpp(written, tmp_path))])
    assert found.kl_mean <= 1e-4
    assert found.same_top == 1.0 or found.worst_flip_nats <= FLOATS.flip_nats
    assert written.lineage == (f"{DIGEST}:1:patched",)


@pytest.mark.parametrize(
    "kind", [Type.Q4_0, Type.Q5_1, Type.Q8_0, Type.Q4_K, Type.Q6_K, Type.IQ4_XS], ids=lambda k: k.name
)
def test_over_blocks_nothing_but_scales_is_rounded(make_tiny, tmp_path, kind):
    base = open_base(make_tiny(kind).path)
    decoder, adapter = trained(base, "ia3")
    live = decoder.logits(IDS).detach()
    written, plan = patched(tmp_path, base, adapter)
    # down's factors stand in up, whose rows they multiply through SwiGLU
    names = {base.tensor_of(f"model.layers.{i}.{m}") for i in (0, 1)
             for m in ("self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj")}  # fmt: skip
    assert set(plan.patches) == names
    for name, info in base.file.tensors.items():
        same = np.array_equal(base.file.rows(name), written.file.rows(name))
        assert same == (name not in names), name
        if name in names and plan.patches[name].how == "scaled":
            assert written.file.tensors[name].type == info.type
            assert 0 < plan.patches[name].error <= LARGEST_ERROR
    ours = build_decoder(written).logits(IDS).detach()
    found = fidelity([(live.numpy(), ours.numpy())])
    assert found.kl_mean <= 1e-5  # 3e-6 to 4e-6 where a minimum is rounded beside the scale, else below 1e-6
    assert found.same_top == 1.0 or found.worst_flip_nats <= NEARLY_TIED


def test_scales_too_small_for_a_float16_become_f16(make_tiny):
    """Q6_K's scales are a 4000th of its weights: below 6e-5 a float16 has fewer bits."""
    base = open_base(make_tiny(Type.Q6_K).path)
    _, adapter = trained(base, "ia3")
    plan = plan_patch(base, adapter)
    for name, one in plan.patches.items():
        scales = base.file.rows(name).reshape(-1, 210)[:, 208:].copy().view(np.float16)
        assert np.median(np.abs(scales)) < 6e-5
        assert one.how == ("widened" if one.kind == Type.F16 else "scaled"), name
        assert one.error <= LARGEST_ERROR


def test_a_dora_over_blocks_goes_on_as_a_lora_over_the_patched_file(make_tiny, tmp_path):
    """End to end: certified, the rest's contract names the patched file, and the original is refused under it."""
    base = open_base(make_tiny(Type.Q8_0).path)
    trained(base, "dora", folder=tmp_path / "mine")
    made = patch(base.path, tmp_path / "mine", tmp_path / "patched.gguf", ExportOptions(allow_unverified=True))
    assert made.rest == tmp_path / "patched.lora.gguf"
    assert made.certificate.passed
    written = open_base(tmp_path / "patched.gguf")
    assert json.loads((tmp_path / "patched.certificate.json").read_text())["passed"]
    with ScoringEngine(written, n_ctx=64, threads=1) as engine:
        engine.load("rest", made.rest)
        engine.use({"rest": 1.0})
        theirs = engine.logits([IDS.tolist()], [list(range(len(IDS)))])
    decoder, _ = trained(base, "dora")
    assert fidelity([(decoder.logits(IDS).detach().numpy(), theirs)]).kl_mean <= 1e-2
    with ScoringEngine(base, n_ctx=64, threads=1) as engine, pytest.raises(AdapterError, match="is the original"):
        engine.load("rest", made.rest)
