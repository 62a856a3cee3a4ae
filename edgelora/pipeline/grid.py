"""What a report measures: its cells, on which data; checked and digested before anything is built."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgelora.base.model import Base, open_base
from edgelora.data.conversation import Conversation, read_conversations
from edgelora.errors import ConfigError, DataError, FileFormatError
from edgelora.evaluate.cells import Sample
from edgelora.evaluate.choices import alternatives
from edgelora.evaluate.metrics import choose_metric
from edgelora.files.checkpoint import read_json
from edgelora.files.contract import contract_in, sha256_file
from edgelora.pipeline.evaluate import adapter_files, is_choice_file, read_choice_file
from edgelora.pipeline.grid_live import Live, how_live
from edgelora.pipeline.grid_places import LEVELS, Asked, Place, places_of, require_own_levels, require_there
from edgelora.pipeline.perplexity import read_windows
from edgelora.training.folder import RunFolder
from edgelora.versions import versions

__all__ = ["LEVELS", "Asked", "Grid", "Place", "Task", "digest"]

FORMAT = 1  # of what is kept of a cell: a change makes kept ones void
KEY_DIGITS = 12
SAMPLES = 4  # rows whose answers are shown side by side


@dataclass(frozen=True)
class Task:
    """Rows to answer, the metric that fits them, and those that are shown."""

    path: Path
    metric: str
    rows: tuple[Conversation, ...]

    @property
    def shown(self) -> list[int]:
        """Numbers of SAMPLES rows from all over the file."""
        n = min(SAMPLES, len(self.rows))
        return [i * len(self.rows) // n for i in range(n)]

    @property
    def samples(self) -> tuple[Sample, ...]:
        """The rows that are shown, each as its last question and its answer."""
        rows = [self.rows[i] for i in self.shown]
        return tuple(Sample(row.messages[-2].content or "", row.answer) for row in rows)


@dataclass(frozen=True)
class Grid:
    """All cells, the data sorted by its kind, and the digest of everything that a figure rests on."""

    asked: Asked
    base: Base
    places: tuple[Place, ...]
    task: Task | None
    choices: Mapping[str, Path]
    """By the names of their measures: `arc-easy`."""
    calibration: Path | None
    digests: Mapping[str, str]
    """Of `base`, `adapter`, `adapter/Q4_K_M`, `calibration`, `text`, `task`, `choice/…`."""
    live: Live
    """What `--ways live` means for the adapter."""
    live_for: Mapping[str, Live]
    """The same of those that were trained over a level, by the level."""
    n_text_tokens: int = 0
    n_choice_tokens: int = 0

    @classmethod
    def plan(cls, asked: Asked) -> Grid:
        """Read everything that is read in every cell. Raises ConfigError, DataError, BaseModelError, AdapterError."""
        base = open_base(asked.base)
        require_there(asked)
        live = how_live(base, *asked.adapter) if asked.adapter else Live()
        places = places_of(asked, live)
        live_for = {quant: how_live(base, folder, 1.0) for quant, folder in asked.adapters_for.items()}
        require_own_levels(asked, base, live_for)
        task, choices, n_choice_tokens = _data(asked, base)
        if task is None and not choices and asked.text is None:
            raise ConfigError(
                what="there is nothing to score",
                why="a report compares files by how well they do on something",
                fix="pass --data ROWS, --text FILE or both",
            )
        n_tokens = 0
        if asked.text is not None:
            windows = read_windows(asked.text, base, asked.context, asked.windows)
            n_tokens = sum(len(window.ids) for window in windows)
        calibration = _calibration(asked) if any(place.way == "imatrix" for place in places) else None
        digests = dict(_digests(asked, base, task, choices, calibration))
        _refuse_test_rows(digests)
        return cls(asked, base, places, task, choices, calibration, digests, live, live_for, n_tokens, n_choice_tokens)

    def key(self, *parts: Any) -> str:
        """One name for something made of these, by these versions."""
        made_by = {name: versions()[name] for name in ("edgelora", "llama-cpp-python")}
        text = json.dumps([FORMAT, made_by, *parts], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:KEY_DIGITS]

    def rests_on(self, place: Place) -> dict[str, Any]:
        """The digests that the figures of a place rest on, and the adapter's scale: what else changes, they stay."""
        own = {"base": {"base"}, "trained": {f"adapter/{place.quant}"}, "imatrix": {"adapter", "calibration"}}
        used = own.get(place.way, {"adapter"})
        scored = {name for name in self.digests if not name.startswith(("adapter", "calibration"))}
        scale = self.asked.adapter[1] if self.asked.adapter and "adapter" in used else None
        has_kl = place.way not in ("base", "trained") or (place.way == "base" and self.asked.adapter is None)
        found = {name: value for name, value in self.digests.items() if name in scored | used}
        computed_by = {"torch": versions()["torch"]} if place.way == "torch" else {}
        return found | computed_by | {"scale": scale, "reference": has_kl}


def digest(files: Sequence[Path]) -> str:
    """Of one file its sha256; of several that of theirs."""
    found = [sha256_file(file) for file in files]
    return found[0] if len(found) == 1 else hashlib.sha256("".join(found).encode()).hexdigest()


def _data(asked: Asked, base: Base) -> tuple[Task | None, dict[str, Path], int]:
    """The task, multiple choice by name, and how many tokens all of it has at most."""
    task: Task | None = None
    choices: dict[str, Path] = {}
    n_tokens = 0
    for path in asked.data:
        if is_choice_file(path):
            n_tokens += sum(len(one.ids) for row in read_choice_file(path) for one in alternatives(row, base.tokenizer))
            choices[path.stem.removesuffix(".test").replace("_", "-")] = path
            continue
        if task is not None:
            raise ConfigError(
                what=f"--data {task.path} and --data {path}: two tasks",
                why="a report ranks by one; files of multiple choice may stand beside it",
                fix="make a report for each, or one file of both with a `group` in each row",
            )
        rows = tuple(read_conversations(path))
        metric, _ = choose_metric([row.answer for row in rows], asked.metric, asked.pattern)
        task = Task(path, metric, rows)
    if len(choices) + (task is not None) < len(asked.data):
        raise ConfigError("--data: two files of one name", "their figures go by it", "rename one of them")
    return task, choices, n_tokens


def _calibration(asked: Asked) -> Path:
    """The rows given, or those that the adapter was trained on, if they still are what they were."""
    if asked.calibration is not None:
        return asked.calibration
    assert asked.adapter is not None
    folder = asked.adapter[0]
    try:
        listed = read_json(RunFolder(folder).facts)["settled"]["data"]
        contract = contract_in(folder)
        trained = {source["sha256"] for source in contract.training["data"]} if contract else set()
        paths = [Path(str(text)) for text in listed]
        if len(paths) == 1 and paths[0].is_file() and sha256_file(paths[0]) in trained:
            return paths[0]
    except (FileFormatError, OSError, LookupError, TypeError):
        pass
    raise ConfigError(
        what="--ways imatrix: on which rows is importance to be computed?",
        why=f"the rows that {folder.name} was trained on are not where its run says, or not one file",
        fix="pass --calibration ROWS: training rows, none of those that are scored",
    )


def _digests(
    asked: Asked, base: Base, task: Task | None, choices: Mapping[str, Path], calibration: Path | None
) -> Iterator[tuple[str, str]]:
    yield "base", base.base_file.sha256
    if asked.adapter is not None:
        yield "adapter", digest(adapter_files(asked.adapter[0]))
    for quant, folder in asked.adapters_for.items():
        yield f"adapter/{quant}", digest(adapter_files(folder))
    files = {"calibration": calibration, "text": asked.text, "task": task.path if task else None}
    for name, path in (files | {f"choice/{name}": path for name, path in choices.items()}).items():
        if path is not None:
            yield name, digest(sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path])


def _refuse_test_rows(digests: Mapping[str, str]) -> None:
    """Importance of the very rows that are scored would flatter the ways that use it."""
    own = digests.get("calibration")
    if own is not None and own in (value for name, value in digests.items() if name != "calibration"):
        raise DataError(
            what="--calibration: these are the rows that are scored",
            why="what quantizing spares would be chosen by the answers",
            fix="pass the rows that the adapter was trained on",
        )
