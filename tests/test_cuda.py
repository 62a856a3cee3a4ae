"""Training on an NVIDIA GPU against the same on the CPU: values, gradients, whole runs, and the memory plan."""

from __future__ import annotations

import gc
import itertools
from pathlib import Path

import pytest
import torch
from example_runs import configs, example_rows
from gguf.constants import GGMLQuantizationType as Type
from packed_rows import adapted, backward

from edgelora.architectures import ARCHITECTURES, ModelConfig, Rope
from edgelora.architectures.names import EMBEDDING, HEAD, tensor_shapes
from edgelora.base import ggml
from edgelora.base.decoder import build_decoder
from edgelora.base.host_rows import HostRows
from edgelora.base.model import open_base
from edgelora.base.weights import Dense, GGUFBlocks
from edgelora.nn import gpu, gpu_attention
from edgelora.nn.attention import SegmentAttention
from edgelora.nn.decoder import Decoder
from edgelora.nn.frozen import Frozen
from edgelora.nn.graphs import OFTEN
from edgelora.nn.scores import Scores
from edgelora.peft.adapter import read_adapter
from edgelora.peft.inject import inject
from edgelora.training.base_footprint import Model
from edgelora.training.footprint import Load, footprint
from edgelora.training.metrics import read_metrics
from edgelora.training.optim import build_optimizer, flatten_state, load_state
from edgelora.training.run import run_training

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no NVIDIA GPU that torch can use")

ROOT = Path(__file__).resolve().parent.parent
PREFIX, TAILS = 9, (70, 200, 1)
POSITIONS = torch.cat([torch.arange(PREFIX), *(PREFIX + torch.arange(n) for n in TAILS)])
STARTS = list(itertools.accumulate(TAILS, initial=PREFIX))
N = len(POSITIONS)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def off_by(found, expected):
    """‖found − expected‖ / ‖expected‖."""
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    return float((found - expected).norm() / expected.norm())


def needs_triton():
    if not gpu.has_triton(torch.device("cuda", 0)):
        pytest.skip("this GPU is older than Ampere, or Triton is not installed")


# -- attention


@pytest.mark.parametrize("prefix", [0, PREFIX])
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("dim", [64, 128])
def test_attention_of_segments(dim, window, prefix):
    """FlashAttention in bfloat16 against the tiles in float32, over the same numbers."""
    needs_triton()
    starts = STARTS if prefix else [0, *STARTS]
    how = Scores(dim**-0.5, window)
    tensors = [drawn(N, heads, dim, seed=i).bfloat16() for i, heads in enumerate((6, 2, 2, 6))]

    def gradients(device, dtype):
        q, k, v, d_out = (x.to(device, dtype) for x in tensors)
        inputs = [x.requires_grad_() for x in (q, k, v)]
        out = SegmentAttention.apply(*inputs, starts, prefix, how)
        return out, *torch.autograd.grad(out, inputs, d_out)

    assert gpu_attention.usable(how, *(x.cuda() for x in tensors))
    for found, expected in zip(gradients("cuda", torch.bfloat16), gradients("cpu", torch.float32), strict=True):
        assert off_by(found, expected) < 1e-2


def test_what_flash_attention_cannot_do_is_left_to_the_tiles():
    x = torch.zeros(1, 2, 64, device="cuda", dtype=torch.bfloat16)
    assert not gpu_attention.usable(Scores(1.0, softcap=50.0), x)
    assert not gpu_attention.usable(Scores(1.0), x.float())
    assert not gpu_attention.usable(Scores(1.0), x[..., :60])


# -- the decoder


def gradients(decoder, device, prefix=PREFIX):
    """The loss and every gradient of a packed row."""
    ids = torch.randint(512, (N,), generator=torch.Generator().manual_seed(3)).to(device)
    hidden = decoder(ids, POSITIONS.to(device), STARTS, prefix)
    loss = decoder.nll(hidden, ids.roll(-1)).mean()
    return loss.detach(), torch.autograd.grad(loss, list(decoder.parameters()))


@pytest.mark.parametrize("how", ["blocks", "nf4", "bf16"])
@pytest.mark.parametrize(
    "kind", [Type.F32, Type.Q4_0, Type.Q8_0, Type.Q4_K, Type.Q6_K, Type.Q5_0], ids=lambda k: k.name
)
def test_gradients_are_those_of_the_cpu(make_tiny, kind, how):
    base = open_base(make_tiny(kind, tied=kind != Type.Q6_K).path)
    exact_loss, exact = gradients(adapted(base, how=how), "cpu")
    for compute, loss_off, off in [(torch.float32, 1e-5, 1e-3), (torch.bfloat16, 5e-3, 5e-2)]:
        loss, found = gradients(adapted(base, compute, how=how, device="cuda"), "cuda")
        assert abs(float(loss) - float(exact_loss)) < loss_off
        assert max(map(off_by, found, exact)) < off


def test_recomputing_and_moving_change_no_bit(make_tiny, monkeypatch):
    """Of what runs in the same order each time: attention's own sums do not, so tiles compute it here."""
    from edgelora.nn import offload

    monkeypatch.setattr(gpu_attention, "usable", lambda *_: False)
    monkeypatch.setattr(offload, "SMALLEST", 0)
    decoder = adapted(open_base(make_tiny(Type.Q4_K).path), torch.bfloat16, device="cuda")
    loss, kept = gradients(decoder, "cuda")
    for decoder.recompute, decoder.offload in [(True, False), (True, True), (False, True)]:
        again_loss, again = gradients(decoder, "cuda")
        assert torch.equal(loss, again_loss)
        assert all(map(torch.equal, kept, again))


@pytest.mark.parametrize(("recompute", "offload"), [(False, False), (True, False), (True, True)])
def test_recorded_passes_have_the_gradients_of_launched_ones(make_tiny, monkeypatch, recompute, offload):
    """Steps of three rows each, of which some lengths come again: the sums over a step are those without graphs."""
    needs_triton()
    monkeypatch.setattr("edgelora.nn.offload.SMALLEST", 0)
    base = open_base(make_tiny(Type.Q4_K).path)
    launched, recorded = (adapted(base, torch.bfloat16, device="cuda") for _ in range(2))
    for decoder in (launched, recorded):
        decoder.recompute, decoder.offload = recompute, offload
    recorded.record_passes(512)
    rows = [([200], 0), ([203], 0), ([60, 100], 0), ([70, 200, 1], PREFIX), ([75, 190, 3], PREFIX), ([205], 0)] * OFTEN

    for step in range(0, len(rows), 3):
        losses = []
        for decoder in (launched, recorded):
            with decoder.running():
                losses.append([backward(decoder, step + i, *row) for i, row in enumerate(rows[step : step + 3])])
        assert all(off_by(a, b) < 1e-3 for a, b in zip(*losses, strict=True))
        for one, two in zip(launched.parameters(), recorded.parameters(), strict=True):
            assert off_by(two.grad, one.grad) < 2e-2
            one.grad = two.grad = None
    assert recorded.graphs.count >= 2


def test_a_vocabulary_stays_with_the_machine_where_its_head_is_another(make_tiny):
    base = open_base(make_tiny(Type.Q4_K, tied=False).path)
    here, there = (build_decoder(base, device=device) for device in ("cpu", "cuda"))
    assert isinstance(there.embedding, HostRows)
    ids = torch.tensor([5, 0, 511, 5])
    found = there.embedding.gather(ids.cuda())
    assert found.is_cuda
    torch.testing.assert_close(found.cpu(), here.embedding.gather(ids), rtol=1e-6, atol=1e-6)
    dense = HostRows(Dense(drawn(20, 8).bfloat16()))
    assert torch.equal(dense.gather(ids[:2].cuda()).cpu(), dense.held.gather(ids[:2]))
    assert there.logits(ids.cuda()).is_cuda


# -- runs


@pytest.fixture(scope="module")
def settings(make_tiny, tmp_path_factory):
    """`settings(out, **changes)`: a run of six steps over the Q8_0 model."""
    data = example_rows(tmp_path_factory.mktemp("data") / "train.jsonl", 0, 24)
    return configs(
        base=make_tiny(Type.Q8_0).path, data=data, valid=data, rank=4, learning_rate=5e-3, warmup_steps=2, epochs=2,
        device="cuda",
    )  # fmt: skip


@pytest.fixture(scope="module")
def on_the_cpu(settings, tmp_path_factory):
    return run_training(settings(tmp_path_factory.mktemp("cpu") / "adapter", device="cpu", dtype="f32"))


@pytest.mark.parametrize(
    ("changes", "off"),
    [
        ({"dtype": "f32"}, 1e-3), ({"dtype": "bf16"}, 3e-2),
        ({"dtype": "bf16", "recompute": "full", "offload": True}, 3e-2),
        ({"dtype": "bf16", "base_dtype": "nf4", "max_gpu_memory": "4GB"}, 0.3),
    ],
    ids=["f32", "bf16", "offload", "nf4"],
)  # fmt: skip
def test_a_run_has_the_curve_of_the_cpu(settings, on_the_cpu, tmp_path, changes, off):
    run = run_training(settings(tmp_path / "adapter", **changes))
    torch.cuda.set_per_process_memory_fraction(1.0)
    assert run.choices["device"].value == "cuda"
    assert [abs(a - b) < off for a, b in zip(run.losses, on_the_cpu.losses, strict=True)] == [True] * 6
    assert run.held_out_loss == pytest.approx(on_the_cpu.held_out_loss, abs=off)
    assert run.losses[-1] < run.losses[0] - 0.5


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_a_run_goes_on_where_it_was(settings, tmp_path, optimizer):
    if optimizer == "adamw8bit":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes, the extra `cuda`, is not installed")
    from edgelora.training.interrupt import Stopped

    def config(name, **changes):
        return settings(tmp_path / name, optimizer=optimizer, dtype="f32", save_every=1, **changes)

    whole_config = config("whole")
    whole = run_training(whole_config)
    with pytest.raises(Stopped):
        run_training(config("parts"), stop_when=lambda progress: progress.step == 3)
    parts = run_training(config("parts", resume=True))
    assert parts.losses == pytest.approx(whole.losses, abs=1e-4)
    layers = open_base(whole_config.base).layers
    one, two = (read_adapter(tmp_path / name, layers).tensors for name in ("whole", "parts"))
    for module, tensors in one.items():
        for name, tensor in tensors.items():
            assert off_by(torch.from_numpy(two[module][name]), torch.from_numpy(tensor)) < 1e-2
    assert read_metrics(tmp_path / "parts.run" / "metrics.jsonl")[-1].step == 6


def test_paged_moments_are_put_back_bit_for_bit(settings):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes, the extra `cuda`, is not installed")
    config = settings(Path("none"), optimizer="adamw8bit")

    def optimizer():
        parameters = {
            f"p{n}": torch.nn.Parameter(drawn(n, 64, seed=n).cuda()) for n in (2, 4096)
        }  # the small are not paged
        return parameters, build_optimizer(parameters.items(), config)

    def step(parameters, how, seed):
        for parameter in parameters.values():
            parameter.grad = drawn(*parameter.shape, seed=seed).cuda()
        how.step()

    (ours, one), (theirs, two) = optimizer(), optimizer()
    assert one.is_paged
    step(ours, one, 1)
    for name in ours:
        theirs[name].data.copy_(ours[name].data)
    load_state(two, {name: tensor.cpu() for name, tensor in flatten_state(one).items()})
    step(ours, one, 2)
    step(theirs, two, 2)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert all(getattr(state["state1"], "is_paged", False) for p, state in two.state.items() if p.numel() > 1e5)


def test_moments_that_travel_are_those_that_stay(settings, monkeypatch):
    """Several pieces and two groups, a step without a gradient, and a state that is kept and put back."""
    monkeypatch.setattr("edgelora.training.offloaded_adamw.PIECE", 5000)
    changes = {"method": "loraplus", "loraplus_ratio": 4.0, "weight_decay": 0.1, "recompute": "full"}

    def built(offload):
        drawn_ones = (drawn(40 if n else 400, 50 + n, seed=n).cuda() for n in range(9))
        parameters = {f"l{n}.lora_{'AB'[n % 2]}": torch.nn.Parameter(one) for n, one in enumerate(drawn_ones)}
        return parameters, build_optimizer(parameters.items(), settings(Path("none"), offload=offload, **changes))

    (stays, one), (travels, two) = built(False), built(True)
    for step in range(5):
        for parameters, optimizer in ((stays, one), (travels, two)):
            for n, parameter in enumerate(parameters.values()):
                parameter.grad = None if (n, step) == (3, 1) else drawn(*parameter.shape, seed=100 * step + n).cuda()
            optimizer.step()
        if step == 2:
            kept = {name: tensor.cpu().clone() for name, tensor in flatten_state(two).items()}
            assert all(torch.equal(tensor.cpu(), kept[name]) for name, tensor in flatten_state(one).items())
            load_state(two, kept)
    assert len(two._pieces) > 3
    assert all(torch.equal(stays[name], travels[name]) for name in stays)


# -- the memory plan

SHAPE = {
    "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 16,
    "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 32768, "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip


def random_blocks(shape, kind):
    few = ggml.quantize((drawn(16, shape[1]) * 0.03).numpy(), kind)
    return GGUFBlocks(few.repeat(shape[0] // 16, 0), kind, shape[1])


def built(config, kind):
    """On the card, as `build_decoder` does it."""
    matrices, vectors = {}, {}
    for name, shape in tensor_shapes(ARCHITECTURES["llama"], config).items():
        if len(shape) == 1:
            vectors[name] = torch.ones(shape).cuda()
        else:
            weight = random_blocks(shape, kind)
            on_host = name.startswith(EMBEDDING)
            matrices[name.removesuffix(".weight")] = HostRows(weight) if on_host else weight.to("cuda")
    embedding, head = matrices.pop(EMBEDDING), matrices.pop(HEAD)
    return Decoder(ARCHITECTURES["llama"], config, Frozen(matrices, vectors, embedding, head, torch.bfloat16))


def cublas_memory():
    """What cuBLAS takes for a stream, of each thread that launches there: it is the process's, not a step's."""
    before = torch.cuda.memory_allocated()
    x = torch.ones(64, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    torch.autograd.backward((x @ x).sum())
    x.grad = x = None
    return torch.cuda.memory_allocated() - before


@pytest.mark.parametrize("graphs", [False, True], ids=["launched", "recorded"])
@pytest.mark.parametrize(("recompute", "offload"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("kind", [Type.Q4_K, Type.Q8_0], ids=lambda kind: kind.name)
def test_the_plan_is_what_a_step_takes(settings, kind, recompute, offload, graphs):
    needs_triton()
    config, n = ModelConfig(model_type="llama", rope=Rope(10000.0, 64), **SHAPE), 2048
    settled = settings(Path("none"), rank=16, alpha=32.0, dtype="bf16", base_dtype="blocks", offload=offload)
    planned = footprint(
        Model.stored_as(ARCHITECTURES["llama"], config, kind), settled, Load(n, n, recompute, graphs), "cuda", process=0
    )
    torch.ones(64, 64, device="cuda", dtype=torch.bfloat16) @ torch.ones(64, 64, device="cuda", dtype=torch.bfloat16)
    gc.collect()
    before = torch.cuda.memory_allocated()
    decoder = built(config, kind)
    inject(decoder, "lora", 16, 32.0, 0)
    decoder.cuda()
    decoder.recompute, decoder.offload = recompute, offload
    optimizer = build_optimizer(decoder.named_parameters(), settled)
    ids = torch.randint(32768, (n,), generator=torch.Generator().manual_seed(0)).cuda()
    if graphs:
        decoder.record_passes(n)
    rows = [[0, n]] * (OFTEN + 1) * graphs + [[*range(0, n, 100), n]] * 2  # the last ones are launched
    with decoder.running():
        before += cublas_memory()
        for starts in rows:
            torch.cuda.reset_peak_memory_stats()
            positions = torch.cat([torch.arange(b - a) for a, b in itertools.pairwise(starts)]).cuda()
            hidden = decoder(ids, positions, starts)
            torch.autograd.backward(decoder.nll(hidden[:-1], ids[1:]).mean())
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    taken = torch.cuda.max_memory_allocated() - before
    if graphs:  # what is held for recorded passes is not counted as in use, but for what the loss has of it
        assert decoder.graphs.count == 1
        taken += sum(segment["total_size"] for segment in torch.cuda.memory_snapshot(decoder.graphs.pool.id))
    print(f"planned {planned.total / 1e6:.0f} MB ({planned.in_words()}), taken {taken / 1e6:.0f}")
    if graphs and offload:  # counted twice, and torch does not say what a pool has at the peak
        assert taken - planned.logits - planned.scratch < 1.15 * planned.total
    else:
        assert taken == pytest.approx(planned.total, rel=0.1)
