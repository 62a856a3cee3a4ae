"""Checkpoints of a run on disk: each a folder that is whole or not there, and the newest whole one is found again.

A folder `step-00000042` holds `state.safetensors`, `state.json` and a manifest; nothing in it is a pickle. Knows
nothing of what the tensors and facts mean: that is the loop's.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from edgelora.errors import FileFormatError, OutputError
from edgelora.files.atomic import remove, share, staged
from edgelora.files.checkpoint import read_json
from edgelora.files.manifest import verify, write_manifest
from edgelora.files.safetensors import SafetensorsFile

TENSORS, STATE = "state.safetensors", "state.json"
NAME = re.compile(r"step-(\d{8,15})(?:-(\d{5,15}))?")


@dataclass(frozen=True)
class Snapshot:
    """Everything that a run needs to go on exactly where it was.

    step: optimizer steps done. micro: micro-batches of the next step whose gradients are already summed; 0: none.
    tensors: by flat names (`parameter.…`, `optimizer.…`), of any dtype and device; read back on the CPU.
    facts: whatever JSON can hold without losing a bit; floats that may be NaN as `float.hex`.
    """

    step: int
    micro: int
    tensors: Mapping[str, torch.Tensor]
    facts: Mapping[str, Any]


class StateFile(BaseModel):
    """What a checkpoint's JSON file holds: a Snapshot without its tensors."""

    step: int = Field(ge=0, strict=True)
    micro: int = Field(ge=0, strict=True)
    facts: dict[str, Any]


def checkpoint_path(folder: Path, step: int, micro: int = 0) -> Path:
    """Where the checkpoint of that moment stands in `folder`. Names sort in the order of the moments."""
    return folder / (f"step-{step:08}-{micro:05}" if micro else f"step-{step:08}")


def write_checkpoint(folder: Path, snapshot: Snapshot, *, keep_last: int, best: int | None) -> Path:
    """Write the snapshot in one step, then remove the checkpoints that are no longer kept.

    Kept: this one, the `keep_last` - 1 before it, and that of step `best`. Later ones are what a resumed run had to
    pass over, or what an abandoned one left: this one replaces them. Raises OutputError if the disk refuses; whatever
    stood there before then still does.
    """
    path = checkpoint_path(folder, snapshot.step, snapshot.micro)
    with staged(path, folder=True, overwrite=True) as draft:
        _write(draft, snapshot)
    earlier = [other for other in _checkpoints(folder) if _moment(other) < _moment(path)]
    kept = {path, *earlier[: keep_last - 1]}
    if best is not None:
        kept.add(checkpoint_path(folder, best))
    for other in _checkpoints(folder):
        if other not in kept:
            with contextlib.suppress(OSError):  # it is in the way of nothing; the next write tries again
                remove(other)
    return path


def read_latest(folder: Path, on_damage: Callable[[str], None]) -> Snapshot | None:
    """The newest checkpoint in `folder` that is whole, or None. `on_damage` hears of each newer one that is not."""
    damaged: list[FileFormatError] = []
    found = None
    for path in _checkpoints(folder):
        try:
            found = read_checkpoint(path)
            break
        except FileFormatError as e:
            damaged.append(e)
    used = f"{checkpoint_path(folder, found.step, found.micro).name} is used instead" if found else "none is left"
    for fault in damaged:
        on_damage(f"{fault.what} ({fault.why}); {used}")
    return found


def read_checkpoint(path: Path) -> Snapshot:
    """The snapshot in `path`. Raises FileFormatError for a checkpoint that is not, to the byte, as it was written."""
    try:
        verify(path)
        SafetensorsFile(path / TENSORS)  # bounds what the library below is given
        state = StateFile.model_validate(read_json(path / STATE))
        # cloned: what is mapped would change, or kill the process, with the file
        tensors = {name: tensor.clone() for name, tensor in load_file(path / TENSORS).items()}
        if checkpoint_path(path.parent, state.step, state.micro) != path:
            raise _damaged(path, f"it is that of step {state.step}, renamed")
    except FileFormatError as e:
        raise _damaged(path, e.why) from e
    except (SafetensorError, ValueError) as e:
        raise _damaged(path, f"it was not written by edgelora ({type(e).__name__})") from e
    return Snapshot(state.step, state.micro, tensors, state.facts)


def _write(draft: Path, snapshot: Snapshot) -> None:
    try:
        save_file(_alone(snapshot.tensors), draft / TENSORS)
    except SafetensorError as e:
        raise OutputError(
            what=f"{draft.name}: this checkpoint could not be written",
            why=str(e),
            fix="free some space or choose another disk, then go on with --resume",
        ) from e
    share(draft / TENSORS)
    state = {"step": snapshot.step, "micro": snapshot.micro, "facts": snapshot.facts}
    (draft / STATE).write_text(json.dumps(state, allow_nan=False) + "\n", encoding="utf-8")
    SafetensorsFile(draft / TENSORS)  # what could not be read again is not committed
    read_json(draft / STATE)
    write_manifest(draft)


def _alone(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """On the CPU, contiguous and no two in one memory, as safetensors wants them; copied where they are not."""
    alone: dict[str, torch.Tensor] = {}
    taken = set()
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        memory = own.untyped_storage().data_ptr()
        alone[name] = own.clone() if memory in taken else own
        taken.add(memory)
    return alone


def _checkpoints(folder: Path) -> list[Path]:
    """What stands in `folder` under the name of a checkpoint, the newest first."""
    try:
        return sorted((path for path in folder.iterdir() if NAME.fullmatch(path.name)), key=_moment, reverse=True)
    except FileNotFoundError:
        return []
    except OSError as e:
        raise FileFormatError(
            what=f"{folder}: no folder that can be read",
            why=str(e.strerror),
            fix="a run keeps its checkpoints there: move away what stands in its place",
        ) from e


def _moment(path: Path) -> tuple[int, int]:
    found = NAME.fullmatch(path.name)
    assert found is not None
    return int(found[1]), int(found[2] or 0)


def _damaged(path: Path, why: str) -> FileFormatError:
    return FileFormatError(
        what=f"{path.name}: this checkpoint is damaged",
        why=why,
        fix=f"delete {path}: the one before it is used then",
    )
