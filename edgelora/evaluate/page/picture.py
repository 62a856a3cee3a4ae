"""The drawings as a PNG, painted by matplotlib shape by shape."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from edgelora.evaluate.cells import WAYS
from edgelora.evaluate.page.plot import Bubble, Drawing, Line, Text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, which people who see few colours can tell apart; the page's style sheet has the same
COLORS = {
    "base": "#777777", "live": "#0072B2", "patched": "#E69F00", "merged": "#D55E00", "imatrix": "#009E73",
    "trained": "#CC79A7", "torch": "#56B4E9",
}  # fmt: skip
DOTS_PER_INCH = 100
LEGEND_PIXELS = 30.0
POINT = 0.72  # of a pixel, at 100 dots per inch
FADED = 0.3


def png(drawings: Sequence[Drawing]) -> bytes:
    """One below the other, at twice their pixels, a legend at the foot. There must be one at least."""
    import matplotlib
    from matplotlib.figure import Figure

    # what it says of fonts on its first run would stand in the middle of the display
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    width, height = max(d.width for d in drawings), sum(d.height for d in drawings) + LEGEND_PIXELS
    buffer = io.BytesIO()
    with matplotlib.rc_context(), warnings.catch_warnings(action="ignore"):  # of letters that the font lacks
        matplotlib.rcdefaults()
        matplotlib.rcParams["text.parse_math"] = False  # a $ in a name is no formula
        figure = Figure(figsize=(width / DOTS_PER_INCH, height / DOTS_PER_INCH), dpi=2 * DOTS_PER_INCH)
        top = height
        for drawing in drawings:
            top -= drawing.height
            axes = figure.add_axes((0, top / height, drawing.width / width, drawing.height / height))
            axes.set(xlim=(0, drawing.width), ylim=(drawing.height, 0))
            axes.axis("off")
            for order, shape in enumerate(drawing.shapes):
                _paint(axes, shape, order)
        ways = [way for way in WAYS if any(way in drawing.ways for drawing in drawings)]
        narrow = min(1.0, 5 / len(ways))  # five of them fill a line
        for i, way in enumerate(ways):
            x, size = (52 + i * 130 * narrow) / width, 12 * POINT * narrow
            figure.text(x, 12 / height, f"● {WAYS[way]}", color=COLORS[way], fontsize=size)
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _paint(axes: Axes, shape: Line | Bubble | Text, order: int) -> None:
    if isinstance(shape, Line):
        color, width, style = {
            "grid": ("#dddddd", 0.6, "-"), "axis": ("#555555", 1.0, "-"), "frontier": ("#555555", 1.2, "--"),
            "whisker": (COLORS.get(shape.way, "#555555"), 1.2, "-"),
        }[shape.role]  # fmt: skip
        xs, ys = zip(*shape.points, strict=True)
        axes.plot(xs, ys, style, color=color, linewidth=width, alpha=FADED if shape.is_faded else 1.0, zorder=order)
    elif isinstance(shape, Bubble):
        edge = ("#000000", 2.0) if shape.is_chosen else ("#ffffff", 0.8)
        axes.plot(
            [shape.x], [shape.y], "o", markersize=2 * shape.radius * POINT, color=COLORS[shape.way],
            alpha=FADED if shape.is_faded else 0.9, markeredgecolor=edge[0], markeredgewidth=edge[1], zorder=order,
        )  # fmt: skip
    else:
        axes.text(
            shape.x, shape.y, shape.text, fontsize=12 * POINT, zorder=order, alpha=0.55 if shape.is_faded else 1.0,
            ha={"start": "left", "middle": "center", "end": "right"}[shape.anchor], va="baseline",
            fontweight="bold" if shape.role == "title" else "normal",
            color="#555555" if shape.role == "tick" else "#000000",
            bbox={"boxstyle": "square,pad=0.05", "color": "#ffffff", "alpha": 0.7} if shape.role == "label" else None,
        )  # fmt: skip
