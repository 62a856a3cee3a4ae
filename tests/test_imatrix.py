"""Importance matrices: llama.cpp's format, and what llama-imatrix would collect on the same tokens."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from conftest import TEMPLATE
from gguf.constants import GGMLQuantizationType as Type
from test_architectures import CASES, seeded
from test_export import make_adapter, make_dora

from converters.adapter_to_gguf import write_adapter_gguf
from converters.base_to_gguf import write_base_gguf
from converters.imatrix import Importance, read_importance, write_importance
from edgelora.base import ggml
from edgelora.base.decoder import build_decoder
from edgelora.base.importance import collect_importance
from edgelora.base.model import open_base
from edgelora.cli import run
from edgelora.data.calibration import Mix, _sample, calibrate
from edgelora.errors import (
    AdapterError,
    BaseModelError,
    ConfigError,
    DataError,
    EngineError,
    ExportError,
    FileFormatError,
)
from edgelora.files.gguf import GGUFFile
from edgelora.peft.adapter import write_adapter
from edgelora.pipeline.imatrix import Settings, compute_importance
from edgelora.pipeline.merge import merge

TOOLS = ("llama-imatrix", "llama-quantize")


def example() -> Importance:
    """A dense tensor of 8 columns, and three experts of 4, one of which saw nothing."""
    sums = {
        "blk.0.ffn_up.weight": np.arange(8, dtype=np.float32)[None],
        "blk.0.ffn_up_exps.weight": np.array([[2, 4, 6, 8], [0, 0, 0, 0], [3, 3, 3, 0]], np.float32),
    }
    counts = {"blk.0.ffn_up.weight": np.array([4]), "blk.0.ffn_up_exps.weight": np.array([2, 0, 3])}
    return Importance(sums, counts, 2, 512, ("rows.jsonl", "general.txt"))


def equal(a: Importance, b: Importance) -> bool:
    return (
        (a.chunks, a.chunk_tokens, a.datasets) == (b.chunks, b.chunk_tokens, b.datasets)
        and a.sums.keys() == b.sums.keys()
        and all(np.array_equal(a.sums[n], b.sums[n]) and np.array_equal(a.counts[n], b.counts[n]) for n in a.sums)
    )


# -- the format ------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_again(tmp_path):
    write_importance(tmp_path / "a.gguf", example())
    assert equal(read_importance(tmp_path / "a.gguf"), example())


def test_weights_are_means_and_an_unseen_expert_counts_one():
    weights = example().weights()
    assert weights["blk.0.ffn_up.weight"].tolist() == [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75]
    assert weights["blk.0.ffn_up_exps.weight"].tolist() == [1, 2, 3, 4, 1, 1, 1, 1, 1, 1, 1, 0]
    assert {w.dtype for w in weights.values()} == {np.dtype(np.float32)}
    assert example().unseen() == {"blk.0.ffn_up_exps.weight": 1}


def write_gguf(path, tensors, kind="imatrix", **keys):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(kind)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    for key, value in keys.items():
        writer.add_key_value(f"imatrix.{key}", value, gguf.GGUFValueType.STRING)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def pair(sums, counts, dtype=np.float32):
    return {"a.in_sum2": np.array(sums, dtype), "a.counts": np.array(counts, np.float32)}


@pytest.mark.parametrize(
    ("tensors", "fault"),
    [
        ({"other": np.ones(4, np.float32)}, "holds no tensors"),
        (pair([1, np.nan], [3]), "a has sums of squares that are negative or not finite"),
        (pair([1, np.inf], [3]), "a has sums of squares that are negative or not finite"),
        (pair([1, -1], [3]), "a has sums of squares that are negative or not finite"),
        (pair([1, 2], [0]), "a was computed on 0 tokens"),
        (pair([[1, 2], [3, 4]], [[3], [-1]]), "a was computed on -1 tokens"),
        (pair([[1, 2], [3, 4]], [[3], [0]]), "sums for an expert that saw no token"),
        (pair([1, 2], [np.nan]), "no number of tokens"),
        (pair([1, 2], [1e30]), "no number of tokens"),
        (pair([1, 2, 3], [1, 2]), "a has 3 sums and 2 counts"),
        (pair([1, 2], [3], np.float16), "stored as F16, expected F32"),
        ({"a.in_sum2": np.ones(4, np.float32)}, "a.in_sum2 stands without its other half"),
        ({"a.counts": np.ones(1, np.float32)}, "a.counts stands without its other half"),
    ],
)
def test_what_no_activations_can_have_is_refused(tmp_path, tensors, fault):
    write_gguf(tmp_path / "a.gguf", tensors)
    with pytest.raises(FileFormatError) as error:
        read_importance(tmp_path / "a.gguf")
    assert fault in str(error.value)


def test_another_kind_of_file_is_refused(tmp_path, tiny):
    with pytest.raises(FileFormatError, match="not a usable importance matrix") as error:
        read_importance(tiny.path)
    assert error.value.why == "it is a GGUF of the type 'model'"
    write_gguf(tmp_path / "a.gguf", pair([1, 2], [3]), chunk_count="two")
    with pytest.raises(FileFormatError, match="not a usable GGUF"):
        read_importance(tmp_path / "a.gguf")
    with pytest.raises(FileFormatError, match="no such file"):
        read_importance(tmp_path / "missing.dat")


def test_a_file_cut_anywhere_is_refused(tmp_path):
    whole, cut = tmp_path / "whole.gguf", tmp_path / "cut.gguf"
    write_importance(whole, example())
    data = whole.read_bytes()
    end = len(data) - 28  # the last 4 bytes are a count, padded to 32
    for n in range(0, end, 7):
        cut.write_bytes(data[:n])
        with pytest.raises(FileFormatError):
            read_importance(cut)


def test_a_matrix_of_another_model_is_refused():
    shapes = {"blk.0.ffn_up.weight": (6, 8), "blk.0.ffn_up_exps.weight": (3, 6, 4), "other": (2, 2)}
    example().check(shapes)
    with pytest.raises(ExportError) as error:
        example().check({"blk.0.ffn_up_exps.weight": (2, 6, 4)})
    assert str(error.value).splitlines() == [
        "the importance matrix does not fit the model: blk.0.ffn_up.weight is no tensor of the model; "
        "blk.0.ffn_up_exps.weight has 12 columns, the model's 8",
        "  why: it was computed on another model",
        "  fix: compute it on this one: `edgelora imatrix MODEL --data ROWS --out FILE`",
    ]


def legacy(entries, trailer=True) -> bytes:
    """The format before GGUF, as llama-imatrix writes it: means times a number of calls."""
    out = struct.pack("<i", len(entries))
    for name, calls, values in entries:
        raw = name.encode()
        out += struct.pack("<i", len(raw)) + raw + struct.pack("<ii", calls, len(values))
        out += np.array(values, np.float32).tobytes()
    return out + (struct.pack("<ii", 7, 5) + b"a.txt" if trailer else b"")


@pytest.mark.parametrize("trailer", [True, False])
def test_the_format_before_gguf_is_read(tmp_path, trailer):
    (tmp_path / "old.dat").write_bytes(legacy([("a", 2, [4, 0, 1]), ("b", 1, [5])], trailer))
    found = read_importance(tmp_path / "old.dat")
    assert {name: w.tolist() for name, w in found.weights().items()} == {"a": [2, 0, 0.5], "b": [5]}
    assert (found.chunks, found.datasets) == ((7, ("a.txt",)) if trailer else (0, ()))


@pytest.mark.parametrize("damage", ["cut", "calls", "count", "entries", "nan"])
def test_a_damaged_file_of_that_format_is_refused(tmp_path, damage):
    whole = legacy([("a", 2, [4, 0, 1])], trailer=False)
    huge = struct.pack("<i", 2**31 - 1)
    (tmp_path / "old.dat").write_bytes({
        "cut": whole[:-1],
        "calls": whole[:9] + struct.pack("<i", -1) + whole[13:],
        "count": whole[:13] + huge + whole[17:],
        "entries": huge + whole[4:],
        "nan": legacy([("a", 2, [np.nan])]),
    }[damage])  # fmt: skip
    with pytest.raises(FileFormatError, match="not a usable importance matrix"):
        read_importance(tmp_path / "old.dat")


# -- what is collected: llama-imatrix on the same tokens ---------------------------------------------------------------


@pytest.fixture(scope="module")
def tool() -> Callable[..., str]:
    """`tool("llama-imatrix", …)` runs one of llama.cpp's own programs; skips where there is none."""
    found = {name: shutil.which(name, path=os.environ.get("EDGELORA_LLAMA_TOOLS")) for name in TOOLS}
    if missing := [name for name, path in found.items() if path is None]:
        pytest.skip(f"no {' and no '.join(missing)} in EDGELORA_LLAMA_TOOLS or PATH")

    def run(name: str, *arguments: object) -> str:
        command = [str(found[name]), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout + done.stderr

    return run


@pytest.fixture(scope="module")
def family(tmp_path_factory, vocabulary, write_tokenizer) -> Callable[[str], tuple[Path, Path]]:
    """`family(name)`: a case of test_architectures as a checkpoint, and as a GGUF in F32."""
    made: dict[str, tuple[Path, Path]] = {}

    def make(name: str) -> tuple[Path, Path]:
        if name not in made:
            folder = tmp_path_factory.mktemp("family")
            seeded(CASES[name]).save_pretrained(folder / name)
            write_tokenizer(folder / name, vocabulary, TEMPLATE)
            write_base_gguf(folder / f"{name}.gguf", open_base(folder / name), "F32")
            made[name] = folder / name, folder / f"{name}.gguf"
        return made[name]

    return make


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """A page of prose, with the line ends of Windows in it and one at its end."""
    path = tmp_path_factory.mktemp("text") / "general.txt"
    path.write_bytes(("The lamp in the hall is off.\r\nTurn it on, then dim it to 30 % at noon!\n" * 40).encode())
    return path


def compute(model, out, *, adapters=(), engine="auto", output=False, **mix):
    mix = {"data": None, "window": 64, "windows": 6, **mix}
    return compute_importance(model, adapters, out, Settings(Mix(**mix), engine, output, allow_unverified=True))


def assert_alike(ours: Importance, theirs: Importance, rtol: float) -> None:
    assert ours.sums.keys() == theirs.sums.keys()
    for name, sums in theirs.sums.items():
        np.testing.assert_array_equal(ours.counts[name], theirs.counts[name], err_msg=name)
        np.testing.assert_allclose(ours.sums[name], sums, rtol=rtol, atol=rtol * sums.mean(), err_msg=name)


@pytest.mark.parametrize("name", ["llama", "llama-biased", "gemma3_text", "phi3-long", "mixtral", "qwen3_moe"])
@pytest.mark.parametrize("output", [False, True], ids=["", "output"])
def test_llama_imatrix_collects_the_same(tool, family, text, tmp_path, name, output):
    _, model = family(name)
    flags = ["--process-output"] if output else []
    tool("llama-imatrix", "-m", model, "-f", text, "-o", tmp_path / "theirs.gguf", "-c", 64, "-b", 64, "--chunks", 6,
         "-t", 1, "--no-ppl", *flags)  # fmt: skip
    theirs = read_importance(tmp_path / "theirs.gguf")
    ours = compute(model, tmp_path / "ours.gguf", text=text, output=output, engine="llama.cpp").importance
    if output and "output.weight" not in theirs.sums:  # it knows no tied head by name; ours is the embedding
        del ours.sums["token_embd.weight"]
    assert ("output.weight" in theirs.sums) == (output and not open_base(model).config.tie_word_embeddings)
    assert_alike(ours, theirs, rtol=1e-4)
    assert (ours.chunks, ours.chunk_tokens) == (theirs.chunks, theirs.chunk_tokens) == (6, 64)
    write_importance(tmp_path / "again.gguf", theirs)
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "theirs.gguf").read_bytes()


@pytest.mark.real
def test_llama_imatrix_collects_the_same_over_blocks(tool, smollm, text, tmp_path):
    tool("llama-imatrix", "-m", smollm, "-f", text, "-o", tmp_path / "theirs.gguf", "-c", 128, "-b", 128, "--chunks", 3,
         "-t", 1, "--no-ppl")  # fmt: skip
    theirs = read_importance(tmp_path / "theirs.gguf")
    ours = compute(smollm, tmp_path / "ours.gguf", text=text, window=128, windows=3).importance
    assert_alike(ours, theirs, rtol=1e-3)
    # torch does not round activations to 8 bits, which moves a few large ones (blk.2.ffn_down: 1.05 %)
    torchs = compute(smollm, tmp_path / "torch.gguf", text=text, window=128, windows=3, engine="torch").importance
    ratios = np.array([torchs.sums[name].sum() / sums.sum() for name, sums in theirs.sums.items()])
    assert np.abs(ratios - 1).max() < 0.03
    assert np.abs(ratios - 1).mean() < 0.01


def test_llama_quantize_takes_it(tool, make_tiny, text, tmp_path):
    model, out = make_tiny(tied=False).path, tmp_path / "ours.gguf"
    made = compute(model, out, text=text)
    said = tool("llama-quantize", "--imatrix", out, model, tmp_path / "small.gguf", "Q4_K_M", 1)
    assert f"have {len(made.importance.sums)} importance matrix entries" in said
    plain = tool("llama-quantize", model, tmp_path / "plain.gguf", "Q4_K_M", 1)
    assert "importance matrix" not in plain
    small, other = GGUFFile(tmp_path / "small.gguf"), GGUFFile(tmp_path / "plain.gguf")
    name = "blk.0.ffn_up.weight"
    source = GGUFFile(model).rows(name).view(np.float32)
    wanted = ggml.quantize(source, small.tensors[name].type, made.importance.weights()[name])
    np.testing.assert_array_equal(small.rows(name), wanted)
    assert not np.array_equal(small.rows(name), other.rows(name))


# -- what is collected: transformers, and one engine against the other -------------------------------------------------


def test_torch_sums_what_goes_into_each_linear_of_transformers(make_tiny, transformers_model):
    tiny = make_tiny(tied=False)
    base, theirs, wanted = open_base(tiny.path), transformers_model(tiny), {}

    def listen(name):
        def before(_, inputs):
            x = inputs[0].reshape(-1, inputs[0].shape[-1]).double().numpy()
            wanted[name] = wanted.get(name, 0) + (x * x).sum(0)

        return before

    for name, module in theirs.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(listen(base.tensor_of(name)))
    sequences = [np.arange(3, 60), np.arange(100, 117)]
    with torch.no_grad():
        for ids in sequences:
            theirs(torch.from_numpy(ids)[None])
    ours = collect_importance(build_decoder(base), base, sequences, output=True)
    assert ours.sums.keys() == wanted.keys()
    assert {int(n) for counts in ours.counts.values() for n in counts} == {57 + 17}
    for name, squares in wanted.items():
        np.testing.assert_allclose(ours.sums[name][0], squares, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.in_llama_cpp])
def test_both_engines_collect_the_same(family, text, tmp_path, name):
    folder, model = family(name)
    theirs = compute(model, tmp_path / "a.gguf", text=text, output=True, engine="llama.cpp", window=16)
    ours = compute(folder, tmp_path / "b.gguf", text=text, output=True, window=16)
    assert (theirs.engine.value, ours.engine.value) == ("llama.cpp", "torch")
    assert_alike(ours.importance, theirs.importance, rtol=5e-3)  # llama.cpp keeps keys and values in F16


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_are_counted_apart(family, text, tmp_path, name):
    folder, _ = family(name)
    found = compute(folder, tmp_path / "a.gguf", text=text).importance
    config = open_base(folder).config
    for layer in range(config.num_hidden_layers):
        counts = found.counts[f"blk.{layer}.ffn_gate_exps.weight"]
        assert counts.shape == (config.num_experts,)
        assert counts.sum() == 6 * 64 * config.num_experts_per_tok
        assert found.counts[f"blk.{layer}.ffn_gate_inp.weight"].tolist() == [6 * 64]
        assert found.sums[f"blk.{layer}.ffn_down_exps.weight"].shape == (4, config.moe_intermediate_size)


def test_an_expert_that_no_token_reaches_is_told(family, text, tmp_path):
    _, model = family("mixtral")
    seen = {}
    for engine in ("llama.cpp", "torch"):
        made = compute(model, tmp_path / f"{engine}.gguf", text=text, windows=1, window=2, engine=engine)
        seen[engine] = made.importance
        assert made.importance.unseen()
        assert "saw no token and are quantized as without importance" in made.notes[0]
        again = read_importance(tmp_path / f"{engine}.gguf")
        assert again.unseen() == made.importance.unseen()
    assert_alike(seen["torch"], seen["llama.cpp"], rtol=2e-2)  # of one token, nothing averages the rounding of F16 keys


@pytest.mark.parametrize("scale", [1.0, -0.5])
def test_the_adapter_is_on_in_both_engines(make_tiny, text, tmp_path, scale):
    model = make_tiny(tied=False).path
    base = open_base(model)
    write_adapter(tmp_path / "mine", make_adapter(base))
    write_adapter_gguf(tmp_path / "mine.gguf", make_adapter(base), base, "mine", "F32")
    plain = compute(model, tmp_path / "plain.gguf", text=text).importance
    ours = compute(model, tmp_path / "a.gguf", text=text, engine="torch", adapters=[(tmp_path / "mine", scale)])
    for path in ("mine", "mine.gguf"):
        made = compute(model, tmp_path / f"{path}.imatrix", text=text, adapters=[(tmp_path / path, scale)])
        assert made.engine.value == "llama.cpp"
        assert_alike(made.importance, ours.importance, rtol=5e-3)
    name = "blk.1.ffn_down.weight"
    assert np.abs(plain.sums[name] / ours.importance.sums[name] - 1).mean() > 0.05


def test_a_dora_is_computed_in_torch(make_tiny, text, tmp_path):
    model = make_tiny().path
    write_adapter(tmp_path / "dora", make_dora(open_base(model)))
    adapters = [(tmp_path / "dora", 1.0)]
    made = compute(model, tmp_path / "a.gguf", text=text, adapters=adapters)
    assert (made.engine.value, made.engine.why) == ("torch", "a DoRA is no adapter of llama.cpp")
    merge(model, adapters, tmp_path / "merged.gguf")
    merged = compute(tmp_path / "merged.gguf", tmp_path / "b.gguf", text=text)
    assert_alike(made.importance, merged.importance, rtol=2e-2)  # its weights are rounded to F16


def test_an_adapter_of_another_base_is_called_that_and_not_misshapen(make_tiny, text, tmp_path):
    other = make_adapter(open_base(make_tiny(seed=9).path))
    parts = other.tensors["model.layers.0.mlp.up_proj"]
    parts["lora_A"] = parts["lora_A"][:, :-32]
    write_adapter(tmp_path / "theirs", other)
    with pytest.raises(AdapterError, match="theirs does not belong to"):
        compute(make_tiny().path, tmp_path / "a.gguf", text=text, adapters=[(tmp_path / "theirs", 1.0)])


def test_a_family_that_only_llama_cpp_computes(make_tiny, text, tmp_path):
    model = tmp_path / "foreign.gguf"
    tiny = make_tiny(tied=False)
    model.write_bytes(renamed(tiny.path, "xverse"))
    made = compute(model, tmp_path / "a.gguf", text=text)
    assert made.engine.value == "llama.cpp"
    assert "a model of the architecture xverse" in made.engine.why
    with pytest.raises(ConfigError, match="--engine torch"):
        compute(model, tmp_path / "b.gguf", text=text, engine="torch")
    assert len(made.importance.sums) == 2 * 7
    (tmp_path / "rows.jsonl").write_text(chat("lights", "on " * 30), encoding="utf-8")
    said = compute(model, tmp_path / "c.gguf", data=tmp_path / "rows.jsonl")
    own = compute(tiny.path, tmp_path / "d.gguf", data=tmp_path / "rows.jsonl")
    assert said.task_tokens == own.task_tokens > 30
    assert_alike(said.importance, own.importance, rtol=1e-5)


def renamed(path: Path, architecture: str) -> bytes:
    """The same model as another family whose graph has the same tensors."""
    reader, out = GGUFFile(path), path.with_name(f"{architecture}.gguf")
    writer = gguf.GGUFWriter(out, architecture)
    for key, value in reader.metadata.items():
        if key != "general.architecture":
            name = key.replace("llama.", f"{architecture}.", 1) if key.startswith("llama.") else key
            data = list(value.data) if value.item is not None else value.data
            writer.add_key_value(name, data, value.type, value.item)
    for name, info in reader.tensors.items():
        writer.add_tensor(name, reader.rows(name).view(np.float32).reshape(info.shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out.read_bytes()


# -- the tokens ------------------------------------------------------------------------------------------------------


def chat(question: str, answer: str) -> str:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": messages}) + "\n"


@pytest.fixture
def rows(tmp_path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(chat(f"lamp {i}", "on " * (i % 7 + 1)) for i in range(80)), encoding="utf-8")
    return path


def read(ids, base) -> str:
    """The text of ids, special tokens with it."""
    return b"".join(base.tokenizer.piece(token, special=True) for token in ids.tolist()).decode()


def test_rows_are_whole_conversations_as_the_model_sees_them(tiny, tmp_path):
    (tmp_path / "rows.jsonl").write_text(chat("lights", "on") + chat("lamp", "off"), encoding="utf-8")
    base = open_base(tiny.path)
    found = calibrate(Mix(tmp_path / "rows.jsonl"), base)
    texts = {read(ids, base) for ids in found.sequences}
    said = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>\n"
    assert texts == {said.format("lights", "on"), said.format("lamp", "off")}


def test_a_longer_row_becomes_several_windows(tiny, tmp_path):
    (tmp_path / "rows.jsonl").write_text(chat("lights", "on off " * 40), encoding="utf-8")
    base = open_base(tiny.path)
    (whole,) = calibrate(Mix(tmp_path / "rows.jsonl"), base).sequences
    parts = calibrate(Mix(tmp_path / "rows.jsonl", window=32), base).sequences
    assert {len(part) for part in parts[:-1]} == {32}
    np.testing.assert_array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.8])
@pytest.mark.parametrize("windows", [4, 1000], ids=["enough", "too few"])
def test_the_general_text_has_its_share(tiny, rows, text, share, windows):
    found = calibrate(Mix(rows, text, share, windows, 64), open_base(tiny.path))
    total = found.task_tokens + found.general_tokens
    assert found.general_tokens == pytest.approx(share * total, abs=1)
    assert total <= windows * 64
    assert windows > 4 or total >= 4 * 64 - 1
    assert max(map(len, found.sequences)) <= 64


def test_rows_are_drawn_from_the_whole_file_and_the_same_each_time(tiny, rows):
    base = open_base(tiny.path)
    one, two = (calibrate(Mix(rows, windows=4, window=64), base) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(one.task, two.task, strict=True))
    numbers = [int(n) for ids in one.task for n in re.findall(r"lamp (\d+)<", read(ids, base))]
    assert max(numbers) > 40 > min(numbers)
    assert numbers != sorted(numbers)


def test_a_file_of_many_rows_is_drawn_from_evenly():
    assert sorted(_sample(range(10), 20)) == list(range(10))
    drawn = list(_sample(range(10_000), 1000))
    assert len(set(drawn)) == 1000
    assert 4500 < np.mean(drawn) < 5500


def test_a_text_begins_each_window_with_bos_where_the_model_wants_it(stories, text):
    base = open_base(stories)
    windows = calibrate(Mix(None, text, window=64, windows=3), base).general
    assert [ids[0] for ids in windows] == [base.tokenizer.bos_id] * 3
    plain = base.tokenizer.encode(text.read_bytes().decode().removesuffix("\n")).ids
    assert np.concatenate(windows)[1:64].tolist() == plain[:63]


# -- errors ------------------------------------------------------------------------------------------------------------


def test_what_cannot_be_computed_is_said_and_nothing_is_written(tiny, rows, text, tmp_path):
    short, empty, out = tmp_path / "short.txt", tmp_path / "empty.jsonl", tmp_path / "out.gguf"
    short.write_text("Too short.", encoding="utf-8")
    empty.write_text("", encoding="utf-8")
    for error, match, mix in [
        (ConfigError, "of nothing", {}),
        (ConfigError, "--mix 1", {"data": rows, "text": text, "share": 1.0}),
        (ConfigError, "0 chunks", {"data": rows, "windows": 0}),
        (DataError, "no rows", {"data": empty}),
        (DataError, "less than one window of 64", {"text": short}),
        (DataError, "cannot be read", {"text": tmp_path / "missing.txt"}),
        (EngineError, "a context of 600 tokens", {"text": text, "window": 600}),
    ]:
        with pytest.raises(error, match=match):
            compute(tiny.path, out, **mix)
    with pytest.raises(ConfigError, match="--engine cuda"):
        compute(tiny.path, out, data=rows, engine="cuda")
    assert not out.exists()
    assert not list(tmp_path.glob(".edgelora-*"))


def test_conversations_need_a_chat_template(make_tiny, rows, tmp_path):
    model = make_tiny(template=None).path
    with pytest.raises(BaseModelError) as error:
        compute(model, tmp_path / "out.gguf", data=rows)
    assert str(error.value).splitlines() == [
        f"{model}: it has no chat template",
        "  why: without one nobody knows how a conversation looks to this model",
        "  fix: pass --chat-template chatml where the command has it, or use an instruction-tuned model",
    ]
    chosen = Settings(Mix(rows, window=64, windows=2), template="chatml")
    assert compute_importance(model, [], tmp_path / "out.gguf", chosen).task_tokens == 128


@pytest.mark.parametrize("engine", ["llama.cpp", "torch"])
def test_activations_that_are_no_numbers_are_named(tiny, rows, tmp_path, engine):
    data, file = bytearray(tiny.path.read_bytes()), GGUFFile(tiny.path)
    at = file.tensors["blk.0.ffn_gate.weight"].offset
    data[at : at + 4] = np.float32(np.nan).tobytes()
    (tmp_path / "nan.gguf").write_bytes(data)
    with pytest.raises(BaseModelError) as error:
        compute(tmp_path / "nan.gguf", tmp_path / "out.gguf", data=rows, engine=engine)
    assert str(error.value).splitlines()[0] == (
        "blk.0.ffn_down.weight: what the model multiplies it with is not a number"
    )
    assert not (tmp_path / "out.gguf").exists()


def test_a_model_that_llama_cpp_cannot_load_is_an_error(make_tiny, text, tmp_path):
    (tmp_path / "odd.gguf").write_bytes(renamed(make_tiny(tied=False).path, "bert"))
    with pytest.raises(EngineError):
        compute(tmp_path / "odd.gguf", tmp_path / "out.gguf", text=text)
    assert not (tmp_path / "out.gguf").exists()


def test_the_command_prints_what_was_computed(tiny, rows, tmp_path, capsys):
    out = tmp_path / "out.gguf"
    arguments = ["imatrix", str(tiny.path), "--data", str(rows), "--context", "64", "--chunks", "3", "--out", str(out)]
    assert run([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "out": str(out), "tensors": 14, "task_tokens": 192, "general_tokens": 0, "engine": "llama.cpp",
        "why": "it runs this very file", "notes": [],
    }  # fmt: skip
    assert read_importance(out).datasets == ("rows.jsonl",)
    assert run(arguments) == 1
    assert "this file exists already" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.Q8_0], ids=lambda kind: kind.name)
@pytest.mark.parametrize("live", [False, True], ids=["bare", "with an adapter"])
def test_the_command_that_it_names_next_is_one_that_works(make_tiny, rows, tmp_path, capfd, kind, live):
    model, out = make_tiny(kind).path, tmp_path / "out.gguf"
    write_adapter(tmp_path / "mine", make_adapter(open_base(model)))
    more = ["--adapter", str(tmp_path / "mine")] if live else []
    words = ["imatrix", str(model), "--data", str(rows), "--context", "64", "--chunks", "2", "--out", str(out)]
    assert run([*words, *more]) == 0
    (said,) = re.findall(r"next: .*", capfd.readouterr().err)
    if kind == Type.Q8_0:
        assert said == "next: give it to --imatrix where the 16-bit original of this model is quantized or merged"
        return
    typed = shlex.split(said.removeprefix("next: "))
    typed = typed[typed.index("merge" if live else "quantize") :]
    assert run(typed) == 0
    assert open_base(tmp_path / f"{model.stem}-Q4_K_M.gguf").quant == "Q4_K_M"


def test_of_a_family_that_is_not_known_no_command_is_named(make_tiny, text, tmp_path, capfd):
    (tmp_path / "foreign.gguf").write_bytes(renamed(make_tiny(tied=False).path, "xverse"))
    words = ["imatrix", str(tmp_path / "foreign.gguf"), "--text", str(text), "--context", "64", "--chunks", "1"]
    assert run([*words, "--out", str(tmp_path / "out.gguf")]) == 0
    assert "edgelora quantize" not in capfd.readouterr().err
