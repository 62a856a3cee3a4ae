"""Quality over size as a list of shapes, which `svg` and `picture` paint: bubbles, whiskers, the frontier, labels.

Upwards is always better: the axis of what should be low is turned over. Knows nothing of colours.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from edgelora.evaluate.cells import CellResult
from edgelora.evaluate.measures import kind_of, title_of
from edgelora.evaluate.pareto import frontier

LEFT, RIGHT, TOP, BOTTOM = 52.0, 16.0, 34.0, 44.0  # margins in pixels
SMALLEST, LARGEST = 4.0, 15.0  # radius of a bubble
LETTER, LINE = 7.2, 14.0  # of a label: the width of a letter, the height of a line
FAR = 0.6  # a base alone is drawn if it is no farther off than this share of the others' span


@dataclass(frozen=True)
class Line:
    """`role`: axis, grid, whisker or frontier."""

    points: tuple[tuple[float, float], ...]
    role: str
    way: str = ""
    is_faded: bool = False


@dataclass(frozen=True)
class Bubble:
    """A cell, in pixels; its area tells its speed."""

    x: float
    y: float
    radius: float
    way: str
    is_faded: bool
    is_chosen: bool
    title: str


@dataclass(frozen=True)
class Text:
    """`anchor`: start, middle or end; `role`: tick, title or label. `y` is the base line."""

    x: float
    y: float
    text: str
    anchor: str = "middle"
    role: str = "tick"
    is_faded: bool = False


@dataclass(frozen=True)
class Drawing:
    """Pixels from the upper left corner. `far`: cells that are too far off to draw, and where."""

    width: float
    height: float
    title: str
    shapes: tuple[Line | Bubble | Text, ...]
    ways: tuple[str, ...]
    speeds: tuple[float, float] | None
    far: tuple[str, ...]


@dataclass(frozen=True)
class Axis:
    """Values low … high on pixels start … end."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        """The pixel of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round numbers, eight steps of them at most."""
        span = self.high - self.low
        size = 10.0 ** math.floor(math.log10(span / 8))
        step = next(size * m for m in (1, 2, 5, 10) if span / (size * m) <= 8)
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def pareto_plot(cells: Sequence[CellResult], key: str, chosen: str, width: float, height: float) -> Drawing | None:
    """Quality by `key` over size; None if fewer than two cells have both."""
    usable = [cell for cell in cells if cell.status == "ok" and cell.size_bytes > 0 and cell.measure(key)]
    shown = _near([cell for cell in usable if cell.way != "base"], [cell for cell in usable if cell.way == "base"], key)
    if len(shown) < 2:
        return None
    x, y = _axes(shown, key, width, height)
    best = [cell for cell in frontier(usable, key) if cell in shown]
    shapes: list[Line | Bubble | Text] = [*_frame(x, y, key)]
    if len(best) > 1:
        shapes.append(Line(tuple((x.at(c.size_bytes / 1e6), y.at(_value(c, key))) for c in best), "frontier"))
    bubbles = [_bubble(cell, key, (x, y), cell not in best, cell.name == chosen, shown) for cell in shown]
    shapes += [line for cell in shown for line in _whisker(cell, key, (x, y), cell not in best)]
    lines = [shape for shape in shapes if isinstance(shape, Line) and shape.role in ("frontier", "whisker")]
    shapes += [*sorted(bubbles, key=_radius, reverse=True)]  # the small ones in front
    shapes += _labels(bubbles, [cell.quant for cell in shown], lines, (x, y))
    speeds = [cell.speed.generation_tokens_per_s for cell in shown if cell.speed.generation_tokens_per_s > 0]
    return Drawing(
        width, height, f"{title_of(key)} over size", tuple(shapes), tuple(dict.fromkeys(cell.way for cell in shown)),
        (min(speeds), max(speeds)) if speeds else None,
        tuple(f"{cell.name} {kind_of(key).write(_value(cell, key))}" for cell in usable if cell not in shown),
    )  # fmt: skip


def _radius(bubble: Bubble) -> float:
    return bubble.radius


def _value(cell: CellResult, key: str) -> float:
    found = cell.measure(key)
    assert found is not None
    return found.value


def _near(others: Sequence[CellResult], bases: Sequence[CellResult], key: str) -> list[CellResult]:
    """All, without the bases alone that would press the others into a line."""
    if len(others) < 2:
        return [*others, *bases]
    values = [_value(cell, key) for cell in others]
    room = FAR * (max(values) - min(values))
    near = [cell for cell in bases if min(values) - room <= _value(cell, key) <= max(values) + room]
    return [*near, *others]


def _axes(cells: Sequence[CellResult], key: str, width: float, height: float) -> tuple[Axis, Axis]:
    sizes = [cell.size_bytes / 1e6 for cell in cells]
    bounds = [bound for cell in cells for bound in _interval(cell, key)]
    x_low, x_high = _padded(min(sizes), max(sizes), 0.1)
    y_low, y_high = _padded(min(bounds), max(bounds), 0.08)
    if kind_of(key).is_share:
        y_low, y_high = max(y_low, -0.04), min(y_high, 1.04)
    x = Axis(max(x_low, 0), x_high, LEFT, width - RIGHT)
    down, up = height - BOTTOM, TOP
    return x, Axis(y_low, y_high, down, up) if kind_of(key).better > 0 else Axis(y_low, y_high, up, down)


def _padded(low: float, high: float, share: float) -> tuple[float, float]:
    room = (high - low) * share or abs(high) * share or 1.0
    return low - room, high + room


def _interval(cell: CellResult, key: str) -> tuple[float, float]:
    """The interval with the value in it; the value alone where there is none."""
    found = cell.measure(key)
    assert found is not None
    bounds = [bound for bound in found.interval_95 or () if math.isfinite(bound)] + [found.value]
    return min(bounds), max(bounds)


def _frame(x: Axis, y: Axis, key: str) -> list[Line | Text]:
    bottom, kind = max(y.start, y.end), kind_of(key)
    shapes: list[Line | Text] = []
    for value in y.ticks():
        at = y.at(value)
        shapes.append(Line(((x.start, at), (x.end, at)), "grid"))
        shapes.append(Text(x.start - 7, at + 4, f"{value:.3g}" if kind.better < 0 else f"{100 * value:.3g}%", "end"))
    shapes.append(Line(((x.start, bottom), (x.end, bottom)), "axis"))
    shapes += [Text(x.at(value), bottom + 17, f"{value:g}") for value in x.ticks()]
    shapes.append(Text(x.end, bottom + 36, "MB to ship", "end", "title"))
    up = "higher is better" if kind.better > 0 else "lower is better, so it is drawn higher"
    shapes.append(Text(4, 16, f"{title_of(key)} ({up})", "start", "title"))
    return shapes


def _bubble(
    cell: CellResult, key: str, axes: tuple[Axis, Axis], is_faded: bool, is_chosen: bool, all_: Sequence[CellResult]
) -> Bubble:
    """Its area goes with the speed of generation."""
    found, kind = cell.measure(key), kind_of(key)
    assert found is not None
    speed = cell.speed.generation_tokens_per_s
    fastest = max((c.speed.generation_tokens_per_s for c in all_ if c.speed.generation_tokens_per_s > 0), default=1.0)
    radius = max(SMALLEST, LARGEST * math.sqrt(speed / fastest)) if speed > 0 else SMALLEST
    title = f"{cell.name}: {cell.size_bytes / 1e6:.1f} MB, {title_of(key)} {kind.write(found.value)}"
    if found.interval_95:
        title += f" (95 %: {' … '.join(kind.write(bound) for bound in found.interval_95)})"
    title += f", {speed:.0f} tokens/s" if speed > 0 else ""
    return Bubble(
        axes[0].at(cell.size_bytes / 1e6), axes[1].at(found.value), radius, cell.way, is_faded and not is_chosen,
        is_chosen, title,
    )  # fmt: skip


def _whisker(cell: CellResult, key: str, axes: tuple[Axis, Axis], is_faded: bool) -> list[Line]:
    low, high = _interval(cell, key)
    if low == high:
        return []
    x, ends = axes[0].at(cell.size_bytes / 1e6), (axes[1].at(low), axes[1].at(high))
    caps = [((x - 3, end), (x + 3, end)) for end in ends]
    return [Line(points, "whisker", cell.way, is_faded) for points in (((x, ends[0]), (x, ends[1])), *caps)]


Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""


def _labels(
    bubbles: Sequence[Bubble], names: Sequence[str], lines: Sequence[Line], axes: tuple[Axis, Axis]
) -> list[Text]:
    """Each beside its bubble, where it covers least of all else."""
    taken = [(b.x - b.radius, b.y - b.radius, b.x + b.radius, b.y + b.radius) for b in bubbles]
    taken += [box for line in lines for box in _along(line)]
    found = []
    for bubble, name in sorted(zip(bubbles, names, strict=True), key=lambda pair: (not pair[0].is_chosen, pair[0].x)):
        wide, gap = len(name) * LETTER, bubble.radius + 4
        places = [(bubble.x + gap, bubble.y + 4), (bubble.x - gap - wide, bubble.y + 4)]
        places += [
            (bubble.x + side, bubble.y + down)
            for down in (-gap, gap + 10, -gap - LINE, gap + 10 + LINE)
            for side in (-wide / 2, 4, -wide - 4)
        ]
        boxes = [(left - 3, low - 11, left + wide + 3, low + 3) for left, low in places]
        box = min(boxes, key=lambda one: sum(_shared(one, other) for other in taken) + _outside(one, axes))
        taken.append(box)
        found.append(Text(box[0] + 3, box[3] - 3, name, "start", "label", bubble.is_faded))
    return found


def _along(line: Line) -> list[Box]:
    """Small boxes on its way, for what should not cover it."""
    found = []
    for (x0, y0), (x1, y1) in itertools.pairwise(line.points):
        n = max(1, round(math.hypot(x1 - x0, y1 - y0) / 6))
        points = [(x0 + (x1 - x0) * i / n, y0 + (y1 - y0) * i / n) for i in range(n + 1)]
        found += [(x - 2, y - 2, x + 2, y + 2) for x, y in points]
    return found


def _shared(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _outside(box: Box, axes: tuple[Axis, Axis]) -> float:
    """How much of a label leaves the frame, more weighty than covering another."""
    x, y = axes
    top, bottom = min(y.start, y.end), max(y.start, y.end)
    inside = _shared(box, (x.start, top, x.end, bottom))
    return 10 * ((box[2] - box[0]) * (box[3] - box[1]) - inside)
