"""Every row of METHODS against PEFT on the same weights, in both directions, and through every exit it names."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from exact import Exact, draw
from peft import AdaLoraConfig, LoraConfig, PeftModel, VeraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from pefts import require_pefts_gradients
from safetensors.numpy import load_file, save_file
from same_tokens import IDS, NEARLY_TIED, loss_of

from converters.adapter_to_gguf import write_adapter_gguf
from edgelora.architectures.layers import Layers
from edgelora.architectures.names import EMBEDDING
from edgelora.base.decoder import build_decoder
from edgelora.base.model import open_base
from edgelora.base.weights import Dense
from edgelora.cli import run
from edgelora.errors import AdapterError, ConfigError, EdgeloraError
from edgelora.evaluate.fidelity import fidelity
from edgelora.nn.linear import Linear
from edgelora.peft import adalora, dora, lora_xs, pissa
from edgelora.peft.adapter import (
    CONFIG,
    MAGNITUDE,
    PREFIX,
    TENSORS,
    Adapter,
    LoraPair,
    read_adapter,
    write_adapter,
)
from edgelora.peft.dora import DoraDelta, row_lengths
from edgelora.peft.inject import adapter_config, attach, chosen, collect, inject, kept_beside
from edgelora.peft.methods import METHODS
from edgelora.peft.targets import EVERYWHERE, Where
from edgelora.pipeline.merge import merge
from runtime.scorer import ScoringEngine

RANK, ALPHA = 4, 6
DRAW_NOTHING = ["olora", "full", "galore", "ia3", "bitfit", "layernorm"]
AS_PEFT = ["lora", "rslora", "loraplus", "dora", "vera", "loftq"]  # what is trained of them is what PEFT's files hold
LAYERED = [name for name, row in METHODS.items() if row.linears or row.norms]  # of others see test_soft_training.py
LORAS = [name for name, method in METHODS.items() if method.peft_type == "LORA"]  # of others see test_vectors.py
OWN_START = ["pissa", "olora"]  # PEFT subtracts their start from the base
LAYER1 = [f"model.layers.1.self_attn.{name}_proj" for name in "qkvo"]
TARGETS = {"all": (), "two kinds": ("q_proj", "down_proj"), "one layer's": tuple(LAYER1)}
# PEFT 0.21 asks transformers 5.23 for an attribute it has renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def base(tiny):
    return open_base(tiny.path)


@pytest.fixture
def decoder(base):
    return build_decoder(base)


def stir(decoder, seed=1):
    """Move every trained tensor of the adapter on `decoder` away from its start, lengths by up to a fifth."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            noise = torch.rand(parameter.shape, generator=generator) - 0.5
            if name.endswith(MAGNITUDE):
                parameter.mul_(1 + 0.4 * noise)
            elif name.endswith("lora_E"):
                parameter.add_(8 * noise)
            elif name.endswith(("ia3_l", "norm.delta.weight", "delta.bias")):
                parameter.add_(0.8 * noise)
            elif name.endswith("vera_lambda_b"):  # beside d and the random matrices, 0.1 would not be seen
                parameter.add_(4 * noise)
            else:
                parameter.add_(0.1 * noise)


def written(decoder, base, method, folder, where=EVERYWHERE):
    adapter = Adapter(adapter_config(decoder, method, RANK, ALPHA, str(base.path), where), collect(decoder))
    write_adapter(folder, adapter)
    return adapter


def peft_config(method, drawn=False):
    """PEFT's own for the file that the method leaves as; drawn: with random weights in the place of its start."""
    row = METHODS[method]
    if row.peft_type == "VERA":
        return VeraConfig(r=RANK, target_modules="all-linear", init_weights=not drawn, **row.settings)
    r, alpha = row.file_ranks * RANK, row.file_ranks * ALPHA
    start = {"init_lora_weights": False} if drawn else {}
    tied = {"ensure_weight_tying": True} if row.vocabularies else {}
    return LoraConfig(r=r, lora_alpha=alpha, target_modules="all-linear", **start, **row.settings, **tied)


# -- PEFT is the oracle -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("method", AS_PEFT)
def test_peft_computes_the_same_outputs_and_gradients(
    base, decoder, tiny, transformers_model, tmp_path, method, targets
):
    inject(decoder, method, RANK, ALPHA, seed=0, targets=targets)
    stir(decoder)
    written(decoder, base, method, tmp_path / "mine")
    theirs = PeftModel.from_pretrained(transformers_model(tiny), tmp_path / "mine", is_trainable=True).eval()
    found = theirs(IDS[None], labels=IDS[None])
    torch.testing.assert_close(decoder.logits(IDS), found.logits[0].detach(), atol=1e-4, rtol=1e-5)

    loss = loss_of(decoder)
    torch.testing.assert_close(loss, found.loss, atol=1e-5, rtol=0)
    loss.backward()
    found.loss.backward()
    require_pefts_gradients(decoder, theirs)


@pytest.mark.parametrize("method", [name for name in LORAS if name not in AS_PEFT])
def test_peft_computes_the_same_from_the_files(base, decoder, tiny, transformers_model, tmp_path, method):
    inject(decoder, method, RANK, ALPHA, seed=0)
    stir(decoder)
    written(decoder, base, method, tmp_path / "mine")
    theirs = PeftModel.from_pretrained(transformers_model(tiny), tmp_path / "mine").eval()
    with torch.no_grad():
        torch.testing.assert_close(decoder.logits(IDS), theirs(IDS[None]).logits[0], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("method", OWN_START)
def test_a_base_that_keeps_its_weights_learns_as_pefts_that_lost_the_start(
    decoder, tiny, transformers_model, monkeypatch, method
):
    """PEFT starts at the exact SVD, and trains W − s B₀A₀ + s B A."""
    monkeypatch.setattr(pissa, "leading", lambda w, r, _: exact_svd(w, r))
    inject(decoder, method, RANK, ALPHA, seed=0)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", init_lora_weights=method)
    theirs = get_peft_model(transformers_model(tiny), config).eval()
    start = dict(theirs.named_parameters())
    for name, linear in decoder.linears.items():
        a, b = (start[f"{PREFIX}{name}.lora_{part}.default.weight"] for part in "AB")
        torch.testing.assert_close(linear.delta.start_B @ linear.delta.start_A, (b @ a).detach(), atol=1e-5, rtol=1e-4)
        linear.delta.start_A.copy_(a.detach())  # up to the signs of the vectors, which an SVD leaves open
        linear.delta.start_B.copy_(b.detach())
    stir(decoder)
    with torch.no_grad():
        for name, linear in decoder.linears.items():
            for part in "AB":
                start[f"{PREFIX}{name}.lora_{part}.default.weight"] += getattr(linear.delta, f"moved_{part}")
    found = theirs(IDS[None], labels=IDS[None])
    torch.testing.assert_close(decoder.logits(IDS), found.logits[0].detach(), atol=1e-4, rtol=1e-5)
    loss_of(decoder).backward()
    found.loss.backward()
    for name, linear in decoder.linears.items():
        for part in "AB":
            wanted = start[f"{PREFIX}{name}.lora_{part}.default.weight"].grad
            torch.testing.assert_close(getattr(linear.delta, f"moved_{part}").grad, wanted, atol=1e-5, rtol=1e-3)


def exact_svd(weight, rank):
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    return u[:, :rank], s[:rank], vt[:rank]


@pytest.mark.parametrize("method", AS_PEFT)
def test_what_peft_saved_computes_the_same_here(decoder, tiny, transformers_model, tmp_path, method):
    torch.manual_seed(0)
    config = peft_config(method, drawn=True)
    theirs = get_peft_model(transformers_model(tiny), config).eval()
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:  # PEFT's random B is strong enough to amplify rounding
            parameter.data *= 1.1 if "magnitude" in name else 0.3
    theirs.save_pretrained(tmp_path)
    before = decoder.logits(IDS)
    attach(decoder, read_adapter(tmp_path, Layers(tiny.linears)))
    assert float((decoder.logits(IDS) - before).abs().max()) > 0.1
    torch.testing.assert_close(decoder.logits(IDS), theirs(IDS[None]).logits[0].detach(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", [name for name in [*LORAS, "vera"] if name != "adalora"])  # whose ranks differ
def test_the_files_have_the_names_and_settings_of_pefts(base, decoder, tiny, transformers_model, tmp_path, method):
    inject(decoder, method, RANK, ALPHA, seed=0)
    written(decoder, base, method, tmp_path / "mine")
    model = transformers_model(tiny)
    names = [f"{PREFIX}{name}" for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    theirs = get_peft_model(model, peft_config(method))
    shapes = {name: tuple(tensor.shape) for name, tensor in get_peft_model_state_dict(theirs).items()}
    assert {name: value.shape for name, value in load_file(tmp_path / "mine" / TENSORS).items()} == shapes
    ours, config = json.loads((tmp_path / "mine" / CONFIG).read_text()), theirs.peft_config["default"].to_dict()
    for key in ("peft_type", "r", "lora_alpha", "bias", "use_rslora", "use_dora"):
        assert ours.get(key) == config.get(key), key
    ends = tuple(f".{target}" for target in ours["target_modules"])
    assert {name for name in names if name.endswith(ends)} == {f"{PREFIX}{name}" for name in tiny.linears}


# -- what holds for every method ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", LAYERED)
def test_training_starts_at_the_bases_function(decoder, method):
    before = decoder.logits(IDS)
    inject(decoder, method, rank=4, alpha=8, seed=0)
    assert torch.equal(decoder.logits(IDS), before)


@pytest.mark.parametrize("method", LAYERED)
def test_only_the_methods_own_parameters_are_trained(decoder, method):
    parameters = inject(decoder, method, rank=4, alpha=8, seed=0)
    names = [name for name, _ in decoder.named_parameters()]
    assert len(parameters) == len(names)
    assert all(".delta." in name for name in names)
    linears, norms = chosen(method, decoder.linears, decoder.norms)
    whole = [name for name in decoder.vocabularies if name in METHODS[method].vocabularies]
    assert {name.split(".delta.")[0] for name in names} == {*linears, *norms, *whole}
    loss_of(decoder).backward()
    assert all(parameter.grad is not None for parameter in parameters)
    assert any(parameter.grad.any() for parameter in parameters)
    assert not any(buffer.requires_grad for buffer in decoder.buffers())
    assert not decoder.embedding.values.requires_grad


@pytest.mark.parametrize("method", [name for name in LAYERED if name not in DRAW_NOTHING])
def test_a_seed_decides_the_start(decoder, method):
    starts = []
    for seed in (0, 0, 1):
        parameters = inject(decoder, method, 4, 8, seed)
        deltas = [linear.delta for linear in decoder.linears.values() if linear.delta is not None]
        saved = [tensor for delta in deltas for tensor in delta.tensors().values()]
        starts.append([tensor.detach().clone() for tensor in [*parameters, *kept_beside(decoder).values(), *saved]])
    same = [[torch.equal(a, b) for a, b in zip(starts[0], other, strict=True)] for other in starts[1:]]
    assert all(same[0])
    assert not all(same[1])


@pytest.mark.parametrize("method", LAYERED)
def test_as_many_numbers_are_trained_as_the_paper_says(decoder, method):
    inject(decoder, method, RANK, ALPHA, seed=0)
    linears, norms = chosen(method, decoder.linears, decoder.norms)
    for name in linears:
        linear = decoder.linears[name]
        shapes = [tuple(parameter.shape) for parameter in linear.delta.parameters()]
        assert sorted(shapes) == sorted(METHODS[method].trained(name, *linear.weight.shape, RANK))
    for name in norms:
        assert [parameter.shape for parameter in decoder.norms[name].parameters()] == [(256,)]
    matrices = [parameter.shape for one in decoder.vocabularies.values() for parameter in one.parameters()]
    assert matrices == ([(512, 256)] if METHODS[method].vocabularies else [])


@pytest.mark.parametrize(
    "method",
    [name for name, row in METHODS.items() if row.linears and name != "dora"],  # whose lengths are constants
)
def test_the_gradient_is_that_of_the_function(method):
    linear = Linear(Exact(draw(7, 5)))
    linear.delta = METHODS[method].fresh(linear.weight, 3, 4.0, torch.Generator().manual_seed(1)).double()
    names, start = zip(*linear.named_parameters(), strict=True)
    inputs = [draw(4, 5, seed=2), *(one.detach() + draw(*one.shape, seed=3) for one in start)]

    def function(x, *values):
        return torch.func.functional_call(linear, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(function, [one.requires_grad_() for one in inputs], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("method", LAYERED)
def test_a_step_down_the_gradient_lowers_the_loss(decoder, method):
    parameters = inject(decoder, method, 4, 8, seed=0)
    stir(decoder)
    before = loss_of(decoder)
    before.backward()
    with torch.no_grad():
        for parameter in parameters:
            parameter -= 1e-3 * parameter.grad
        assert loss_of(decoder) < before - 1e-4


@pytest.mark.parametrize("method", LAYERED)
def test_an_adapter_computes_the_same_when_read_again(base, decoder, tmp_path, method):
    inject(decoder, method, RANK, ALPHA, seed=0)
    stir(decoder)
    live = decoder.logits(IDS)
    written(decoder, base, method, tmp_path / "mine")
    attach(decoder, read_adapter(tmp_path / "mine", base.layers))
    torch.testing.assert_close(decoder.logits(IDS), live, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("method", [name for name in LAYERED if "merged" in METHODS[name].exits])
def test_merged_is_unmerged(decoder, method):
    inject(decoder, method, RANK, ALPHA, seed=0)
    stir(decoder)
    live = decoder.logits(IDS)
    adapter = Adapter(adapter_config(decoder, method, RANK, ALPHA, "-"), collect(decoder))
    attach(decoder, None)
    for name in adapter.linears:
        linear, change = decoder.linears[name], adapter.change(name)
        weight = linear.weight.dequantize()
        linear.weight = Dense(weight + torch.from_numpy(change.change(weight.numpy())))
        linear.bias = torch.from_numpy(change.change_of_bias(np.zeros(weight.shape[0], np.float32)))
    for name in adapter.norms:
        decoder.norms[name].weight = torch.from_numpy(adapter.norm(name))
    if EMBEDDING in adapter.vocabularies:
        weight = decoder.embedding.dequantize()
        change = torch.from_numpy(adapter.change(EMBEDDING).change(weight.numpy()))
        decoder.embedding = decoder.head = Dense(weight + change)
    torch.testing.assert_close(decoder.logits(IDS), live, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("method", LAYERED)
def test_a_method_leaves_by_the_doors_it_names_and_no_other(base, decoder, tiny, tmp_path, method):
    row, folder = METHODS[method], tmp_path / "mine"
    where = Where(alora_invocation_tokens=tuple(IDS[8:10].tolist())) if row.waits else EVERYWHERE
    inject(decoder, method, RANK, ALPHA, seed=0, targets=where)
    stir(decoder)
    adapter = written(decoder, base, method, folder, where)
    live = decoder.logits(IDS)
    assert float((live - build_decoder(base).logits(IDS)).abs().max()) > 0.2

    def become_part():
        merge(tiny.path, [(folder, 1.0)], tmp_path / "merged.gguf", quant="F16", allow_unverified=True)

    def become_a_lora():
        write_adapter_gguf(tmp_path / "mine.gguf", adapter, base, "mine", "F32")

    for door, leave in (("merged", become_part), ("adapter", become_a_lora)):
        if door in row.exits:
            leave()
        else:
            said = "acts from there on" if row.waits else "merge" if row.exits else "runs in torch alone"
            with pytest.raises(EdgeloraError, match=said):
                leave()
    left = {"merged": "merged.gguf", "adapter": "mine.gguf"}
    assert {path.name for path in tmp_path.glob("*.*")} - {"merged.certificate.json"} == {
        left[door] for door in row.exits if door in left
    }

    if "merged" in row.exits:
        merged = build_decoder(open_base(tmp_path / "merged.gguf")).logits(IDS)
        torch.testing.assert_close(merged, live, atol=2e-2, rtol=0)  # every weight rounded to F16 once
    if "adapter" in row.exits:
        with ScoringEngine(base, n_ctx=64, n_sequences=1, threads=1) as engine:
            engine.load_own("mine", tmp_path / "mine.gguf")  # it may wait for an invocation
            engine.use({"mine": 1.0})
            theirs = engine.logits([IDS.tolist()], [list(range(len(IDS)))])
        found = fidelity([(live.numpy(), theirs)])
        assert found.kl_mean <= 1e-5
        assert found.same_top == 1.0 or found.worst_flip_nats <= NEARLY_TIED


# -- DoRA ---------------------------------------------------------------------------------------------------------


def test_lengths_are_those_of_the_matrix_that_is_never_made():
    weight, a, b, scale = Exact(draw(7, 5)), draw(3, 5, seed=1), draw(7, 3, seed=2), 1.7
    found = row_lengths(weight, weight.values.square().sum(1), a, b, scale)
    torch.testing.assert_close(found, torch.linalg.vector_norm(weight.values + scale * b @ a, dim=1))


def test_gradient_of_dora_is_that_of_constant_lengths(monkeypatch):
    weight, scale = Exact(draw(7, 5)), 1.7
    inputs = [draw(4, 5, seed=1), draw(3, 5, seed=2), draw(7, 3, seed=3), draw(7, seed=4).abs()]
    lengths = torch.linalg.vector_norm(weight.values + scale * inputs[2] @ inputs[1], dim=1)
    monkeypatch.setattr(dora, "row_lengths", lambda *_: lengths)  # what the gradient takes them for

    def function(x, a, b, m):
        delta = DoraDelta(a.detach(), b.detach(), scale, m.detach(), Exact(weight.values))
        return torch.func.functional_call(delta, {"lora_A": a, "lora_B": b, MAGNITUDE: m}, (x, weight))

    assert torch.autograd.gradcheck(function, [one.requires_grad_() for one in inputs], atol=1e-6, rtol=1e-5)


def test_a_row_of_zeros_stays_one_and_is_finite():
    """Models are padded to a width that K-quants can hold: rows of zeros are real."""
    values = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    values[2] = 0
    delta = dora.fresh(Dense(values), 2, 4.0, torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW(delta.parameters(), lr=0.1, weight_decay=0)
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(2))
    for _ in range(3):
        y = delta(x, Dense(values))
        (y - 1).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.isfinite(y).all()
    assert not y[:, 2].any()
    assert y[:, 0].any()
    a, b, m = (part.numpy() for part in delta.tensors().values())
    change = LoraPair(a, b * delta.scale, m).change(values.numpy())  # merged
    assert not change[2].any()
    assert change[0].any()


def test_beside_bfloat16_products_the_factor_stays_float32():
    """As a bfloat16, 1.003 would be 1 for every token."""
    generator = torch.Generator().manual_seed(0)
    weight = Dense(torch.randn(512, 64, generator=generator))
    delta = dora.fresh(weight, 2, 4.0, generator)
    x = torch.randn(64, 64, generator=generator).bfloat16()
    with torch.no_grad():
        before = delta(x, weight)
        delta.lora_magnitude_vector *= 1.003
        after = delta(x, weight)
    assert after.dtype == torch.bfloat16
    before, after = before.float(), after.float()
    assert float((after * before).sum() / before.square().sum()) == pytest.approx(1.003, abs=1e-3)


def test_half_a_dora_is_halfway_to_the_whole(base, decoder, tiny, tmp_path):
    inject(decoder, "dora", RANK, ALPHA, seed=0)
    stir(decoder)
    adapter = written(decoder, base, "dora", tmp_path / "mine")
    folder = tmp_path / "mine"
    merge(tiny.path, [(folder, 0.5), (folder, 0.25)], tmp_path / "merged.gguf", quant="F16", allow_unverified=True)
    merged, module = build_decoder(open_base(tmp_path / "merged.gguf")), LAYER1[0]
    w = build_decoder(base).linears[module].weight.dequantize().numpy()
    wanted = w + 0.75 * adapter.pairs()[module].change(w)
    np.testing.assert_allclose(merged.linears[module].weight.dequantize().numpy(), wanted, atol=1e-3)


DAMAGE = {
    "missing": (lambda t, name: t.pop(name), "lora_magnitude_vector is missing"),
    "of another length": (lambda t, name: t.update({name: np.ones(3, np.float32)}), "is (3,), expected (256,)"),
    "not finite": (lambda t, name: t[name].__setitem__(0, np.nan), "NaN"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_magnitude_is_refused(decoder, tiny, tmp_path, damage):
    change, said = DAMAGE[damage]
    inject(decoder, "dora", RANK, ALPHA, seed=0)
    tensors = collect(decoder)
    change(tensors[LAYER1[0]], MAGNITUDE)
    write_adapter(tmp_path / "mine", Adapter(adapter_config(decoder, "dora", RANK, ALPHA, "-"), tensors))
    with pytest.raises(AdapterError) as e:
        read_adapter(tmp_path / "mine", Layers(tiny.linears))
    assert f"{LAYER1[0]}: " in e.value.what
    assert said in e.value.what


def test_a_magnitude_in_what_calls_itself_a_lora_is_refused(decoder, tiny, tmp_path):
    inject(decoder, "dora", RANK, ALPHA, seed=0)
    config = adapter_config(decoder, "dora", RANK, ALPHA, "-") | {"use_dora": False}
    write_adapter(tmp_path / "mine", Adapter(config, collect(decoder)))
    with pytest.raises(AdapterError, match="is no part of a plain LoRA"):
        read_adapter(tmp_path / "mine", Layers(tiny.linears))


# -- PiSSA and OLoRA ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
def test_the_fast_svd_is_the_exact_one(decay):
    """decay 0: all singular values alike, the hardest case; there any directions of as much length will do."""
    u, v = (torch.linalg.qr(draw(*shape, seed=i).float()).Q for i, shape in enumerate([(60, 40), (50, 40)]))
    weight = (u * (1 - decay + 1e-3 * torch.rand(40)) ** torch.arange(40.0)) @ v.T if decay else u @ v.T
    found = pissa.leading(weight, 6, torch.Generator().manual_seed(0))
    exact = exact_svd(weight, 6)
    torch.testing.assert_close(found[1], exact[1], atol=1e-5, rtol=1e-4)
    left = [torch.linalg.matrix_norm(weight - (u * s) @ vt) for u, s, vt in (found, exact)]
    torch.testing.assert_close(*left, atol=1e-5, rtol=1e-3)


def test_olora_starts_at_orthonormal_columns(decoder):
    inject(decoder, "olora", RANK, ALPHA, seed=0)
    delta, weight = decoder.linears[LAYER1[0]].delta, decoder.linears[LAYER1[0]].weight.dequantize()
    torch.testing.assert_close(delta.start_B.T @ delta.start_B, torch.eye(RANK), atol=1e-5, rtol=0)
    torch.testing.assert_close(delta.start_B @ delta.start_A[:, :RANK], weight[:, :RANK], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", OWN_START)
def test_in_16_bits_the_file_keeps_what_was_learned(decoder, method):
    """[B, −B₀] [A; A₀], the same matrix, would round A and A₀ apart."""
    inject(decoder, method, RANK, ALPHA, seed=0)
    delta = decoder.linears[LAYER1[0]].delta
    with torch.no_grad():
        for part in delta.parameters():
            part.copy_(1e-4 * draw(*part.shape))
        a, b, _ = delta.factors
        wanted = b.double() @ a.double()
        large_a = torch.cat([delta.start_A + delta.moved_A, delta.start_A])
        large_b = torch.cat([delta.start_B + delta.moved_B, -delta.start_B], 1)
    ours, theirs = (
        torch.linalg.matrix_norm(b.half().double() @ a.half().double() - wanted) / torch.linalg.matrix_norm(wanted)
        for a, b in ((a, b), (large_a, large_b))
    )
    assert ours < 1e-3
    assert theirs > 0.1


@pytest.mark.parametrize("method", [*OWN_START, "lora_xs"])
def test_a_rank_beyond_the_matrix_is_refused(decoder, method):
    with pytest.raises(ConfigError) as e:
        inject(decoder, method, 300, ALPHA, seed=0)
    assert "rank 300" in e.value.what
    assert "--rank 256" in e.value.fix or "--rank 128" in e.value.fix


# -- LoRA-XS and MultiLoRA ----------------------------------------------------------------------------------------


def test_lora_xs_moves_a_weight_among_its_leading_directions_alone(decoder, monkeypatch):
    monkeypatch.setattr(lora_xs, "leading", lambda w, r, _: exact_svd(w, r))
    inject(decoder, "lora_xs", RANK, ALPHA, seed=0)
    stir(decoder)
    linear = decoder.linears[LAYER1[0]]
    delta, weight = linear.delta, linear.weight.dequantize().clone()
    u, s, vt = exact_svd(weight, RANK)
    with torch.no_grad():
        a, b, scale = delta.factors
        torch.testing.assert_close(scale * b @ a, ALPHA / RANK * (u * s) @ delta.R @ vt, atol=1e-5, rtol=1e-4)
    assert [tuple(p.shape) for p in delta.parameters()] == [(RANK, RANK)]


def test_multilora_is_as_many_loras_side_by_side():
    weight, x = Exact(draw(7, 5)), draw(4, 5, seed=1)
    delta = METHODS["multilora"].fresh(weight, 8, 4.0, torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        delta.scaling.copy_(draw(3, 7, seed=2))
        wanted = x @ weight.values.T
        for one, columns in zip(delta.scaling, (range(3), range(3, 6), range(6, 8)), strict=True):
            a, b = delta.lora_A[list(columns)], delta.lora_B[:, list(columns)]
            wanted = wanted + 4 / 8 * one * (x @ a.T @ b.T)
        found = Linear(weight)
        found.delta = delta
        torch.testing.assert_close(found(x), wanted)


@pytest.mark.parametrize("rank", [1, 2, 3, 16])
def test_multilora_shares_any_rank_out(rank):
    delta = METHODS["multilora"].fresh(Exact(draw(7, 5)), rank, 4.0, torch.Generator().manual_seed(1))
    sizes = torch.bincount(delta.groups)
    assert len(sizes) == min(3, rank)
    assert sizes.sum() == rank
    assert sizes.max() - sizes.min() <= 1


# -- VeRA ---------------------------------------------------------------------------------------------------------


def test_all_layers_of_a_vera_share_one_pair(decoder, tmp_path, base):
    inject(decoder, "vera", RANK, ALPHA, seed=0)
    deltas = [linear.delta for linear in decoder.linears.values()]
    assert len({id(delta.projections) for delta in deltas}) == 1
    assert not list(kept_beside(decoder))
    written(decoder, base, "vera", tmp_path / "mine")
    names = [name for name in load_file(tmp_path / "mine" / TENSORS) if "lambda" not in name]
    assert sorted(names) == ["base_model.vera_A", "base_model.vera_B"]


VERA_DAMAGE = {
    "no matrices": (lambda t: t.pop("base_model.vera_A"), "save_projection"),
    "a vector less": (lambda t: t.pop(f"{PREFIX}{LAYER1[0]}.vera_lambda_d"), "vera_lambda_d is missing"),
    "too narrow": (lambda t: t.update({"base_model.vera_A": np.ones((RANK, 8), np.float32)}), "expected (4, 256)"),
    "not finite": (lambda t: t[f"{PREFIX}{LAYER1[0]}.vera_lambda_b"].__setitem__(0, np.nan), "NaN"),
    "a LoRA's": (lambda t: t.update({f"{PREFIX}{LAYER1[0]}.lora_A.weight": np.ones((4, 4), np.float32)}), "no part of"),
    "of another model": (lambda t: t.update({f"{PREFIX}x.vera_lambda_b": np.ones(4, np.float32)}), "no linear layer"),
}


@pytest.mark.parametrize("damage", VERA_DAMAGE)
def test_a_damaged_vera_is_refused(decoder, base, tiny, tmp_path, damage):
    change, said = VERA_DAMAGE[damage]
    inject(decoder, "vera", RANK, ALPHA, seed=0)
    written(decoder, base, "vera", tmp_path / "mine")
    tensors = load_file(tmp_path / "mine" / TENSORS)
    change(tensors)
    save_file(tensors, tmp_path / "mine" / TENSORS)
    with pytest.raises(AdapterError) as e:
        read_adapter(tmp_path / "mine", Layers(tiny.linears))
    assert said in e.value.what


def test_a_vera_is_inspected(decoder, base, tmp_path, capsys):
    inject(decoder, "vera", RANK, ALPHA, seed=0)
    written(decoder, base, "vera", tmp_path / "mine")
    assert run(["inspect", str(tmp_path / "mine"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["faults"] == []
    assert facts["ranks"] == {str(RANK): len(decoder.linears)}


# -- DyLoRA -------------------------------------------------------------------------------------------------------


def test_a_dylora_learns_with_its_first_ranks_alone(decoder):
    inject(decoder, "dylora", RANK, ALPHA, seed=0)
    stir(decoder)
    deltas, around = [linear.delta for linear in decoder.linears.values()], METHODS["dylora"].around
    whole, seen = decoder.logits(IDS), set()
    for seed in range(12):
        around.draw(deltas, torch.Generator().manual_seed(seed))
        (active,) = {delta.active for delta in deltas}
        seen.add(active)
        decoder.zero_grad()
        loss_of(decoder).backward()
        for delta in deltas:
            assert delta.lora_A.grad[:active].any()
            assert not delta.lora_A.grad[active:].any()
            assert not delta.lora_B.grad[:, active:].any()
    assert seen == set(range(1, RANK + 1))
    around.draw(deltas, None)
    assert torch.equal(decoder.logits(IDS), whole)


def test_the_first_ranks_of_a_dylora_are_the_adapter_that_it_learned_with(decoder):
    inject(decoder, "dylora", RANK, ALPHA, seed=0)
    stir(decoder)
    for linear in decoder.linears.values():
        linear.delta.active = 2
    learned = decoder.logits(IDS)
    cut = {
        name: {"lora_A": parts["lora_A"][:2], "lora_B": parts["lora_B"][:, :2]}
        for name, parts in collect(decoder).items()
    }
    attach(decoder, Adapter(adapter_config(decoder, "dylora", 2, ALPHA, "-"), cut))
    torch.testing.assert_close(decoder.logits(IDS), learned, atol=1e-5, rtol=1e-5)


# -- AdaLoRA ------------------------------------------------------------------------------------------------------


def test_pefts_adalora_takes_the_same_steps_and_prunes_the_same_ranks(
    base, decoder, tiny, transformers_model, tmp_path
):
    total, around = 20, METHODS["adalora"].around
    inject(decoder, "adalora", RANK, ALPHA, seed=0)
    stir(decoder)
    config = AdaLoraConfig(
        init_r=6,
        target_r=4,
        lora_alpha=ALPHA,
        target_modules="all-linear",
        total_step=total,
        tinit=2,
        tfinal=6,
        task_type="CAUSAL_LM",  # else PEFT leaves the orthogonality out
    )
    theirs = get_peft_model(transformers_model(tiny), config).eval()
    named = {
        name.removeprefix(PREFIX).replace(".default", ""): parameter
        for name, parameter in theirs.named_parameters() if parameter.requires_grad
    }  # fmt: skip
    ours = {name.replace(".delta", ""): parameter for name, parameter in decoder.named_parameters()}
    assert ours.keys() == named.keys()
    deltas = [linear.delta for linear in decoder.linears.values()]
    for name, parameter in ours.items():
        named[name].data.copy_(parameter.data)
    for step in range(1, total + 1):
        loss, found = loss_of(decoder), theirs(input_ids=IDS[None], labels=IDS[None]).loss
        loss.backward()
        found.backward()
        around.regularize(deltas)
        for name, parameter in ours.items():
            torch.testing.assert_close(parameter.grad, named[name].grad, atol=1e-5, rtol=1e-3)
            named[name].grad.copy_(parameter.grad)  # rounding must not choose between two ranks
            for one in (parameter, named[name]):
                one.data -= 0.02 * one.grad
        around.allot(deltas, step, total)
        theirs.base_model.update_and_allocate(step)
        for name, parameter in ours.items():
            if name.endswith("lora_E"):
                assert torch.equal(parameter == 0, named[name] == 0), (step, name)
            parameter.grad = named[name].grad = None
    left = [len(delta.left()) for delta in deltas]
    assert sum(left) == RANK * len(deltas)
    assert len(set(left)) > 1
    written(decoder, base, "adalora", tmp_path / "mine")
    live = decoder.logits(IDS)
    torch.testing.assert_close(live, theirs(IDS[None]).logits[0].detach(), atol=1e-3, rtol=1e-3)
    plain = PeftModel.from_pretrained(transformers_model(tiny), tmp_path / "mine").eval()
    torch.testing.assert_close(live, plain(IDS[None]).logits[0].detach(), atol=1e-4, rtol=1e-5)


def saved_by_pefts_adalora(tiny, transformers_model, folder):
    """With ranks pruned, and one layer without any; its logits."""
    config = AdaLoraConfig(
        init_r=6, target_r=4, lora_alpha=ALPHA, target_modules="all-linear", total_step=9, init_lora_weights=False
    )
    torch.manual_seed(0)
    theirs = get_peft_model(transformers_model(tiny), config).eval()
    kept: dict[str, list[bool]] = {}
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            parameter.data *= 0.3
        if "lora_E" in name:
            rows = [False] * 6 if LAYER1[0] in name else [True, False, True, True, len(kept) % 2 == 0, False]
            parameter.data[[not row for row in rows]] = 0
            kept[name.removeprefix("base_model.model.")] = rows
    theirs.peft_config["default"].rank_pattern = kept
    theirs.save_pretrained(folder)
    return theirs(IDS[None]).logits[0].detach()


@pytest.mark.filterwarnings("ignore:.*invalid shape")  # PEFT's own, on the layer without ranks
def test_what_pefts_adalora_saved_computes_the_same_here(decoder, tiny, transformers_model, tmp_path):
    theirs = saved_by_pefts_adalora(tiny, transformers_model, tmp_path)
    before = decoder.logits(IDS)
    adapter = read_adapter(tmp_path, Layers(tiny.linears))
    attach(decoder, adapter)
    assert float((decoder.logits(IDS) - before).abs().max()) > 0.1
    torch.testing.assert_close(decoder.logits(IDS), theirs, atol=1e-4, rtol=1e-4)
    assert set(tiny.linears) - set(adapter.tensors) == {LAYER1[0]}
    assert {pair.rank for pair in adapter.pairs().values()} == {3, 4}


@pytest.mark.filterwarnings("ignore:.*invalid shape")
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t, _: t.pop(f"{PREFIX}{LAYER1[1]}.lora_E"), "lora_E is missing"),
        (lambda t, _: t.update({f"{PREFIX}{LAYER1[1]}.lora_E": np.ones((9, 1), np.float32)}), "lora_E is (9, 1)"),
        (lambda _, config: config.pop("init_r"), "init_r is None"),
    ],
)
def test_a_damaged_adalora_is_refused(tiny, transformers_model, tmp_path, change, said):
    saved_by_pefts_adalora(tiny, transformers_model, tmp_path)
    tensors, config = load_file(tmp_path / TENSORS), json.loads((tmp_path / CONFIG).read_text())
    change(tensors, config)
    save_file(tensors, tmp_path / TENSORS)
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(AdapterError) as e:
        read_adapter(tmp_path, Layers(tiny.linears))
    assert said in e.value.what


def test_a_layer_that_lost_every_rank_is_the_bases(decoder, base, tiny, tmp_path):
    inject(decoder, "adalora", RANK, ALPHA, seed=0)
    stir(decoder)
    decoder.linears[LAYER1[0]].delta.pruned.fill_(True)
    written(decoder, base, "adalora", tmp_path / "mine")
    pairs = read_adapter(tmp_path / "mine", Layers(tiny.linears)).pairs()
    assert pairs[LAYER1[0]].rank == 1
    assert not (pairs[LAYER1[0]].b @ pairs[LAYER1[0]].a).any()
    assert pairs[LAYER1[1]].rank == 6


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 7, 16])
def test_an_adalora_ends_at_the_rank_that_was_asked_for(rank):
    assert adalora.target(adalora.ranks_at_first(rank)) == rank


# -- `edgelora methods` --------------------------------------------------------------------------------------------


def test_the_command_lists_every_method_with_its_doors(capsys):
    assert run(["methods", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert {name: tuple(row["leaves_as"]) for name, row in rows.items()} == {n: m.exits for n, m in METHODS.items()}
    assert rows["pissa"]["paper"] == "arXiv:2404.02948"
    assert run(["methods"]) == 0
    shown = capsys.readouterr().out
    assert all(f" {name} " in shown for name in METHODS)
    assert "QLoRA and QDoRA are lora and dora over a quantized base" in shown
    assert max(map(len, shown.splitlines())) <= 80


# -- which layers -------------------------------------------------------------------------------------------------


def test_only_the_targets_are_adapted(decoder):
    inject(decoder, "lora", 2, 4, seed=0)  # what was on it comes off
    inject(decoder, "lora", 2, 4, seed=0, targets=["q_proj", "layers.1.mlp.down_proj"])
    adapted = [name for name, linear in decoder.linears.items() if linear.delta is not None]
    assert adapted == [
        "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj",
    ]  # fmt: skip
    assert list(collect(decoder)) == adapted
    # an end that others share would adapt those too when PEFT reads it
    assert adapter_config(decoder, "lora", 2, 4, "-")["target_modules"] == sorted(adapted)


def test_a_target_that_fits_nothing_is_named_with_what_there_is(decoder):
    with pytest.raises(ConfigError) as e:
        inject(decoder, "lora", 2, 4, seed=0, targets=["q_proj", "q_porj", "router"])
    assert str(e.value).splitlines() == [
        "target_modules: no linear layer of this model is named q_porj, router",
        "  why: its linear layers are down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj",
        "  fix: did you mean q_proj?",
    ]


def test_loraplus_is_a_lora_to_everything_but_the_optimizer(decoder):
    starts = [inject(decoder, method, RANK, ALPHA, seed=0) for method in ("lora", "loraplus")]
    assert all(torch.equal(a, b) for a, b in zip(*starts, strict=True))
    assert METHODS["loraplus"].faster == ("lora_B",)


def test_rslora_is_scaled_by_the_root_of_its_rank(decoder):
    inject(decoder, "rslora", rank=9, alpha=6, seed=0)
    assert {linear.delta.scale for linear in decoder.linears.values()} == {2.0}
