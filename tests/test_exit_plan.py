"""The planner over the whole table of methods and kinds of bases, and the ways that it leads to."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from example_runs import example_rows
from gguf.constants import GGMLQuantizationType as Type
from merging import as_a_lora
from safetensors.numpy import save_file
from same_tokens import IDS
from test_export import make_adapter as make_a_lora
from test_vectors import FAMILIES, family, trained

from converters.adapter_to_gguf import write_adapter_gguf
from converters.exit_facts import AdapterFacts, facts_of_adapter, facts_of_base
from converters.exit_plan import DOORS, plan_exit
from converters.exit_words import CONVERT, OF_Q8_0
from converters.merge import Part
from converters.pair_types import stored
from converters.patch import plan_patch, write_patched, write_rest
from converters.scaled_rows import SCALES
from converters.svd import nearest_lora
from edgelora.base import ggml
from edgelora.base.decoder import build_decoder
from edgelora.base.model import open_base
from edgelora.cli import run
from edgelora.errors import AdapterError, BaseModelError, ExportError
from edgelora.evaluate.fidelity import Fidelity, fidelity
from edgelora.evaluate.thresholds import FLOATS
from edgelora.files.adapter_check import contract_of
from edgelora.files.contract import CERTIFICATE_BYTES
from edgelora.files.gguf import GGUFFile
from edgelora.peft.adapter import CONFIG, MAGNITUDE, TENSORS, Adapter, write_adapter
from edgelora.peft.inject import adapter_config, attach, collect, inject
from edgelora.peft.lora_config import as_lora
from edgelora.peft.methods import METHODS
from edgelora.peft.soft_prompt import SAVED
from edgelora.pipeline.exit_plan import plan, rounded, taken_in_words, through
from edgelora.pipeline.export import Certificate, ExportOptions, export
from edgelora.pipeline.methods import what_comes_next
from edgelora.pipeline.patch import patch
from edgelora.pipeline.svd_export import SvdCertificate, SvdOptions, export_svd
from edgelora.words import size
from runtime.scorer import ScoringEngine

LAYERED = [name for name, row in METHODS.items() if row.linears or row.norms]
__all__ = ["family"]


@pytest.fixture(scope="module")
def base(tiny):
    return open_base(tiny.path)


@pytest.fixture(scope="module")
def bases(base, make_tiny):
    """Facts of bases of every kind: as they are, as a checkpoint, and as if their matrices were of another type."""
    own = facts_of_base(base)

    def of(kind):
        return replace(own, quant=kind.name, types={
            name: kind if len(own.shapes[name]) == 2 else Type.F32 for name in own.types
        })  # fmt: skip

    return {
        "F32": own, "untied": facts_of_base(open_base(make_tiny(tied=False).path)),
        "checkpoint": replace(own, types={}),
        **{kind.name: of(kind) for kind in (Type.F16, Type.BF16, Type.Q4_0, Type.Q4_K, Type.Q6_K, Type.IQ1_M)},
    }  # fmt: skip


@pytest.fixture(scope="module")
def facts(base):
    return {name: facts_of_adapter(trained(base, name)[1], base) for name in LAYERED}


# -- the table ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", LAYERED)
def test_every_method_leaves_by_the_first_of_its_doors_that_is_exact(facts, bases, method):
    doors = METHODS[method].exits
    for name, base in bases.items():
        found = plan_exit(facts[method], base)
        open_doors = [door for door in doors if not (door == "patched" and name == "checkpoint")]
        assert set(open_doors) <= set(found.open), name
        assert found.door == (open_doors[0] if open_doors else "refused"), name
        assert found.exact == (bool(doors) and (found.door != "merged" or base.floats)), name
        assert found.hot_swappable == (found.door == "adapter")
        assert (found.expected_error is None) == (not found.exact)
        assert {*found.others, found.door} == {*DOORS, found.door}
        assert found.why
        assert all(found.others.values())


@pytest.mark.parametrize("kind", [*SCALES, Type.IQ1_M, Type.MXFP4], ids=lambda kind: kind.name)
def test_types_without_a_float16_scale_become_f16_in_a_patched_base(facts, bases, kind):
    own = bases["F32"]
    base = replace(own, types={n: kind if n.endswith("attn_k.weight") else Type.F16 for n in own.types})
    found, plain = plan_exit(facts["ia3"], base), plan_exit(facts["ia3"], bases["F16"])
    assert found.door == "patched"
    wide = kind not in SCALES
    assert bool(found.notes) == wide
    assert (found.size_bytes > own.size_bytes) == wide
    assert found.expected_error == plain.expected_error == 2.0**-11


@pytest.mark.parametrize("method", ["ia3", "dora"])
def test_a_measured_plan_is_of_what_is_written(make_tiny, tmp_path, method):
    """Q6_K's scales may be too small to take up a factor: such tensors become F16, which only measuring tells."""
    path = make_tiny(Type.Q6_K).path
    base = open_base(path)
    _, adapter = trained(base, method)
    adapter.tensors["model.layers.0.self_attn.k_proj"][{"ia3": "ia3_l", "dora": MAGNITUDE}[method]][:] *= 0.01
    write_adapter(tmp_path / "mine", adapter)
    by_type, measured = (
        plan(path, tmp_path / "mine", allow_unverified=True, measure=measure) for measure in (False, True)
    )
    patches = plan_patch(base, adapter)
    write_patched(tmp_path / "patched.gguf", base, patches, Part(adapter, 1.0, "0" * 64, "mine"))
    write_rest(tmp_path / "rest.gguf", base, patches, "rest", None)
    written, rest, own = (GGUFFile(one) for one in (tmp_path / "patched.gguf", tmp_path / "rest.gguf", path))
    sizes = [sum(info.size_bytes for info in file.tensors.values()) for file in (written, rest, own)]
    assert measured.size_bytes == path.stat().st_size + sizes[0] + sizes[1] - sizes[2]
    widened = [name for name, one in patches.patches.items() if one.kind != Type.Q6_K]
    assert widened == ["blk.0.attn_k.weight"]
    assert measured.size_bytes > by_type.size_bytes
    assert by_type.expected_error == 2.0**-11
    assert measured.expected_error == patches.error
    assert (patches.error > 2.0**-11) == (method == "dora")
    (note,) = (note for note in measured.notes if "F16" in note)
    assert note.startswith("1 tensor (blk.0.attn_k.weight) became F16: scales of blocks there ")


def test_what_a_family_has_no_bias_for_is_refused_with_the_reason(facts, bases):
    base = replace(bases["F32"], loaded_biases=frozenset({"self_attn.q_proj"}))
    found = plan_exit(facts["bitfit"], base)
    assert found.door == "refused"
    assert found.why.startswith("llama.cpp loads no bias for mlp.down_proj, mlp.gate_proj")
    assert "--target-modules" in found.notes[0]
    only = replace(facts["bitfit"], biases=frozenset({"self_attn.q_proj"}))
    assert plan_exit(only, base).door == "patched"


def test_a_row_of_a_tied_embedding_is_no_adapter(bases):
    """Such a file aborts the process that loads it."""
    tokens = AdapterFacts("a LoRA with token rows", token_rows={"token_embd.weight": 2})
    found = plan_exit(tokens, bases["F32"])
    assert "adapter" not in found.open
    assert "edgelora untie" in found.others["adapter"]
    assert plan_exit(tokens, bases["untied"]).door == "adapter"
    coarse = plan_exit(tokens, bases["Q4_0"])
    with pytest.raises(ExportError) as refused:
        through(coarse, None, Path("mine"))
    assert refused.value.fix.startswith("`edgelora untie BASE --out FILE` gives this base a head of its own")
    assert refused.value.fix.split("; or ")[1].startswith("pass --door merged")
    assert "--door merged --type F16 for one that rounds once" in refused.value.fix


def test_the_reason_of_a_patched_base_names_what_the_adapter_has(facts, bases):
    for method, kind, why in (
        ("ia3", "Q4_0", "factors of rows go into the scales of blocks"), ("ia3", "F16", "factors of rows go into the "
        "weights"), ("bitfit", "Q4_0", "biases are floats"), ("layernorm", "Q4_0", "norms are floats"),
    ):  # fmt: skip
        assert plan_exit(facts[method], bases[kind]).why == f"{why}, and nothing is quantized again"


def test_a_prompt_leaves_as_one_and_by_no_other_door(bases):
    found = plan_exit(AdapterFacts("a soft prompt", prompt_numbers=20 * 256), bases["Q4_K"])
    assert (found.door, found.size_bytes, set(found.open)) == ("soft prompt", 4 * 20 * 256, {"soft prompt"})


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0"])
def test_size_and_error_are_those_of_the_file(base, facts, tmp_path, kind):
    _, adapter = trained(base, "lora")
    write_adapter_gguf(tmp_path / "a.gguf", adapter, base, "a", kind)
    found, file = plan_exit(facts["lora"], facts_of_base(base), kind), GGUFFile(tmp_path / "a.gguf")
    assert sum(info.size_bytes for info in file.tensors.values()) == found.size_bytes
    for name, info in file.tensors.items():
        target, _, half = name.rpartition(".")
        written = ggml.dequantize(file.rows(name), info.type, info.shape[-1])
        module = next(m for m in adapter.linears if base.tensor_of(m) == target)
        if half == "lora_a":
            wanted = adapter.pair(module).a
            sizes = np.abs(wanted).reshape(-1, 32)
            largest = sizes.max(1, keepdims=True) if info.type == Type.Q8_0 else sizes
            apart = np.abs(written - wanted).reshape(sizes.shape)
            # Q8_0's scale is a float16 itself, rounded once: 127 times 2⁻¹¹ of half a step more
            assert (apart <= (1 + 0.13 * (info.type == Type.Q8_0)) * found.expected_error * largest).all()


# -- Q8_0 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [4, 32])
def test_llama_cpp_computes_a_q8_0_lora_nearly_as_torch_does(base, tmp_path, rank):
    adapter = make_a_lora(base, rank=rank)
    write_adapter_gguf(tmp_path / "a.gguf", adapter, base, "a", "Q8_0")
    kinds = {(name[-1], info.type) for name, info in GGUFFile(tmp_path / "a.gguf").tensors.items()}
    assert kinds == {("a", Type.Q8_0), ("b", Type.Q8_0 if rank == 32 else Type.F16)}
    decoder = build_decoder(base)
    attach(decoder, adapter)
    with ScoringEngine(base, n_ctx=64, threads=1) as engine:
        engine.load("a", tmp_path / "a.gguf", allow_unverified=True)
        engine.use({"a": 1.0})
        theirs = engine.logits([IDS.tolist()], [list(range(len(IDS)))])
    found = fidelity([(decoder.logits(IDS).numpy(), theirs)])
    assert 0 < found.kl_mean <= 2e-3
    assert fidelity([(build_decoder(base).logits(IDS).numpy(), theirs)]).kl_mean > 20 * found.kl_mean


def test_what_rounding_does_is_said_of_what_is_stored(bases, facts):
    """Scales of blocks, not the weights that come of them; and of Q8_0 not each number's own size."""
    for base, dtype, said in (
        ("Q4_K", "F16", "rounding moves what is stored by at most 0.00049 of its size"),
        ("Q4_K", "Q8_0", "rounding moves what is stored by at most 0.0039 of its size"),
    ):
        found = plan_exit(facts["lora" if dtype == "Q8_0" else "ia3"], bases[base], dtype)
        lines = list(taken_in_words(found))
        assert said in lines[1]
        assert (OF_Q8_0 in lines) == (dtype == "Q8_0")
    assert "nothing is rounded" in list(taken_in_words(plan_exit(facts["bitfit"], bases["Q4_K"])))[1]
    assert rounded(0.0) == "rounding moves no weight"
    assert (size(46_080), size(144_810_000), size(999_999)) == ("46.1 kB", "144.8 MB", "1.0 MB")


def test_a_value_beyond_a_type_is_refused_by_name():
    for kind, most in ((Type.F16, 7e4), (Type.Q8_0, 1e7)):
        with pytest.raises(ExportError, match=f"blk: a value of the adapter does not fit into {kind.name}"):
            stored(np.full((1, 32), most, np.float32), kind, "blk")


# -- through the doors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_llama_cpp_computes_a_lora_of_each_family(family, tmp_path, name):
    base = open_base(family(name).gguf)
    decoder, adapter = trained(base, "lora")
    found = as_a_lora(base, adapter, tmp_path / "a.gguf", IDS, decoder.logits(IDS))
    assert found.kl_mean <= 1e-4
    assert found.same_top == 1.0


def test_over_a_checkpoint_what_is_live_is_refused_before_the_work_and_leaves_over_its_gguf(family, tmp_path):
    """llama.cpp, which checks it, runs no checkpoint."""
    made, out = family("llama"), tmp_path / "a.gguf"
    trained(open_base(made.folder), "lora", folder=tmp_path / "mine")
    options = ExportOptions(allow_unverified=True)
    found = plan(made.folder, tmp_path / "mine", allow_unverified=True)
    assert (found.door, found.notes[0]) == ("adapter", CONVERT)
    for write in (
        lambda: export(made.folder, tmp_path / "mine", out, options),
        lambda: export_svd(made.folder, tmp_path / "mine", out, SvdOptions(1, options)),
    ):
        with pytest.raises(BaseModelError, match="a Hugging Face checkpoint, which llama"):
            write()
    assert plan(made.gguf, tmp_path / "mine", allow_unverified=True).notes == ()
    said = what_comes_next("lora", made.folder, tmp_path / "mine")
    assert f"convert {made.folder} --out {made.gguf} && " in said
    assert f"export {made.gguf} {tmp_path / 'mine'} --out {tmp_path / 'mine.gguf'}" in said
    assert "convert" not in what_comes_next("full", made.folder, tmp_path / "mine")
    assert "convert" not in what_comes_next("lora", made.gguf, tmp_path / "mine")


def prompt_folder(base, folder, kind, length=7):
    """A soft prompt of PEFT's with random numbers, as long as so many tokens."""
    c, draw = base.config, np.random.default_rng(0)
    width = c.hidden_size if kind == "PROMPT_TUNING" else 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim
    values = draw.normal(0, 0.3, (length, width)).astype(np.float32)
    folder.mkdir()
    save_file({SAVED: values}, folder / TENSORS)
    (folder / CONFIG).write_text(json.dumps({"peft_type": kind, "task_type": "CAUSAL_LM"}))
    return folder


def test_a_long_row_is_compared_behind_a_soft_prompt_as_far_as_it_fits(tiny, tmp_path):
    base, rows = open_base(tiny.path), tmp_path / "rows.jsonl"
    turns = [("user", "lights " * base.context), ("assistant", "off " * 40)]
    rows.write_text(json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]}), encoding="utf-8")
    options = ExportOptions(data=rows, allow_unverified=True)
    folder = prompt_folder(base, tmp_path / "long", "PROMPT_TUNING", base.context - 200)
    certificate = export(tiny.path, folder, tmp_path / "long.gguf", options)
    assert certificate.passed
    assert certificate.adapter.n_tokens > 40
    folder = prompt_folder(base, tmp_path / "full", "PROMPT_TUNING", base.context - 1)
    with pytest.raises(AdapterError, match="leave no room for a prompt and an answer"):
        export(tiny.path, folder, tmp_path / "full.gguf", options)


@pytest.mark.parametrize(
    ("kind", "name"),
    [("PROMPT_TUNING", "llama"), ("PROMPT_TUNING", "gemma3"), ("PREFIX_TUNING", "qwen2"), ("PREFIX_TUNING", "gemma3")],
)
def test_llama_cpp_computes_behind_a_soft_prompt_of_each_family(family, tmp_path, capsys, kind, name):
    path = family(name).gguf
    folder = prompt_folder(open_base(path), tmp_path / "it", kind)
    found = plan(path, folder, allow_unverified=True)
    if (kind, name) == ("PREFIX_TUNING", "gemma3"):  # whose layers see a window
        assert found.door == "refused"
        assert "--method prompt_tuning" in found.notes[0]
        return
    assert found.door == "soft prompt"
    words = [
        "export",
        str(path),
        str(folder),
        "--allow-unverified-base",
        "--type",
        "Q8_0",
        "--out",
        str(tmp_path / "x"),
    ]
    assert run(words) == 1
    assert "error: --type Q8_0 of a soft prompt" in capsys.readouterr().err
    apart = export(path, folder, tmp_path / "it.gguf", ExportOptions(allow_unverified=True)).adapter
    assert apart.kl_mean <= 1e-4
    assert apart.same_top == 1.0 or apart.worst_flip_nats <= FLOATS.flip_nats


@pytest.mark.real
def test_three_doors_of_the_real_base(smollm, tmp_path):
    """SmolLM2-135M at Q4_1: as near to torch with each as the bare base is."""
    base = open_base(smollm)
    options = ExportOptions(data=example_rows(tmp_path / "rows.jsonl", 0, 2), allow_unverified=True)
    for method, door, write in (("lora", "adapter", export), ("ia3", "patched", patch)):
        decoder = build_decoder(base)
        inject(decoder, method, 8, 16.0, seed=0)
        with torch.no_grad():
            for parameter in decoder.parameters():
                parameter += 0.02 * torch.rand(parameter.shape, generator=torch.Generator().manual_seed(1))
        folder = tmp_path / method
        write_adapter(folder, Adapter(adapter_config(decoder, method, 8, 16.0, str(smollm)), collect(decoder)))
        assert plan(smollm, folder, allow_unverified=True).door == door
        made = write(smollm, folder, tmp_path / f"{method}.gguf", options)
        assert getattr(made, "certificate", made).passed
    assert not export_svd(smollm, tmp_path / "ia3", tmp_path / "svd.gguf", SvdOptions(4, options)).faults
    folder = prompt_folder(base, tmp_path / "prompt", "PROMPT_TUNING")
    assert export(smollm, folder, tmp_path / "prompt.gguf", options).passed


@pytest.mark.parametrize(("method", "door"), [("dora", "patched"), ("full", "merged"), ("lora", "adapter")])
def test_the_first_exact_door_is_taken(base, tiny, tmp_path, capsys, method, door):
    trained(base, method, folder=tmp_path / "mine")
    words = ["export", str(tiny.path), str(tmp_path / "mine"), "--allow-unverified-base", "--json"]
    assert run([*words, "--plan"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["door"] == door
    if method == "dora":  # F32 over F32, but what is B A of it is F16
        assert told["expected_error"] == 2.0**-11
        assert told["notes"][-1] == "measured: rounding moves no weight"
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]  # nothing was written
    assert run([*words, "--out", str(tmp_path / "made.gguf")]) == 0
    said = capsys.readouterr()
    made = json.loads(said.out)
    assert made["door"] == door
    before, checked = said.err.index(told["why"]), said.err.index("checked on ")
    assert before < said.err.index(f"{size(told['size_bytes'])}, ") < checked
    assert all(json.dumps(note)[1:-1] in said.err for note in told["notes"] if not note.startswith("measured: "))
    assert (f"{tmp_path / 'made.lora.gguf'}, " in said.err) == (method == "dora")
    assert made["certificate"]["passed"]


def test_the_rest_of_a_dora_may_be_q8_0_too(base, tiny, tmp_path):
    trained(base, "dora", folder=tmp_path / "mine")
    made = patch(tiny.path, tmp_path / "mine", tmp_path / "made.gguf", ExportOptions("Q8_0", allow_unverified=True))
    assert made.certificate.passed
    assert made.certificate.kl_limit == 2e-3
    assert {info.type for name, info in GGUFFile(made.rest).tensors.items() if name.endswith("_a")} == {Type.Q8_0}


def test_the_plan_says_what_the_study_of_ways_says(make_tiny, tmp_path):
    """Of what was trained over another level alone."""
    path = make_tiny(Type.Q2_K).path
    base = open_base(path)
    for folder, quant, said in (("here", base.quant, False), ("elsewhere", "F16", True)):
        adapter = make_a_lora(base)
        contract = adapter.contract.model_copy(update={
            "base_file": adapter.contract.base_file.model_copy(update={"quant": quant})
        })  # fmt: skip
        write_adapter(tmp_path / folder, replace(adapter, contract=contract))
        found = plan(path, tmp_path / folder, allow_unverified=True)
        assert any("docs/which-way.md" in note for note in found.notes) == said


def test_what_is_not_exact_is_never_done_silently(make_tiny, tmp_path, capsys):
    model = make_tiny(Type.Q8_0)
    trained(open_base(model.path), "ia3", folder=tmp_path / "mine")
    words = ["export", str(model.path), str(tmp_path / "mine"), "--allow-unverified-base", "--out", str(tmp_path / "x")]
    assert run([*words, "--door", "adapter"]) == 1
    assert capsys.readouterr().err.splitlines()[-3:] == [
        f"error: {tmp_path / 'mine'}: it cannot leave as adapter",
        "  why: llama.cpp adds B A x to W x and nothing else, and an IA3 multiplies whole rows",
        "  fix: leave --door out: it leaves as patched; or in its place --svd-rank R writes the nearest LoRA of a rank",
    ]
    assert run(["export", str(model.path), str(tmp_path / "mine")]) == 1
    assert "pass --out FILE, or --plan" in capsys.readouterr().err


@pytest.mark.parametrize("ways", [
    ("--as-lora", "--svd-rank"), ("--door", "--svd-rank"), ("--as-lora", "--plan"), ("--svd-rank", "--plan"),
    ("--as-lora", "--door"), ("--door", "--plan"),
])  # fmt: skip
def test_one_way_is_never_passed_over_for_another(tiny, tmp_path, capsys, ways):
    words = {"--door": ["--door", "merged"], "--svd-rank": ["--svd-rank", "2"]}
    given = [word for way in ways for word in words.get(way, [way])]
    assert run(["export", str(tiny.path), str(tmp_path), "--out", str(tmp_path / "x"), *given]) == 1
    assert f"error: export {' with '.join(ways)}" in capsys.readouterr().err


def test_the_plan_in_words(base, tiny, tmp_path, capsys):
    trained(base, "houlsby", folder=tmp_path / "mine")
    assert run(["export", str(tiny.path), str(tmp_path / "mine"), "--allow-unverified-base", "--plan"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "refused: it adds a small nonlinear network (gelu) behind layers, and no weight or LoRA of a GGUF can express "
        "that",
        "score it in torch (`edgelora eval --in torch`), or train a LoRA (--method lora)",
    ]


# -- the nearest LoRA ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["dora", "ia3", "full", "lora"])
def test_the_nearest_lora_is_the_svd_of_what_changes(base, tiny, method):
    if method == "full":
        _, adapter = trained(base, "full")
        adapter = replace(adapter, tensors={m: adapter.tensors[m] for m in adapter.linears})
    else:
        _, adapter = trained(base, method)
    found = nearest_lora(base, adapter, 1 if method == "lora" else 8)
    module = adapter.linears[0]
    change = torch.from_numpy(adapter.change(module).change(tiny.weights[f"{module}.weight"]))
    values = torch.linalg.svdvals(change.double())
    wanted = float((values[8:].square().sum() / values.square().sum()).sqrt()) if method != "lora" else 0.0
    pair = found.adapter.pair(module)
    apart = torch.linalg.norm(change - torch.from_numpy(pair.b @ pair.a)) / torch.linalg.norm(change)
    assert float(apart) == pytest.approx(wanted, abs=1e-3)
    assert found.errors[module] == pytest.approx(wanted, abs=1e-3)


def test_the_svd_is_written_with_what_it_loses(make_tiny, tmp_path, capsys):
    model, lost = make_tiny(), []
    base = open_base(model.path)
    contract = make_a_lora(base).contract.model_copy(update={"method": "dora", "evaluation": {"loss": 1.0}})
    write_adapter(tmp_path / "mine", replace(trained(base, "dora")[1], contract=contract))
    for rank in (2, 256):
        words, out = ["export", str(model.path), str(tmp_path / "mine"), "--json"], tmp_path / f"{rank}.gguf"
        assert run([*words, "--svd-rank", str(rank), "--type", "F32", "--out", str(out)]) == 0
        told = capsys.readouterr()
        assert ("it is not the adapter" in told.err) == (rank == 2)
        assert ("nothing that the adapter changes in the weights is lost" in told.err) == (rank == 256)
        found = json.loads(told.out)["certificate"]
        assert found["passed"]
        assert found["svd_worst"]["error"] == max(found["svd_errors"].values())
        lost.append((found["svd_error"], found["lost"]["kl_mean"]))
        said = contract_of(GGUFFile(out))
        assert (said.method, said.evaluation) == (f"dora, its nearest LoRA of rank {rank}", {})  # scored was another
    assert lost[0][0] > 0.3
    assert lost[1][0] < 1e-5
    assert lost[0][1] > 100 * lost[1][1]


def test_what_a_deep_model_loses_fits_into_the_certificate():
    apart = Fidelity(10**6, *[1 / 3 * 1e-7] * (len(fields(Fidelity)) - 1))
    lora = Certificate("Q4_K", 16, 16, apart, apart, 1 / 3, 1 / 3)
    errors = {f"model.layers.{i}.self_attn.long_enough_proj": 1 / (i + 3) for i in range(210)}
    certificate = SvdCertificate(16, errors, 1 / 3, apart, lora)
    assert len(json.dumps(certificate.as_dict())) <= CERTIFICATE_BYTES
    assert certificate.worst == "model.layers.0.self_attn.long_enough_proj"


def test_norms_and_biases_have_no_singular_values(base):
    for method, more in (("layernorm", "norms"), ("bitfit", "biases")):
        with pytest.raises(ExportError, match=f"changes [0-9]+ {more}"):
            nearest_lora(base, trained(base, method)[1], 4)


def test_what_is_no_lora_says_by_what_it_is_none(base):
    for method, words in (("ia3", "multiplies rows; .*down_proj multiplies columns"), ("bitfit", "changes the bias")):
        with pytest.raises(AdapterError, match=words) as refused:
            as_lora(trained(base, method)[1], base.linears, "-")
        assert "takes it by its own door" in refused.value.fix
        assert ("--svd-rank" in refused.value.fix) == (method == "ia3")
