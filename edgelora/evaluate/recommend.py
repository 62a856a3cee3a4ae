"""Which file to ship: the smallest that is not worse than the best, by RULES and nothing else.

Reads nothing, writes nothing, measures nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgelora.errors import ConfigError
from edgelora.evaluate.against import NEGLIGIBLE_NATS, Against, against
from edgelora.evaluate.cells import CellResult, in_order
from edgelora.evaluate.measures import kind_of, title_of
from edgelora.evaluate.pareto import goodness, ranked_by
from edgelora.evaluate.studied import advice
from edgelora.words import size

RULES = (
    "Only whole cells count: what failed, is partial, or whose figure is no number is never ranked. The base alone is "
    "what the others are compared with, unless nothing else was asked for.",
    "What torch computed is compared with, and is never advised: it is nothing that llama.cpp runs.",
    "What exceeds a limit is out.",
    "Best is the highest share of right answers, then the lowest held-out loss; without a task the lowest KL to the "
    "reference, else perplexity, else bits per byte.",
    "As good as the best is what is not worse in any of these figures: the 95 % interval of the difference, over the "
    f"same rows, holds 0, or the difference is below {NEGLIGIBLE_NATS:g} nats a token.",
    "Of those the smallest is taken; of equal size the faster.",
)


@dataclass(frozen=True)
class Limits:
    """What a file must keep to; None: no limit. `min_quality`: the least share of right answers, 0 to 1."""

    max_size_bytes: int | None = None
    max_ram_bytes: int | None = None
    min_quality: float | None = None


@dataclass(frozen=True)
class Choice:
    """The file to ship (None: there is none), the reason in words, line by line, and the cell's name."""

    file: str | None
    why: str
    cell: str = ""


def recommend(cells: Sequence[CellResult], limits: Limits | None = None) -> Choice:
    """The file to ship among measured cells. Raises ConfigError for a `min_quality` without a task to apply it to."""
    limits = limits or Limits()
    asked = in_order([cell for cell in cells if cell.way != "base"] or cells)
    whole = [cell for cell in asked if cell.status == "ok"]
    keys = ranked_by([cell for cell in whole if cell.ships] or whole)
    usable = [cell for cell in whole if cell.ships and keys and cell.measure(keys[0])]
    in_torch = [cell for cell in whole if not cell.ships and keys and cell.measure(keys[0])]
    if not usable:
        return Choice(None, "\n".join([*_nothing(in_torch, cells, keys), *_left_out(asked, keys)]))
    if limits.min_quality is not None and keys[0] != "right":
        raise ConfigError(
            what=f"--min-quality {limits.min_quality:g}: there is no share of right answers",
            why=f"the files are ranked by {title_of(keys[0])} here",
            fix="pass a task with --data, or leave the limit out",
        )
    fitting = [cell for cell in usable if not exceeded(cell, limits)]
    if not fitting:
        return Choice(None, "\n".join([_nothing_fits(usable, keys, limits), *_left_out(asked, keys)]))
    best = max(fitting, key=lambda cell: (goodness(cell, keys), -cell.size_bytes))
    good = [cell for cell in fitting if not any(found.is_worse for found in against(best, cell, keys))]
    chosen = min(good, key=lambda cell: (cell.size_bytes, -_speed(cell)))
    lines = [
        *_chosen(chosen, best, keys),
        *_adapters(chosen),
        *_others(chosen, best, fitting, keys),
        *_limited(usable, fitting, limits),
        *_beside_torch(chosen, in_torch, keys),
    ]
    lines += [*_is_adapter_worth_it(chosen, cells, keys), *_cost(chosen, cells), *_studied(chosen, cells)]
    lines += _left_out(asked, keys)
    return Choice(chosen.path, "\n".join(lines), chosen.name)


def _studied(chosen: CellResult, cells: Sequence[CellResult]) -> list[str]:
    """A way that was not measured and is worth a trial at the level of what was chosen: none for an adapter that only
    torch runs over a quantized base."""
    ways = {cell.way for cell in cells}
    never_live = "torch" in ways and not ways & {"live", "patched"}
    said = None if chosen.way == "base" or never_live else advice(chosen.quant, ways)
    return [] if said is None else [said]


def exceeded(cell: CellResult, limits: Limits) -> list[str]:
    """The limits that a cell does not keep to. Memory that was not measured does not keep to any."""
    found, right, peak = [], cell.measure("right"), cell.speed.peak_bytes
    if limits.max_size_bytes is not None and cell.size_bytes > limits.max_size_bytes:
        found.append("--max-size")
    if limits.max_ram_bytes is not None and not 0 < peak <= limits.max_ram_bytes:
        found.append("--max-ram")
    if limits.min_quality is not None and (right is None or right.value < limits.min_quality):
        found.append("--min-quality")
    return found


def _chosen(chosen: CellResult, best: CellResult, keys: Sequence[str]) -> list[str]:
    about = "your task" if kind_of(keys[0]).about == "task" else "this text"
    if chosen is best:
        return [f"{chosen.name}: {_size(chosen)}, the best on {about}: {_figures(chosen, keys)}."]
    found = against(best, chosen, keys)
    is_behind = any(one.is_behind for one in found)
    near = f"less than {NEGLIGIBLE_NATS:g} nats a token behind" if is_behind else "within noise of"
    faster = f", {_speed(chosen) / _speed(best):.1f}× its speed" if _speed(chosen) > 0 and _speed(best) > 0 else ""
    return [
        f"{chosen.name}: {_size(chosen)}, {near} {best.name}, the best on {about}{faster}.",
        _sentence("; ".join(_beside(best, chosen, one) for one in found)),
    ]


def _nothing(in_torch: Sequence[CellResult], cells: Sequence[CellResult], keys: Sequence[str]) -> list[str]:
    """Why there is no file, and what torch makes of an adapter that llama.cpp is not measured with."""
    if not in_torch:
        return ["Nothing was measured from beginning to end, so nothing can be advised."]
    best = max(in_torch, key=lambda cell: (goodness(cell, keys), -cell.size_bytes))
    return [
        "Nothing that was measured is a file to ship: torch computed it.",
        f"The best of it is {best.name}: {_figures(best, keys)}.",
        *_is_adapter_worth_it(best, cells, keys),
        *_cost(best, cells),
    ]


def _beside_torch(chosen: CellResult, in_torch: Sequence[CellResult], keys: Sequence[str]) -> list[str]:
    """What torch makes of the adapter, over the same level where that was measured."""
    if not in_torch:
        return []
    other = max(in_torch, key=lambda cell: (cell.quant == chosen.quant, goodness(cell, keys)))
    found = [change for change in against(chosen, other, keys) if other.measure(change.key)]
    return [f"To compare with, {other.name}: {'; '.join(_beside(chosen, other, change) for change in found)}."]


def _adapters(chosen: CellResult) -> list[str]:
    adapters = [file.path for file in chosen.files if file.role == "adapter"]
    return [f"Ship {chosen.path} with {' and '.join(adapters)} live over it."] if adapters else []


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _beside(best: CellResult, chosen: CellResult, found: Against) -> str:
    a, b, write = best.measure(found.key), chosen.measure(found.key), kind_of(found.key).write
    assert a is not None
    assert b is not None
    return f"{title_of(found.key)} {write(b.value)} against {write(a.value)}: {found.written}"


def _others(chosen: CellResult, best: CellResult, cells: Sequence[CellResult], keys: Sequence[str]) -> list[str]:
    """When to take another one: the best, or the next smaller."""
    found = []
    if chosen is not best:
        found.append(f"Take {best.name} ({_size(best)}) if the best measured figure is worth its size.")
    smaller = [cell for cell in cells if cell.size_bytes < chosen.size_bytes]
    if smaller:
        next_ = max(smaller, key=lambda cell: (goodness(cell, keys), -cell.size_bytes))
        lost = "; ".join(str(change) for change in against(best, next_, keys) if change.is_worse)
        found.append(f"{next_.name} ({_size(next_)}) is smaller, but worse: {lost}.")
    return found


def _limited(usable: Sequence[CellResult], fitting: Sequence[CellResult], limits: Limits) -> list[str]:
    out = [cell for cell in usable if cell not in fitting]
    if not out:
        return []
    said = "; ".join(f"{cell.name}: {', '.join(exceeded(cell, limits))}" for cell in out)
    return [f"Left out by your limits: {said}."]


def _is_adapter_worth_it(chosen: CellResult, cells: Sequence[CellResult], keys: Sequence[str]) -> list[str]:
    """A warning if the base alone does as well on the task."""
    bases = [cell for cell in cells if cell.way == "base" and cell.status == "ok" and cell.measure(keys[0])]
    if chosen.way == "base" or not bases or kind_of(keys[0]).about != "task":
        return []
    base = max(bases, key=lambda cell: goodness(cell, keys))
    if any(found.is_worse for found in against(chosen, base, keys)):
        return []
    return [f"But {base.name} does as well: these rows do not show that the adapter helps."]


def before(cell: CellResult, bases: Sequence[CellResult]) -> CellResult:
    """What `cell` was before its adapter: the base alone of the same quantization if that was measured, else the
    largest."""
    return max(bases, key=lambda base: (base.quant == cell.quant, base.size_bytes))


def _cost(chosen: CellResult, cells: Sequence[CellResult]) -> list[str]:
    """What the adapter has clearly cost elsewhere: a general text, multiple choice."""
    bases = [cell for cell in cells if cell.way == "base" and cell.status == "ok"]
    if chosen.way == "base" or not bases:
        return []
    base = before(chosen, bases)
    general = [
        key for key in base.measures if kind_of(key).about == "general" and key != "bits_per_byte"
    ]  # says no more
    found = [change for change in against(base, chosen, general) if chosen.measure(change.key) and change.is_worse]
    if not found:
        return []
    said = "; ".join(_beside(base, chosen, change) for change in found)
    return [f"What it cost beside your task, against {base.name}: {said}."]


def _nothing_fits(usable: Sequence[CellResult], keys: Sequence[str], limits: Limits) -> str:
    nearest = min(usable, key=lambda cell: (len(exceeded(cell, limits)), cell.size_bytes))
    return (
        f"Nothing keeps to your limits. The nearest is {nearest.name}: {_size(nearest)}, {_figures(nearest, keys)}; "
        f"it exceeds {', '.join(exceeded(nearest, limits))}."
    )


def _left_out(cells: Sequence[CellResult], keys: Sequence[str]) -> list[str]:
    found = [
        f"{cell.name} ({'no number came out' if cell.status == 'ok' else cell.status})"
        for cell in cells
        if cell.status != "ok" or not (keys and cell.measure(keys[0]))
    ]
    return [f"Not ranked: {', '.join(found)}."] if found else []


def _figures(cell: CellResult, keys: Sequence[str]) -> str:
    return ", ".join(f"{title_of(key)} {kind_of(key).write(m.value)}" for key in keys if (m := cell.measure(key)))


def _size(cell: CellResult) -> str:
    peak = cell.speed.peak_bytes
    return size(cell.size_bytes) + (f", {size(peak)} of memory" if peak else "")


def _speed(cell: CellResult) -> float:
    speed = cell.speed.generation_tokens_per_s
    return speed if speed > 0 else 0.0  # NaN too
