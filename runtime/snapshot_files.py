"""Snapshots that outlive the process: one file each, believed only if every byte of it is what was written.

llama.cpp takes one in eight damaged states without a word, and its layout changes with the settings. So a file says
what it was computed with (base file, settings, build of llama.cpp, the digests of adapters and tokens), and digests of
all that and of the state. A file that says something else is not touched; a damaged one is removed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgelora.errors import EdgeloraError
from edgelora.files.atomic import staged
from runtime.states import Chain, Snapshot, common

MAGIC = b"edgelora-kv 1\n"
SUFFIX = ".kv"
HEADER_BYTES = 1 << 24  # of 100,000 cuts
LENGTH_BYTES = 4


@dataclass(frozen=True)
class _File:
    path: Path
    chain: Chain
    state_at: int
    state_sha256: str


class SnapshotFolder:
    """The snapshots of one base under one set of settings in `folder`, up to `budget_bytes`, the oldest removed first.

    identity: what they were computed with. Whatever goes wrong with a file costs the snapshot, never the answer.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], budget_bytes: int) -> None:
        self._folder, self._identity, self._budget = folder, dict(identity), budget_bytes
        self._files: dict[bytes, _File] = {}
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # they are what was talked about
            for path in sorted(folder.glob(f"*{SUFFIX}")):
                self._note(path)

    def __len__(self) -> int:
        return len(self._files)

    def longest(self, chain: Chain) -> tuple[int, Snapshot] | None:
        """(how many chunks it shares with `chain`, the snapshot) that shares the most, read and checked."""
        while self._files:
            file = max(self._files.values(), key=lambda file: common(file.chain, chain))
            if not (shared := common(file.chain, chain)):
                break
            if (state := self._read(file)) is not None:
                return shared, Snapshot(file.chain, state)
            self._forget(file)
        return None

    def shares(self, chain: Chain) -> int:
        """How many chunks the best of them shares with `chain`, by what their headers say."""
        return max((common(file.chain, chain) for file in self._files.values()), default=0)

    def keep(self, snapshot: Snapshot) -> None:
        """Write one, unless it is there or has no room."""
        end = snapshot.chain[-1]
        if end in self._files or snapshot.state.nbytes > self._budget:
            return
        header = {
            "identity": self._identity,
            "chain": [digest.hex() for digest in snapshot.chain],
            "state_sha256": hashlib.sha256(snapshot.state.data).hexdigest(),
        }
        text = json.dumps(header, sort_keys=True).encode()
        text = hashlib.sha256(text).hexdigest().encode() + text
        path = self._folder / f"{end.hex()}{SUFFIX}"
        try:
            with staged(path, overwrite=True) as draft, draft.open("xb") as out:
                draft.chmod(0o600)
                out.write(MAGIC + len(text).to_bytes(LENGTH_BYTES, "little") + text)
                out.write(snapshot.state.data)
            self._make_room()
        except (OSError, EdgeloraError):
            return  # a full disk keeps nothing
        self._note(path)

    def _make_room(self) -> None:
        """Remove the oldest files of the folder, other bases' too, until all fit the budget."""
        found = sorted((s.st_mtime_ns, s.st_size, p) for p in self._folder.glob(f"*{SUFFIX}") if (s := p.stat()))
        total = sum(size for _, size, _ in found)
        for _, size, path in found:
            if total <= self._budget:
                break
            path.unlink(missing_ok=True)
            self._files = {end: file for end, file in self._files.items() if file.path != path}
            total -= size

    def _note(self, path: Path) -> None:
        """Remember a file that was computed with the same as ours."""
        try:
            with path.open("rb") as file:
                if file.read(len(MAGIC)) != MAGIC:
                    return
                length = int.from_bytes(file.read(LENGTH_BYTES), "little")
                text = file.read(min(length, HEADER_BYTES))
            digest, text = text[:64], text[64:]
            if hashlib.sha256(text).hexdigest().encode() != digest:
                path.unlink()
                return
            header = json.loads(text)
        except (OSError, ValueError):
            return
        if header["identity"] == self._identity:
            chain = tuple(map(bytes.fromhex, header["chain"]))
            start = len(MAGIC) + LENGTH_BYTES + length
            self._files[chain[-1]] = _File(path, chain, start, header["state_sha256"])

    def _read(self, file: _File) -> np.ndarray | None:
        try:
            state = np.fromfile(file.path, np.uint8, offset=file.state_at)
        except OSError:
            return None
        return state if hashlib.sha256(state.data).hexdigest() == file.state_sha256 else None

    def _forget(self, file: _File) -> None:
        del self._files[file.chain[-1]]
        with contextlib.suppress(OSError):
            file.path.unlink()
