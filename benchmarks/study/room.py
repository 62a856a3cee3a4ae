"""The folder of a study: results, a line each, and the files behind them. Whatever stands here is not done again."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS, LOCK = "results.jsonl", "lock"


@dataclass(frozen=True)
class Room:
    """`data`: the folder of data sets; `source`: the model that is padded."""

    folder: Path
    data: Path
    source: Path

    def base(self, quant: str) -> Path:
        return self.folder / f"SmolLM2-135M-padded-{quant}.gguf"

    def file(self, key: str) -> Path:
        """Where the adapter or importance matrix of a key stands."""
        return self.folder / key.replace("/", "-")

    def rows(self, task: str, part: str) -> Path:
        return self.data / f"{task}.{part}.jsonl"

    def found(self) -> dict[str, Any]:
        """Every result by its key. A line that was cut off by a kill is left out, and its job done again."""
        path = self.folder / RESULTS
        if not path.exists():
            return {}
        found = {}
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                result = json.loads(line)
            except ValueError:
                continue
            found[result.pop("key")] = result
        return found

    def keep(self, key: str, result: Mapping[str, Any]) -> None:
        """Append a result at once; two processes may do so."""
        with (self.folder / RESULTS).open("a", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write("\n" + json.dumps({"key": key, **result}) + "\n")  # apart from a line that a kill cut off
