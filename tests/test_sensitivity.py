"""What a tensor's bits are worth: the KL of exchanged weights, what is measured and what is scaled, and its cache."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType as Type

from converters.candidates import CANDIDATES, candidates, probe
from edgelora.base import ggml
from edgelora.base.decoder import build_decoder
from edgelora.base.model import open_base
from edgelora.base.output_kl import OutputKL, exchanged, slots
from edgelora.base.weights import from_rows
from edgelora.errors import FileFormatError
from edgelora.evaluate.fidelity import fidelity
from edgelora.evaluate.sensitivity import Sensitivity, as_json, cache_key, from_json, predicted
from edgelora.pipeline.calibration import Windows
from edgelora.pipeline.sensitivity import Job, Trial, errors, measure, sensitivities

WINDOWS = np.random.default_rng(0).integers(0, 512, (2, 24))
SCORED = np.arange(8, 24, 3)


def lowered(base, tensor):
    """A tensor's Q3_K blocks in HF's row order, as a weight."""
    stored = base.tensors.matrix(f"{slots(base)[tensor].hf_name}.weight")
    return from_rows(ggml.requantize(stored.rows, stored.kind, stored.columns, Type.Q3_K), Type.Q3_K, stored.columns)


@pytest.mark.parametrize("tied", [True, False])
def test_an_exchanged_weight_moves_the_output_as_far_as_whole_logits_say(make_tiny, tied):
    """The oracle is `fidelity` over whole logits of the decoder, window by window, before and after."""
    base = open_base(make_tiny(tied=tied).path)
    decoder = build_decoder(base)
    output = OutputKL(decoder, WINDOWS, SCORED)

    def logits():
        return [decoder.logits(torch.from_numpy(ids))[SCORED].numpy() for ids in WINDOWS]

    before, entering = logits(), dict(output.layers())
    for tensor, slot in slots(base).items():
        with exchanged(decoder, slot, lowered(base, tensor)):
            x = output.embedded() if slot.embeds else entering[slot.layer]
            kl, expected = output.from_layer(slot.layer, x), fidelity(zip(before, logits(), strict=True)).kl_mean
        assert kl == pytest.approx(expected, rel=1e-3)
        assert kl > 1e-6
    assert output.whole() == pytest.approx(0, abs=1e-6)  # all as it was


def test_every_quantized_matrix_has_a_slot(make_tiny):
    base = open_base(make_tiny(tied=False).path)
    assert slots(base).keys() == {name for name, info in base.file.tensors.items() if len(info.shape) == 2}


def test_measuring_gives_every_type_its_damage(make_tiny):
    path = make_tiny().path
    importance = np.random.default_rng(1).uniform(0.1, 4, 256).astype(np.float32)
    name = "blk.1.attn_v.weight"
    trial = Trial(Type.Q3_K, candidates(name, 256, important=True), importance)
    (found,) = measure(Job(path, Windows(WINDOWS, SCORED), {name: trial})).values()
    assert found.kl > 0
    assert found.damage("Q3_K") == pytest.approx(found.kl)
    assert found.damage("F16") < 1e-3 * found.damage("Q6_K") < found.damage("Q6_K") < found.damage("Q2_K")
    # near the original the KL is quadratic: what is scaled is close to what would have been measured
    (measured,) = measure(Job(path, Windows(WINDOWS, SCORED), {name: Trial(Type.Q4_K, (), importance)})).values()
    assert found.damage("Q4_K") == pytest.approx(measured.kl, rel=0.3)


def test_a_run_that_was_stopped_goes_on_where_it_was(make_tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("EDGELORA_HOME", str(tmp_path))
    names = ("blk.0.attn_v.weight", "blk.0.ffn_up.weight", "blk.1.attn_v.weight")
    job = Job(
        make_tiny().path, Windows(WINDOWS, SCORED), {name: Trial(Type.Q3_K, (Type.Q4_K,), None) for name in names}
    )

    def stop(progress):
        if progress.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sensitivities(job, "key", on_progress=stop)
    (log,) = tmp_path.rglob("*.log")
    lines = log.read_text().splitlines(keepends=True)
    assert len(lines) >= 2
    log.write_text(lines[0] + lines[1] + lines[1][:20])  # stopped in the middle of the third
    costs, steps = [], []
    found = sensitivities(job, "key", costs.append, steps.append)
    assert [cost.evaluations for cost in costs] == [1]
    assert [(p.step, p.total) for p in steps] == [(1, 1)]
    assert found == measure(job)
    assert sensitivities(job, "key", costs.append) == found
    assert len(costs) == 1
    assert not list(tmp_path.rglob("*.log"))


def test_the_time_that_is_left_counts_layers(make_tiny, monkeypatch):
    """A clock that takes a second for each layer that is computed: what is left is known from the first tensor on."""
    now = [0.0]
    monkeypatch.setattr("edgelora.progress.time.perf_counter", lambda: now[0])

    def computed(self, first, _):
        now[0] += len(self.decoder.model.layers) - first + 1  # and the head
        return 0.0

    monkeypatch.setattr(OutputKL, "from_layer", computed)
    names = ("blk.0.attn_v.weight", "blk.0.ffn_up.weight", "blk.1.attn_v.weight", "blk.1.ffn_up.weight")
    trials, left = {name: Trial(Type.Q3_K, (), None) for name in names}, []
    measure(Job(make_tiny().path, Windows(WINDOWS, SCORED), trials), lambda progress: left.append(progress.eta_s))
    assert left == pytest.approx([7.0, 4.0, 2.0, 0.0])


def test_the_error_of_a_whole_tensor_is_that_of_its_blocks(make_tiny):
    base = open_base(make_tiny().path)
    stored = base.tensors.matrix("model.layers.0.self_attn.k_proj.weight")._replace(columns=256)
    few = stored._replace(rows=stored.rows[:64])  # no more than are sampled: all of them count
    weights = few.floats()
    importance = np.linspace(0.5, 2, 256, dtype=np.float32)
    found = errors(few, Trial(Type.Q3_K, (Type.Q4_0,), importance))
    for kind in (Type.Q3_K, Type.Q4_0):
        lost = weights - ggml.dequantize(ggml.quantize(weights, kind, importance), kind, 256)
        assert found[kind.name] == pytest.approx(float((lost**2 * importance).sum()), rel=1e-4)


@pytest.mark.parametrize("columns", [256, 288, 100])
@pytest.mark.parametrize("important", [True, False])
def test_every_candidate_can_be_written(columns, important):
    weights = np.random.default_rng(0).normal(size=(2, columns)).astype(np.float32)
    importance = np.ones(columns, np.float32) if important else None
    given = candidates("blk.0.ffn_up.weight", columns, important)
    assert probe(columns) in given
    for kind in given:
        assert ggml.quantize(weights, kind, importance).shape == (2, ggml.row_bytes(kind, columns))
    if columns == 256 and important:
        assert given == CANDIDATES


def test_damages_add_up_and_survive_a_file():
    found = {
        "a": Sensitivity("Q3_K", 0.02, {"Q3_K": 4.0, "Q4_K": 1.0}),
        "b": Sensitivity("Q3_K", 0.0, {"Q3_K": 0.0, "Q4_K": 0.0}),  # all zeros: nothing to lose
    }
    assert predicted(found, {"a": "Q4_K", "b": "Q3_K", "norm": "F32"}) == pytest.approx(0.005)
    assert from_json(as_json(found), "cache") == found
    with pytest.raises(FileFormatError, match="cache: no measured sensitivities"):
        from_json(as_json(found)[:-9], "cache")


def test_the_key_of_a_measurement_says_all_that_decides_it():
    key = cache_key(source="0a", asked="1b")
    assert key == cache_key(asked="1b", source="0a")
    assert len({key, cache_key(source="0b", asked="1b"), cache_key(source="0a", asked="1c")}) == 3
