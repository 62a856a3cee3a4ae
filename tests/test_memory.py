"""The memory plan: every part against what torch really holds, choices against what is there, refusals."""

from __future__ import annotations

import gc
import importlib.util
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from gguf.constants import GGMLQuantizationType as Type
from test_architectures import family  # noqa: F401  (a fixture)
from test_distributed import world_of
from test_recompute import ROW, Storages, adapted, held
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

from edgelora.base.decoder import build_decoder
from edgelora.base.hold import BASE_FORMATS
from edgelora.base.model import open_base
from edgelora.config import TrainConfig
from edgelora.errors import ConfigError
from edgelora.kernels import load
from edgelora.peft.inject import kept_beside
from edgelora.peft.methods import METHODS
from edgelora.training import exhausted, loop, settle
from edgelora.training.adapter_footprint import adapter_numbers
from edgelora.training.base_footprint import Model, base_bytes, held_bytes
from edgelora.training.exhausted import explained
from edgelora.training.footprint import LOST, Load, activation_bytes, attention_buffers, footprint, kept_by_a_layer
from edgelora.training.memory import SHARE, SIZES, Machine, over_rows, plan
from edgelora.training.optim import build_optimizer, flatten_state
from edgelora.training.run import run_training
from edgelora.training.sharding import frozen, shard
from edgelora.training.unused import refuse_unused

GB = 10**9
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


def settled(base=Path("base"), **given):
    given = {"rank": 4, "alpha": 8.0, "learning_rate": 1e-3, "dtype": "f32", "base_dtype": "blocks", **given}
    return TrainConfig(base=base, data=base, out=Path("out"), **given)


# -- parts against what there is ----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", BASE_FORMATS)
def test_a_base_takes_what_its_weights_say(make_tiny, how):
    base = open_base(make_tiny(Type.Q8_0).path)
    decoder, model = build_decoder(base, how), Model.of(base)
    for name, linear in decoder.linears.items():
        shape, kind = model.matrices[f"{name}.weight"]
        assert held_bytes(shape, kind, how) == pytest.approx(linear.weight.size_bytes, rel=0.01)
    weights = sum(linear.weight.size_bytes for linear in decoder.linears.values()) + decoder.head.size_bytes
    assert base_bytes(model, how) == pytest.approx(weights + sum(b.nbytes for b in decoder.buffers()), rel=0.01)


@pytest.mark.parametrize("optimizer", ["adamw", "lion", "adafactor"])
@pytest.mark.parametrize(
    ("targets", "method"),
    [
        *(((), name) for name, row in METHODS.items() if not row.rows),
        *((("q_proj", "down_proj"), n) for n, row in METHODS.items() if row.linears),
    ],
)
def test_an_adapter_and_its_optimizer_take_what_torch_holds(tiny, method, optimizer, targets):
    base = open_base(tiny.path)
    config = settled(method=method, optimizer=optimizer, target_modules=targets, rank=4)
    decoder = adapted(base, method=method, targets=targets)
    numbers = adapter_numbers(Model.of(base), config)
    assert numbers == sum(p.numel() for p in decoder.parameters())
    state = build_optimizer(decoder.named_parameters(), config)
    for parameter in decoder.parameters():
        parameter.grad = torch.ones_like(parameter)
    state.step()
    held_by_it = sum(t.nbytes for t in flatten_state(state).values())
    parts = footprint(Model.of(base), config, Load(64, 64, False))
    assert parts.gradients == 4 * numbers <= parts.adapter
    assert sum(tensor.nbytes for tensor in kept_beside(decoder).values()) <= parts.adapter - parts.gradients
    assert parts.optimizer <= held_by_it <= parts.optimizer + 8 * len(list(decoder.parameters()))  # and a step number


@pytest.mark.parametrize("how", ["blocks", "nf4", "bf16"])
@pytest.mark.parametrize("processes", [2, 5])
def test_a_dealt_out_base_takes_its_share_and_one_layer(make_tiny, how, processes):
    """What a process keeps of the layers, the buffer in which one is put together, and all that stays whole."""
    base = open_base(make_tiny(Type.Q8_0).path)
    decoder, world = build_decoder(base, how), world_of(0, processes)
    whole = decoder.head.size_bytes + sum(buffer.nbytes for buffer in decoder.buffers())
    layer = max(sum(weight.size_bytes for weight in frozen(layer)) for layer in decoder.model.layers)
    kept = shard(decoder, world)
    counted = base_bytes(replace(Model.of(base), shares=processes), how)
    assert counted == pytest.approx(whole + kept + layer, rel=0.01)
    assert counted < base_bytes(Model.of(base), how) or processes == 2  # of its two layers one is in the buffer


LONG = 768
FAMILIES = ["llama", "gemma2", "gemma3_text", "qwen3", "phi3", "olmo2", "granite", "mixtral"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FAMILIES)
def test_activations_are_what_the_graph_holds(family, name, dtype):  # noqa: F811
    """Bytes for each token and layer, counted from dimensions and counted in storages that are alive."""
    base = open_base(family(name).folder)
    decoder = adapted(base, DTYPES[dtype])
    gc.collect()
    c, n = base.config, len(ROW)
    found = held(decoder, recompute=False)
    # beside the layers: hidden states at the end, what the final norm keeps, rotary tables
    ends = 4 * n * (2 * c.hidden_size + 2 * c.rope.dim)
    layers = c.num_hidden_layers * n * kept_by_a_layer(Model.of(base), settled(base.path, dtype=dtype))
    assert layers == pytest.approx(found, rel=0.1, abs=ends)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", ["layernorm", "longlora", "full"])
def test_activations_under_trained_norms(tiny, method, dtype):
    """Such a norm keeps its input, and lets what it gives go."""
    base = open_base(tiny.path)
    decoder = adapted(base, DTYPES[dtype], method=method, how="f32")
    gc.collect()
    c, n = base.config, len(ROW)
    ends = 4 * n * (2 * c.hidden_size + 2 * c.rope.dim)
    kept = kept_by_a_layer(Model.of(base), settled(base.path, dtype=dtype, method=method, base_dtype="f32"))
    assert c.num_hidden_layers * n * kept == pytest.approx(held(decoder, recompute=False), rel=0.1, abs=ends)


def test_dora_keeps_more(tiny):
    base = open_base(tiny.path)
    lora, dora = (held(adapted(base, method=m), recompute=False) for m in ("lora", "dora"))
    model = Model.of(base)
    counted = kept_by_a_layer(model, settled(method="dora")) - kept_by_a_layer(model, settled())
    assert 2 * len(ROW) * counted == pytest.approx(dora - lora, rel=0.1)


def test_what_is_computed_again_keeps_its_input(tiny):
    base = open_base(tiny.path)
    decoder, stream = adapted(base), 4 * 256
    saved = held(decoder, recompute=False) - held(decoder, recompute=True)
    counted = 2 * len(ROW) * (kept_by_a_layer(Model.of(base), settled()) - stream)
    assert counted == pytest.approx(saved, rel=0.05)


def test_offloaded_inputs_are_not_on_the_card(tiny):
    model, load = Model.of(open_base(tiny.path)), Load(512, 128, True)
    kept, moved = activation_bytes(model, settled(offload=True, recompute="full"), load, "cuda")
    assert moved == 2 * 512 * 256 * 4
    assert kept <= activation_bytes(model, settled(), load, "cuda")[0] - moved


@pytest.mark.skipif(load.library() is None, reason="the C code of kernels/ was not compiled")
@pytest.mark.parametrize("threads", [1, 8])
def test_compiled_attention_has_the_memory_it_says(tiny, threads):
    """What nn/flash.py asks for: each thread's room, and 2 (threads + KV − 1) parts of gradients (T, d)."""
    model, row = replace(Model.of(open_base(tiny.path)), threads=threads), Load(2048, 1000, False)
    c = model.config
    room = threads * load.library().attention_scratch(row.longest, c.head_dim)
    parts = 2 * (threads + c.num_key_value_heads - 1) * row.tokens * c.head_dim
    assert attention_buffers(model, row, "cpu") == pytest.approx(4 * (room + parts), rel=0.05)


class Peak(TorchDispatchMode):
    """The most bytes that were alive at once, of storages that operations made while this was on."""

    def __init__(self):
        super().__init__()
        self.made, self.most = Storages(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = self.made.__torch_dispatch__(func, types, args, kwargs)
        self.most = max(self.most, self.made.alive())
        return out


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "torch"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3", "qwen3"])
def test_a_step_takes_what_is_counted(family, monkeypatch, name, dtype, compiled):  # noqa: F811
    """The peak of a forward and a backward pass, counted from dimensions and counted in storages that are alive."""
    if not compiled:
        monkeypatch.setattr(load, "library", lambda: None)
    monkeypatch.setitem(LOST, "cpu", {"f32": 0.0, "bf16": 0.0})  # what lies between storages is no storage
    base = open_base(family(name).folder)
    decoder = adapted(base, DTYPES[dtype])
    ids = torch.arange(LONG) % base.config.vocab_size

    def step():
        decoder.nll(decoder(ids, torch.arange(LONG), [0, LONG // 2, LONG]), ids).mean().backward()

    step()  # gradients, and buffers that stay
    with Peak() as found:
        step()
    model, row = Model.of(base), Load(LONG, LONG // 2, False)
    counted = activation_bytes(model, settled(base.path, dtype=dtype), row, "cpu")[0]
    assert counted == pytest.approx(found.most, rel=0.2)


# -- choices ------------------------------------------------------------------------------------------------------


@pytest.fixture
def model(make_tiny):
    return Model.of(open_base(make_tiny(Type.Q8_0).path))


def total(model, config, load, process=0):
    return footprint(model, config, load, "cpu", process).total


def test_with_room_the_smallest_fast_micro_batch_is_taken(model):
    found = plan(model, settled(), Machine("cpu", 64 * GB, 0), 2048)
    assert (found.config.micro_batch_tokens, found.config.recompute, found.config.max_length) == (768, "off", 2048)
    assert set(found.choices) == {"micro_batch_tokens", "recompute", "max_length"}
    assert "context" in found.choices["max_length"].why
    assert plan(model, settled(), Machine("cpu", None), 2048).config == found.config  # no figure: nothing to hold to


def test_less_memory_means_less_of_what_costs_least(model):
    """Smaller micro-batches first, then layers computed again, then both; what is planned always fits."""
    ways, last = [], None
    for budget in range(64 * GB // 100, 0, -GB // 500):
        try:
            found = plan(model, settled(), Machine("cpu", budget, 0), 2048)
        except ConfigError:
            break
        assert found.parts.total <= SHARE * budget
        assert found.at_max_length.total <= SHARE * budget
        way = (found.config.recompute, found.config.micro_batch_tokens)
        if way != last:
            ways.append(way)
        last = way
    assert ways[0] == ("off", SIZES["cpu"][0])
    assert ways == sorted(ways, key=lambda way: (way[0] == "full", -way[1]))
    assert ways[-1][0] == "full"


def test_what_is_asked_for_is_done_or_refused(model):
    asked = settled(micro_batch_tokens=1024, recompute="off", max_length=600)
    found = plan(model, asked, Machine("cpu", 4 * GB, 0), 2048)
    assert found.choices == {}
    assert found.config == asked
    room = total(model, asked, Load(1024, 1024, True))
    with pytest.raises(ConfigError) as caught:
        plan(model, asked, Machine("cpu", int(room / SHARE) + 1, 0), 2048)
    assert "a step over 1024 tokens takes" in caught.value.what
    assert "activations" in caught.value.why
    assert caught.value.fix == "pass --recompute full"


def test_a_length_beyond_the_context_is_cut_and_said(model):
    asked = settled(max_length=99_999)
    found = plan(model, asked, Machine("cpu", 4 * GB, 0), 2048)
    assert found.config.max_length == 2048
    assert found.choices["max_length"].value == "2048"
    assert found.choices["max_length"].why.startswith("99999 was asked for, and the base's context is 2048; ")
    assert "max_length" not in plan(model, settled(max_length=2048), Machine("cpu", 4 * GB, 0), 2048).choices


UNUSED = {
    "--patience 1 without --valid": {"patience": 1},
    "--keep-adapter best without --valid": {"keep_adapter": "best"},
    "--eval-every 2 without --valid or --samples": {"eval_every": 2},
    "--beta 0.2 with the objective sft": {"beta": 0.2},
    "--loraplus-ratio 4 with --method lora": {"loraplus_ratio": 4},
    "--update-proj-gap 50 with --method full": {"update_proj_gap": 50, "method": "full", "base_dtype": "f32"},
}
USED = [
    {"patience": 1, "eval_every": 2, "valid": "rows"}, {"eval_every": 2, "samples": ["Lock the door"]},
    {"objective": "dpo", "beta": 0.2}, {"method": "loraplus", "loraplus_ratio": 4},
    {"method": "galore", "update_proj_gap": 50}, {"beta": 0.1, "loraplus_ratio": 16},  # as --print-config writes it
]  # fmt: skip


@pytest.mark.parametrize(("what", "given"), UNUSED.items(), ids=UNUSED)
def test_a_setting_that_would_do_nothing_is_refused(tiny, what, given):
    with pytest.raises(ConfigError) as fault:
        settle.settle(settled(**given), tiny)
    assert fault.value.what == what
    assert "or leave it out" in fault.value.fix or fault.value.fix.startswith("leave it out")


@pytest.mark.parametrize("given", USED, ids=str)
def test_one_that_does_something_passes(given):
    refuse_unused(settled(**given))


def test_what_would_fit_fits(model):
    """The fix of a refusal is followed, and accepted."""
    asked = settled(rank=64, micro_batch_tokens=2048, recompute="off")
    followed = 0
    for budget in range(5 * GB // 10, GB // 10, -GB // 100):
        machine = Machine("cpu", budget, 0)
        try:
            plan(model, asked, machine, 2048)
        except ConfigError as e:
            if not e.fix.startswith("pass"):
                continue
            words = e.fix.removeprefix("pass ").split()
            names = [word[2:].replace("-", "_") for word in words[::2]]
            changed = TrainConfig.model_validate({**asked.model_dump(), **dict(zip(names, words[1::2], strict=True))})
            plan(model, changed, machine, 2048)
            followed += 1
    assert followed > 3


def test_the_longest_row_is_one_by_itself(model):
    machine = Machine("cpu", 1 * GB, 0)
    found = plan(model, settled(), machine, 100_000)
    length = found.config.max_length
    assert found.config.micro_batch_tokens < length < 100_000
    again = found.config.recompute == "full"
    assert total(model, found.config, Load(length, length, again)) <= SHARE * GB
    assert total(model, found.config, Load(length + 64, length + 64, again)) > SHARE * GB
    assert plan(model, settled(), machine, 100_000, longest=1100).load.tokens == 1100


@pytest.mark.parametrize(
    ("given", "device", "fix"),
    [({}, "cpu", "leave --offload out"), ({"recompute": "off"}, "cuda", "leave --recompute out")],
)
def test_offload_where_it_cannot_be(model, given, device, fix):
    with pytest.raises(ConfigError) as caught:
        plan(model, settled(offload=True, **given), Machine(device, 64 * GB), 2048)
    assert caught.value.fix.startswith(fix)


def test_offload_computes_again(model):
    found = plan(model, settled(offload=True), Machine("cuda", 64 * GB), 2048)
    assert found.config.recompute == "full"
    assert found.parts.offloaded > 0


# -- when it was not enough ---------------------------------------------------------------------------------------


def test_memory_that_runs_out_is_explained_by_the_plan(tiny, tmp_path, monkeypatch):
    """torch's own error, the numbers that were planned, and settings that take less and are a command's."""
    rows = tmp_path / "rows.jsonl"
    row = {"messages": [{"role": "user", "content": "lights"}, {"role": "assistant", "content": "on"}]}
    rows.write_text((json.dumps(row) + "\n") * 4, encoding="utf-8")
    config = TrainConfig(base=tiny.path, data=rows, out=tmp_path / "mine", rank=4, recompute="off", batch_rows=2)
    monkeypatch.setattr(loop, "mean_losses", lambda *_, **__: iter([torch.empty(1 << 60, dtype=torch.uint8)]))
    with pytest.raises(ConfigError) as caught:
        run_training(config)
    assert "there was not enough memory for a step (" in caught.value.what
    assert "allocate memory" in caught.value.what
    assert re.match(
        r"the plan reckoned with 0\.\d\d GB for 768 tokens \(in MB: process \d+, base \d+", caught.value.why
    )
    way = re.fullmatch(
        r"free some memory and go on with --resume, or begin anew with what takes less: pass (--.*) --overwrite",
        caught.value.fix,
    )
    words = way[1].split()
    changes = dict(zip((word[2:].replace("-", "_") for word in words[::2]), words[1::2], strict=True))
    model, less = Model.of(open_base(tiny.path)), TrainConfig.model_validate(config.model_dump() | changes)
    monkeypatch.undo()
    n = less.micro_batch_tokens or 768
    before, after = (total(model, settled(recompute=how), Load(m, m, how == "full"))
                     for how, m in (("off", 768), (less.recompute, n)))  # fmt: skip
    assert after < before


@pytest.mark.parametrize(
    "said",
    [
        "MPS backend out of memory (MPS allocated: 20.14 GiB). Tried to allocate 6.00 KiB on private pool.",
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory",
    ],
)
def test_memory_is_what_ran_out_however_a_device_says_it(monkeypatch, said):
    monkeypatch.setattr(exhausted, "_exhausted", lambda *given: ConfigError(given[3], "", ""))
    with pytest.raises(ConfigError) as caught, explained(None, None, 0):
        raise RuntimeError(said)
    assert caught.value.what == said.splitlines()[0]


def test_an_error_that_is_not_of_memory_is_left_as_it_is():
    with pytest.raises(RuntimeError, match="shapes do not match"), explained(None, None, 0):
        raise RuntimeError("shapes do not match")


# -- the command --------------------------------------------------------------------------------------------------


def run(*arguments):
    import typer

    from edgelora.cli.plan import plan as command

    app = typer.Typer()
    app.command()(command)
    return CliRunner().invoke(app, [*map(str, arguments)])


def test_the_command_tells_choices_parts_and_time(tiny, tmp_path):
    rows = tmp_path / "rows.jsonl"
    row = {"messages": [{"role": "user", "content": "lights"}, {"role": "assistant", "content": "on"}]}
    rows.write_text((json.dumps(row) + "\n") * 12, encoding="utf-8")
    done = run(tiny.path, rows, "--rank", 4, "--batch-rows", 2, "--memory", "8GB")
    assert done.exit_code == 0, done.output
    for part in ("micro batch tokens", "activations", "peak, ", "8.00 GB", "12 steps of"):
        assert part in done.output
    found = json.loads(run(tiny.path, rows, "--json", "--batch-rows", 2).stdout)
    assert (found["time"]["steps"], found["time"]["rows"]) == (12, 12)
    assert sum(found["bytes"].values()) == found["peak_bytes"]
    assert list(tmp_path.iterdir()) == [rows]  # nothing is left behind


def test_the_command_plans_one_of_several_processes(tiny):
    def told(*more):
        return json.loads(run(tiny.path, "--memory", "8GB", "--json", "--base-dtype", "f32", *more).stdout)

    alone, whole, shared = told(), told("--processes", 4), told("--processes", 4, "--shard-base")
    assert whole["bytes"]["base"] == alone["bytes"]["base"] > shared["bytes"]["base"]
    # two layers of the same size: a quarter of each and one whole in the buffer, instead of both
    assert alone["bytes"]["base"] - shared["bytes"]["base"] == pytest.approx(
        0.25 * sum(4 * d_out * d_in for d_out, d_in in tiny.linears.values()), rel=1e-3
    )


def test_processes_of_one_machine_share_its_memory(monkeypatch):
    monkeypatch.setattr(settle, "free_memory_bytes", lambda: 8 * GB)
    monkeypatch.setattr(settle, "resident_bytes", lambda: GB)
    assert [settle.machine_of("cpu", None, n).budget for n in (1, 4)] == [9 * GB, 3 * GB]
    assert settle.machine_of("cpu", 5 * GB, 4).budget == 5 * GB


def test_the_command_refuses_what_does_not_fit(tiny):
    done = run(tiny.path, "--memory", "200MB")
    assert isinstance(done.exception, ConfigError)


def test_of_rows_that_are_known_a_plan_has_the_largest_micro_batch(tiny):
    model = Model.of(open_base(tiny.path))
    found = plan(model, settled(rank=4, device="cpu"), Machine("cpu", GB), 4096)
    assert found.load.tokens == 768
    over = over_rows(found, model, load := Load(110, 60, False))
    whole = footprint(model, found.config, load)
    assert (over.load, over.parts.activations) == (load, whole.activations)
    assert over.parts.total - whole.total == found.parts.process - whole.process
    assert over.choices["micro_batch_tokens"].value == "768"
    assert over.choices["micro_batch_tokens"].why.startswith(f"a step takes {over.parts.total / 1e9:.2f} GB of 1.0 GB")


def test_every_recorded_peak_is_within_a_tenth_of_its_plan():
    cases = json.loads((ROOT / "benchmarks" / "results" / "memory.json").read_text(encoding="utf-8"))["cases"]
    assert len(cases) >= 6
    assert all(case["error"] == case["planned"] / case["measured"] - 1 for case in cases)
    assert max(abs(case["error"]) for case in cases) <= 0.1


def test_the_table_of_what_fits_is_fresh(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    spec = importlib.util.spec_from_file_location("memory_table", ROOT / "benchmarks" / "memory_table.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # a NamedTuple looks its module up
    spec.loader.exec_module(module)
    written = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    assert module.document() == written, "run: python benchmarks/memory_table.py"
