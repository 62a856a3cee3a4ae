"""HF checkpoint folders: what opens, what is refused, and that nothing of a folder is ever run."""

from __future__ import annotations

import json
import os
import pickle
import shlex
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from edgelora.errors import FileFormatError
from edgelora.files.checkpoint import (
    CONFIG,
    CONVERT_PICKLES,
    CONVERT_TENSORS,
    INDEX,
    WHOLE,
    Checkpoint,
    pickle_fault,
    read_json,
)

WEIGHTS = {f"model.layers.{i}.weight": np.full((2, 3), i, np.float32) for i in range(4)}
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
PARTS = [dict(list(WEIGHTS.items())[:2]), dict(list(WEIGHTS.items())[2:])]
WEIGHT_MAP = {tensor: shard for shard, part in zip(SHARDS, PARTS, strict=True) for tensor in part}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint in one file."""
    save_file(WEIGHTS, tmp_path / WHOLE)
    (tmp_path / CONFIG).write_text('{"model_type": "llama"}')
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """The same in two shards."""
    for shard, part in zip(SHARDS, PARTS, strict=True):
        save_file(part, tmp_path / shard)
    write_index(tmp_path, WEIGHT_MAP)
    (tmp_path / CONFIG).write_text('{"model_type": "llama"}')
    return tmp_path


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 96}, "weight_map": weight_map}))


def refused(folder: Path, why: str) -> FileFormatError:
    with pytest.raises(FileFormatError) as caught:
        Checkpoint(folder)
    assert why in caught.value.why
    assert str(folder) in caught.value.what
    assert caught.value.fix
    return caught.value


# -- what opens ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "sharded"])
def test_a_checkpoint_is_opened(request, kind):
    path = request.getfixturevalue(kind)
    checkpoint = Checkpoint(path)
    assert checkpoint.path == path
    assert checkpoint.config == {"model_type": "llama"}
    assert [s.path.name for s in checkpoint.shards] == (SHARDS if kind == "sharded" else [WHOLE])
    assert checkpoint.size_bytes == sum(f.stat().st_size for f in path.glob("*.safetensors"))
    assert checkpoint.tensors.keys() == WEIGHTS.keys()
    for name, value in WEIGHTS.items():
        assert checkpoint.tensors[name].shape == value.shape
        assert np.array_equal(checkpoint.rows(name).view(np.float32), value)


def test_a_real_checkpoint_is_read_as_transformers_reads_it(shared_data):
    from transformers import LlamaForCausalLM

    folder = shared_data / "models" / "stories260K"
    checkpoint, theirs = Checkpoint(folder), LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    weights = dict(theirs.named_parameters())
    assert checkpoint.tensors.keys() == weights.keys()
    for name, value in weights.items():
        found = checkpoint.rows(name).view(np.float32).reshape(checkpoint.tensors[name].shape)
        assert np.array_equal(found, value.detach().numpy())
    assert checkpoint.config["hidden_size"] == theirs.config.hidden_size


def test_one_file_goes_before_an_index(sharded):
    save_file(WEIGHTS, sharded / WHOLE)
    assert [s.path.name for s in Checkpoint(sharded).shards] == [WHOLE]


def test_opening_reads_headers_only(sharded):
    for i, shard in enumerate(SHARDS):
        header = json.dumps({f"t{i}": {"dtype": "F16", "shape": [1 << 20, 1 << 10], "data_offsets": [0, 1 << 31]}})
        (sharded / shard).write_bytes(len(header).to_bytes(8, "little") + header.encode())
        with (sharded / shard).open("r+b") as f:  # a hole: no disk space is used
            f.truncate(8 + len(header) + (1 << 31))
    write_index(sharded, {"t0": SHARDS[0], "t1": SHARDS[1]})
    tracemalloc.start()
    checkpoint = Checkpoint(sharded)
    assert checkpoint.rows("t1")[-1, -1] == 0
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert checkpoint.size_bytes > 1 << 32
    assert peak < 256 << 10


def test_a_link_to_a_shard_is_followed(sharded, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("blobs") / "0f3a"  # as in the cache of huggingface_hub
    (sharded / SHARDS[0]).rename(elsewhere)
    (sharded / SHARDS[0]).symlink_to(elsewhere)
    assert Checkpoint(sharded).tensors.keys() == WEIGHTS.keys()


# -- what is refused ----------------------------------------------------------------------------------------------


def test_every_missing_shard_is_named_at_once(sharded):
    for shard in SHARDS:
        (sharded / shard).unlink()
    assert refused(sharded, "2 of 2 shards are missing").why.endswith(", ".join(SHARDS))


def test_of_many_missing_shards_the_first_are_named(sharded):
    write_index(sharded, {f"t{i}": f"s{i:02}.safetensors" for i in range(20)})
    assert refused(sharded, "20 of 20 shards").why.endswith("s06.safetensors, s07.safetensors and 12 more")


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors", "/etc/model.safetensors", "a/b.safetensors", "a\\b.safetensors", "C:x.safetensors",
        "..", "", ".safetensors", "..safetensors", "pytorch_model.bin", "a\0.safetensors", "\x1b[2J.safetensors",
        "a.safetensors\n", "n" * 300 + ".safetensors", 1, None, ["a.safetensors"], {"a": 1},
    ],
    ids=ascii,
)  # fmt: skip
def test_a_shard_is_a_plain_file_of_the_folder(sharded, name):
    write_index(sharded, WEIGHT_MAP | {"x": name})
    fault = refused(sharded, "is no plain name of a .safetensors file in this folder")
    assert fault.why.isprintable()


def test_a_tensor_that_its_shard_does_not_hold(sharded):
    write_index(sharded, WEIGHT_MAP | {"x": SHARDS[0], "\x1b[2J": SHARDS[0]})
    refused(sharded, rf"{SHARDS[0]} and the index do not both name \x1b[2J, x")


def test_a_tensor_that_the_index_does_not_name(sharded):
    left_out = "model.layers.3.weight"
    write_index(sharded, {tensor: shard for tensor, shard in WEIGHT_MAP.items() if tensor != left_out})
    refused(sharded, f"{SHARDS[1]} and the index do not both name {left_out}")


def test_a_tensor_in_two_shards(sharded):
    save_file(WEIGHTS, sharded / SHARDS[1])
    refused(sharded, "do not both name model.layers.0.weight, model.layers.1.weight")


@pytest.mark.parametrize("weight_map", [None, {}, [], "x", 1], ids=str)
def test_an_index_without_a_weight_map(sharded, weight_map):
    write_index(sharded, weight_map)
    refused(sharded, "weight_map is no table")


def test_a_broken_shard_is_named(sharded):
    (sharded / SHARDS[1]).write_bytes((sharded / SHARDS[1]).read_bytes()[:-1])
    with pytest.raises(FileFormatError) as caught:
        Checkpoint(sharded)
    assert caught.value.what == f"{sharded / SHARDS[1]}: not a usable safetensors file"


def test_a_folder_without_config(folder):
    (folder / CONFIG).unlink()
    with pytest.raises(FileFormatError, match=r"no config\.json in this folder"):
        Checkpoint(folder)


def test_an_empty_folder_and_none(tmp_path):
    refused(tmp_path, "a checkpoint holds model.safetensors")
    refused(tmp_path / "missing", "No such file")
    (tmp_path / "file").touch()
    refused(tmp_path / "file", "Not a directory")


# -- no code of a checkpoint is run -------------------------------------------------------------------------------


class Touch:
    """A pickle of this makes a file when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "x.pth", "consolidated.00.pth", "last.ckpt"])
def test_a_folder_of_pickles_is_refused_unopened(tmp_path, name):
    trace = tmp_path / "opened"
    (tmp_path / CONFIG).write_text("{}")
    (tmp_path / name).write_bytes(pickle.dumps(Touch(trace)))
    fault = refused(tmp_path, "a pickle can run any code when it is opened")
    assert name in fault.what
    assert "python -c " in fault.fix
    assert not trace.exists()


def test_pickles_beside_safetensors_are_ignored(folder):
    (folder / "training_args.bin").write_bytes(pickle.dumps(Touch(folder / "opened")))
    assert Checkpoint(folder).tensors.keys() == WEIGHTS.keys()
    assert not (folder / "opened").exists()


@pytest.mark.parametrize(
    "name", ["training_args.bin", "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth", "rng_state_0.pth"]
)
def test_what_a_trainer_leaves_is_not_called_weights(tmp_path, name):
    (tmp_path / CONFIG).write_text("{}")
    (tmp_path / name).touch()
    assert "no weights in this folder" in refused(tmp_path, "a checkpoint holds model.safetensors").what
    (tmp_path / "pytorch_model.bin").touch()
    assert "its weights are pickles (pytorch_model.bin)" in refused(tmp_path, "a pickle can run any code").what


def test_auto_map_and_python_files_are_ignored(folder):
    (folder / CONFIG).write_text('{"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}')
    (folder / "modeling_x.py").write_text("import pathlib; pathlib.Path(__file__).with_suffix('.ran').touch()")
    assert Checkpoint(folder).config["auto_map"] == {"AutoModelForCausalLM": "modeling_x.X"}
    assert not list(folder.glob("*.ran"))
    assert "modeling_x" not in sys.modules


def test_the_fix_for_pickles_converts_them(tmp_path, shared_data, monkeypatch):
    from transformers import LlamaForCausalLM

    source = tmp_path / "it's $(here)"
    source.mkdir()
    original = LlamaForCausalLM.from_pretrained(shared_data / "models" / "stories260K")
    torch.save(original.state_dict(), source / "pytorch_model.bin")
    for name in (CONFIG, "tokenizer.json", "tokenizer_config.json"):
        (source / name).write_bytes((shared_data / "models" / "stories260K" / name).read_bytes())
    python, flag, code, *arguments = shlex.split(refused(source, "pickle").fix.partition("trust: ")[2])
    assert (python, flag, code, arguments) == ("python", "-c", CONVERT_PICKLES, [str(source), f"{source}-safetensors"])
    monkeypatch.setattr("sys.argv", ["-c", *arguments])
    exec(code, {})
    converted = Checkpoint(arguments[1])
    for name, value in original.named_parameters():
        assert np.array_equal(converted.rows(name).view(np.float32), np.atleast_2d(value.detach().numpy()))
    assert (Path(arguments[1]) / "tokenizer.json").exists()


def test_the_fix_for_a_pickle_by_itself_converts_its_tensors(tmp_path, monkeypatch):
    pickled = tmp_path / "it's $(here).bin"
    tied = torch.arange(6.0).reshape(2, 3)
    torch.save({"a": tied, "b": tied, "c": tied.T}, pickled)
    python, flag, code, *arguments = shlex.split(pickle_fault(pickled).fix.partition("trust: ")[2])
    assert (python, flag, code) == ("python", "-c", CONVERT_TENSORS)
    assert arguments == [str(pickled), str(tmp_path / "it's $(here).safetensors")]
    monkeypatch.setattr("sys.argv", ["-c", *arguments])
    exec(code, {})
    found = load_file(arguments[1])
    assert {name: value.tolist() for name, value in found.items()} == {
        "a": tied.tolist(), "b": tied.tolist(), "c": tied.T.tolist(),
    }  # fmt: skip


def test_a_pickle_of_a_checkpoint_is_converted_with_it(folder):
    fix = pickle_fault(folder / "pytorch_model.bin").fix
    assert shlex.split(fix.partition("trust: ")[2])[2:] == [CONVERT_PICKLES, str(folder), f"{folder}-safetensors"]


# -- small JSON files ---------------------------------------------------------------------------------------------

BROKEN_JSON = {
    "nothing": (b"", "not JSON"),
    "no JSON": (b"{'a': 1}", "not JSON"),
    "cut short": (b'{"a": [1, 2', "not JSON"),
    "text behind it": (b"{} {}", "not JSON"),
    "a list": (b"[1]", "holds no JSON object"),
    "a number": (b"1", "holds no JSON object"),
    "nested deeply": (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "recursion limit exceeded"),
    "objects nested deeply": (b'{"a":' * 100_000, "recursion limit exceeded"),
    "many values": (b'{"a": [' + b"[]," * (3 << 19) + b"0]}", "more values than any real one"),
    "not UTF-8": (b'{"a": "\xff"}', "not JSON"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "not JSON"),
    "half a surrogate pair": (b'{"a": "\\ud800"}', "not JSON"),
    "a number of 5000 digits": (b'{"a": 1' + b"0" * 5000 + b"}", "not JSON"),
    "too long": (b'{"a": "' + b" " * 1024 + b'"}', "longer than 1024 bytes"),
}


@pytest.mark.parametrize("case", BROKEN_JSON)
def test_a_broken_json_file_is_a_typed_error(tmp_path, case):
    raw, why = BROKEN_JSON[case]
    path = tmp_path / "tokenizer_config.json"
    path.write_bytes(raw)
    with pytest.raises(FileFormatError) as caught:
        read_json(path, limit=1024 if case == "too long" else 8 << 20)
    assert caught.value.what == f"{path}: not a usable JSON file"
    assert why in caught.value.why


def test_json_is_read_as_json_reads_it(tmp_path):
    text = '{"é": [1, 2.5, -0, 1e3, true, null, {"a": "\\ud83d\\ude00", "a": "last"}], "b": Infinity}'
    (tmp_path / "x.json").write_text(text, encoding="utf-8")
    assert read_json(tmp_path / "x.json") == json.loads(text)
    assert read_json(tmp_path / "x.json", limit=len(text.encode())) == json.loads(text)


def test_a_json_file_that_cannot_be_read(tmp_path):
    for path in (tmp_path / "missing.json", tmp_path):
        with pytest.raises(FileFormatError, match="cannot be read"):
            read_json(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(FileFormatError, match="no regular file"):
        read_json(tmp_path / "pipe.json")
