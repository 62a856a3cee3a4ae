"""A model in several GGUF files, `name-00001-of-00003.gguf` …, as one: what llama.cpp's gguf-split writes.

llama.cpp itself opens the first file and finds the others by their names; so does this.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from edgelora.errors import FileFormatError
from edgelora.files.gguf import GGUFFile

NO, COUNT, TENSORS = "split.no", "split.count", "split.tensors.count"
PART_NAME = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


class SplitGGUF(GGUFFile):
    """The parts as one file: `metadata` of the first, the tensors of all. A tensor's offset is that in its own part.

    Raises FileFormatError if a part is missing or another one's, or if together they are not the whole model.
    """

    def __init__(self, first: GGUFFile) -> None:
        self.path, self.metadata = first.path, first.metadata
        parts = (first, *map(GGUFFile, self._others()))
        self.files = tuple(part.path for part in parts)
        self.size_bytes = sum(part.size_bytes for part in parts)
        self.tensors = {name: info for part in parts for name, info in part.tensors.items()}
        self._part_of = {name: part for part in parts for name in part.tensors}
        self._check(parts)

    def rows(self, name: str) -> np.ndarray:
        return self._part_of[name].rows(name)

    def forget(self, name: str) -> None:
        self._part_of[name].forget(name)

    def _others(self) -> list[Path]:
        match, count = PART_NAME.fullmatch(self.path.name), self.get(COUNT, int, 1)
        if match is None or int(match["count"]) != count:
            raise self._fault(
                f"it is one of {count} parts, and its name does not say so",
                f"name it and the others as they were: {self.path.stem}-00001-of-{count:05d}.gguf",
            )
        paths = [self.path.with_name(f"{match['stem']}-{i:05d}-of-{count:05d}.gguf") for i in range(2, count + 1)]
        if missing := [path.name for path in paths if not path.exists()]:
            raise self._fault(
                f"{len(missing)} of its {count} parts are missing: {', '.join(missing[:3])}", "download the others too"
            )
        return paths

    def _check(self, parts: Sequence[GGUFFile]) -> None:
        """Each part is the one that its name says, and they hold all tensors, each once."""
        for i, part in enumerate(parts):
            if (part.get(NO, int, 0), part.get(COUNT, int, 1)) != (i, len(parts)):
                raise self._fault(f"{part.path.name} does not say that it is part {i + 1} of {len(parts)}")
        n = sum(len(part.tensors) for part in parts)
        if {n, len(self.tensors)} != {self.get(TENSORS, int, n)}:
            raise self._fault(
                f"its parts hold {n} tensors, {len(self.tensors)} of different names; it says {self.get(TENSORS, int)}"
            )


def open_gguf(path: Path | str) -> GGUFFile:
    """Open a GGUF file, and with any part of a split model all of it. Raises FileFormatError."""
    path = Path(path)
    if (match := PART_NAME.fullmatch(path.name)) and int(match["number"]) != 1:
        first = path.with_name(f"{match['stem']}-00001-of-{match['count']}.gguf")
        if not first.exists():
            raise FileFormatError(
                what=f"{path}: one part of a model in {int(match['count'])} files",
                why=f"{first.name}, which describes them all, is not beside it",
                fix="download all its parts into one folder",
            )
        path = first
    file = GGUFFile(path)
    return SplitGGUF(file) if file.get(COUNT, int, 1) > 1 else file


def whole_models(paths: Iterable[Path]) -> list[Path]:
    """The paths without those of second and later parts: each model once."""
    return [path for path in paths if not (m := PART_NAME.fullmatch(path.name)) or int(m["number"]) == 1]
