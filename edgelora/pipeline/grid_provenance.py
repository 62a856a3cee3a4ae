"""Where a report comes from: what was scored, what it was built from, how it was measured, and by what."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime

from edgelora.device import physical_cores, processor_name
from edgelora.evaluate.cells import Provenance, UsedFile
from edgelora.evaluate.taken import CUSTOM
from edgelora.pipeline.evaluate import SIDE_BY_SIDE, adapter_files
from edgelora.pipeline.grid import Grid
from edgelora.pipeline.grid_files import ORIGINAL
from edgelora.pipeline.perplexity import TOP
from edgelora.versions import revision, versions

Setting = str | int | float | bool | None


def provenance(grid: Grid, command: str) -> Provenance:
    """As of now. `command`: what a person types to repeat it."""
    made_by = versions()
    if (checkout := revision()) is not None:
        made_by["revision"] = checkout
    return Provenance(
        command=command,
        created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        cpu=processor_name(),
        threads=physical_cores(),
        seeds=(0,),  # of the bootstrap; answers are greedy
        versions=made_by,
        data=_data(grid),
        files=tuple(_sources(grid)),
        settings=_settings(grid),
    )


def _settings(grid: Grid) -> dict[str, Setting]:
    asked, found = grid.asked, dict[str, Setting]()
    if grid.task is not None:
        found |= {"metric": grid.task.metric, "answers": f"greedy, {SIDE_BY_SIDE} side by side"}
    if asked.pattern is not None:
        found["pattern"] = asked.pattern
    if asked.text is not None:
        found |= {
            "windows": asked.windows,
            "tokens of a window": asked.context,
            "reference": f"{ORIGINAL}: its {TOP} likeliest tokens and the mass of the rest; KL is never above the true",
        }
    if grid.choices:
        found["multiple choice"] = CUSTOM
    return found | {"flash attention": True, "KV cache": "F16"}


def _data(grid: Grid) -> tuple[UsedFile, ...]:
    """What is scored."""
    paths = {f"choice/{name}": path for name, path in grid.choices.items()}
    if grid.task is not None:
        paths["task"] = grid.task.path
    if grid.asked.text is not None:
        paths["text"] = grid.asked.text
    return tuple(
        UsedFile(key.partition("/")[0], str(path), grid.digests[key], path.stat().st_size)
        for key, path in paths.items()
    )


def _sources(grid: Grid) -> Iterator[UsedFile]:
    """What the cells were built from."""
    asked = grid.asked
    size = sum(path.stat().st_size for path in grid.base.source.files)
    yield UsedFile("base", str(asked.base), grid.digests["base"], size)
    adapters = {} if asked.adapter is None else {"adapter": asked.adapter[0]}
    adapters |= {f"adapter/{quant}": folder for quant, folder in asked.adapters_for.items()}
    for key, path in adapters.items():
        yield UsedFile("adapter", str(path), grid.digests[key], sum(f.stat().st_size for f in adapter_files(path)))
    if (rows := grid.calibration) is not None:
        yield UsedFile("calibration", str(rows), grid.digests["calibration"], rows.stat().st_size)
