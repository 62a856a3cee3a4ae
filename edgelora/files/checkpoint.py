"""Open a Hugging Face checkpoint folder without trusting it: config.json and safetensors, whole or in shards.

Reads JSON files and safetensors headers, and nothing else. No code of the folder is ever run: `auto_map` and Python
files are ignored, and pickles are refused.
"""

from __future__ import annotations

import re
import shlex
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from pydantic_core import from_json

from edgelora.errors import FileFormatError
from edgelora.files.safetensors import SafetensorsFile, StoredTensor, is_json_bomb

CONFIG, WHOLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}\.safetensors")
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
PICKLE_STARTS = (b"PK\3\4", b"\x80")  # torch's zip, and a pickle by itself
NO_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state\w*)\.\w+")  # the Trainer's own
# The arguments come from the command line, so that no name is ever read as code.
CONVERT_PICKLES = (
    "import sys, transformers as t; [c.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2], "
    "safe_serialization=True) for c in (t.AutoTokenizer, t.AutoModelForCausalLM)]"
)
CONVERT_TENSORS = (
    'import sys, torch, safetensors.torch as s; found = torch.load(sys.argv[1], "cpu", weights_only=True); '
    "s.save_file({name: tensor.contiguous().clone() for name, tensor in found.items()}, sys.argv[2])"
)
MAX_JSON_BYTES = 8 << 20  # an index of 80,000 tensors
MAX_NAMES_SHOWN = 8


class Checkpoint:
    """An open, checked checkpoint: `config` as config.json has it, `tensors` by HF name, `rows(name)` mapped.

    `shards` are its open files, `size_bytes` is their sum. Raises FileFormatError if a file is missing, broken or a
    pickle, and if the index and the shards do not name the same tensors: two readers would then see two models.
    """

    def __init__(self, folder: Path | str) -> None:
        self.path = Path(folder)
        try:
            present = {path.name for path in self.path.iterdir()}
        except OSError as e:
            raise FileFormatError(
                what=f"{self.path}: no folder that can be read",
                why=str(e.strerror),
                fix="check the spelling of the path",
            ) from e
        self.shards = tuple(self._open_shards(present))
        self.files = tuple(sorted(shard.path for shard in self.shards))
        if CONFIG not in present:
            raise FileFormatError(
                what=f"{self.path}: no {CONFIG} in this folder",
                why="without it nobody knows what the weights compute",
                fix="download the whole checkpoint, not only its weights",
            )
        self.config: dict[str, Any] = read_json(self.path / CONFIG)
        self.size_bytes = sum(shard.size_bytes for shard in self.shards)
        self.tensors: dict[str, StoredTensor] = {n: t for shard in self.shards for n, t in shard.tensors.items()}
        self._shard_of = {name: shard for shard in self.shards for name in shard.tensors}

    def rows(self, name: str) -> np.ndarray:
        """The bytes of a tensor of floats as uint8 (n_rows, bytes per row), mapped, not copied."""
        return self._shard_of[name].rows(name)

    def forget(self, name: str) -> None:
        """Let the mapped pages of a tensor go."""
        self._shard_of[name].forget(name)

    def _open_shards(self, present: set[str]) -> Iterable[SafetensorsFile]:
        if WHOLE in present:
            yield SafetensorsFile(self.path / WHOLE)
            return
        if INDEX not in present:
            raise self._no_weights(present)
        for name, expected in self._read_index(present).items():
            shard = SafetensorsFile(self.path / name)
            if strangers := expected ^ shard.tensors.keys():
                raise self._broken_index(f"{name} and the index do not both name {_some(strangers)}")
            yield shard

    def _read_index(self, present: set[str]) -> dict[str, set[str]]:
        """The tensors that each shard must hold; every shard is there."""
        weight_map = read_json(self.path / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise self._broken_index("weight_map is no table of tensors and their shards")
        shards: dict[str, set[str]] = {}
        for tensor, name in weight_map.items():
            if not isinstance(name, str) or not SHARD_NAME.fullmatch(name):
                raise self._broken_index(f"{str(name)[:80]!a} is no plain name of a .safetensors file in this folder")
            shards.setdefault(name, set()).add(tensor)
        if missing := shards.keys() - present:
            raise self._broken_index(f"{len(missing)} of {len(shards)} shards are missing: {_some(missing)}")
        return shards

    def _broken_index(self, why: str) -> FileFormatError:
        return FileFormatError(
            what=f"{self.path / INDEX}: it does not describe the files beside it",
            why=why,
            fix="download the checkpoint again, with all its shards",
        )

    def _no_weights(self, present: set[str]) -> FileFormatError:
        if pickles := [name for name in present if Path(name).suffix in PICKLES and not NO_WEIGHTS.fullmatch(name)]:
            return _pickled(
                f"{self.path}: its weights are pickles ({_some(pickles)})",
                CONVERT_PICKLES, self.path, f"{self.path}-safetensors",
            )  # fmt: skip
        return FileFormatError(
            what=f"{self.path}: no weights in this folder",
            why=f"a checkpoint holds {WHOLE}, or {INDEX} and its shards",
            fix="pass the folder of a Hugging Face checkpoint, or a .gguf file",
        )


def read_json(path: Path, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The object in a JSON file of at most `limit` bytes. Raises FileFormatError for anything else.

    Refuses nesting beyond 200 levels, and more values than real files have: whatever stands in a file of up to 40 MiB,
    reading it takes less than 256 MB + 2 × its size. Of a name that stands twice the last value counts, as in `json`.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise _not_json(path, "it cannot be read (it is no regular file)")
        if found.st_size > limit:
            raise _not_json(path, f"it is longer than {limit} bytes")
        with path.open("rb") as f:
            raw = f.read(found.st_size)
    except OSError as e:
        raise _not_json(path, f"it cannot be read ({e.strerror})") from e
    if is_json_bomb(raw):
        raise _not_json(path, "it holds more values than any real one")
    try:
        value = from_json(raw)
    except ValueError as e:
        raise _not_json(path, f"it is not JSON ({e})") from e
    if not isinstance(value, dict):
        raise _not_json(path, "it holds no JSON object")
    return value


def pickle_fault(path: Path) -> FileFormatError:
    """What to say of one file that is a pickle, or a zip of them: how to convert it, or the checkpoint around it."""
    what = f"{path}: this is a pickle"
    if (path.parent / CONFIG).is_file():
        folder = path.parent.resolve()
        return _pickled(what, CONVERT_PICKLES, folder, f"{folder}-safetensors")
    return _pickled(what, CONVERT_TENSORS, path, path.with_suffix(".safetensors"))


def _pickled(what: str, code: str, source: Path, target: Path | str) -> FileFormatError:
    arguments = shlex.join((code, str(source), str(target)))
    return FileFormatError(
        what=what,
        why="a pickle can run any code when it is opened",
        fix=f"download its safetensors files, or on a machine you trust: python -c {arguments}",
    )


def _not_json(path: Path, why: str) -> FileFormatError:
    return FileFormatError(what=f"{path}: not a usable JSON file", why=why, fix="download it again")


def _some(names: Iterable[str]) -> str:
    """The first names in order; what cannot be printed is escaped."""
    found = sorted(names)
    more = f" and {len(found) - MAX_NAMES_SHOWN} more" if len(found) > MAX_NAMES_SHOWN else ""
    return ", ".join(ascii(name[:80])[1:-1] for name in found[:MAX_NAMES_SHOWN]) + more
