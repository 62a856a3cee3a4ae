"""`curve.png`: the losses of a run over its steps; and the trials of a sweep beside each other."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgelora.files.atomic import staged
from edgelora.progress import Smoothed
from edgelora.training.metrics import Metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE_INCHES, DPI = (9.0, 5.4), 120
# Okabe and Ito's colours, which people who see few colours can tell apart
TRAINING, HELD_OUT, BEST, RATE = "#0072B2", "#D55E00", "#009E73", "#777777"
# what the loss of an objective is a mean over; by name, since a sweep draws without torch
UNITS = {"sft": "nats per token", "dpo": "per pair", "ipo": "per pair", "orpo": "per pair", "kto": "per row"}
TRIALS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


@dataclass(frozen=True)
class Trial:
    """One trial of a sweep: its settings in a word, its held-out losses by step, and whether it was stopped early.

    loss: the one of them that the sweep judged it by; infinite where there is none.
    """

    name: str
    held_out: Sequence[tuple[int, float]]
    loss: float
    stopped: bool = False


def draw_curve(path: Path, metrics: Sequence[Metrics], title: str, objective: str = "sft") -> None:
    """Write the picture of a run with this objective, in the place of the last one.

    The training loss of each step light, its moving average strong; held-out losses as points, the best one marked;
    the learning rate below. Steps that were skipped are ticks on the lower edge. Raises OutputError.
    """
    with _picture(path) as figure:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(5, 1))
        _losses(upper, metrics)
        _begin_honestly(upper)
        upper.set_title(title, loc="left", fontsize=11)
        upper.set_ylabel(f"loss ({UNITS[objective]})")
        rates = [(m.step, m.learning_rate) for m in metrics if m.learning_rate is not None]
        lower.plot(*_columns(rates), marker=_marker(rates), color=RATE, linewidth=1.2)
        lower.set_ylim(bottom=0)
        lower.set_ylabel("learning\nrate", fontsize=8)
        lower.yaxis.set_major_formatter("{x:g}")
        lower.tick_params(axis="y", labelsize=8)
        lower.set_xlabel("step")


def sweep_plot(path: Path, trials: Sequence[Trial], title: str, objective: str = "sft") -> None:
    """Write the held-out loss of every trial over its steps; those that were stopped early are dashed.

    `trials` come as they were ranked, the best one first, and so they stand in the legend. Raises OutputError.
    """
    with _picture(path) as figure:
        axes = figure.subplots()
        for i, trial in enumerate(trials):
            loss = f"{trial.loss:.4f}" if math.isfinite(trial.loss) else "not finite"
            axes.plot(
                *_columns(_finite(trial.held_out)), marker="o", markersize=4, linewidth=2.4 if i == 0 else 1.4,
                color=TRIALS[i % len(TRIALS)], linestyle="--" if trial.stopped else "-", zorder=2 + len(trials) - i,
                label=f"{trial.name}: {loss}{' (stopped)' if trial.stopped else ''}",
            )  # fmt: skip
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_xlabel("step")
        axes.set_ylabel(f"held-out loss ({UNITS[objective]})")
        axes.legend(frameon=False, fontsize=8)


@contextmanager
def _picture(path: Path) -> Iterator[Figure]:
    """A figure that becomes the PNG at `path`. Needs no display, and no settings of the person's own change it."""
    # what it says of fonts and of its own folders would stand in the middle of the display
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with staged(path, overwrite=True) as draft, matplotlib.rc_context(), warnings.catch_warnings(action="ignore"):
        matplotlib.rcdefaults()
        matplotlib.rcParams["text.parse_math"] = False  # a $ in the name of a file is no formula
        figure = Figure(figsize=SIZE_INCHES, dpi=DPI, layout="constrained")
        yield figure
        for axes in figure.axes:
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="y", alpha=0.25)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.savefig(draft, format="png", metadata={"Software": None})


def _losses(axes: Axes, metrics: Sequence[Metrics]) -> None:
    average = Smoothed()
    raw = _finite([(m.step, m.loss) for m in metrics if m.loss is not None])
    axes.plot(
        *_columns(raw), marker=_marker(raw), color=TRAINING, alpha=0.3, linewidth=0.9, label="training, each step"
    )
    smooth = [(step, average.add(loss)) for step, loss in raw]
    axes.plot(*_columns(smooth), color=TRAINING, linewidth=2.0, label="training, smoothed")
    held_out = _finite([(m.step, m.held_out_loss) for m in metrics if m.held_out_loss is not None])
    if held_out:
        axes.plot(*_columns(held_out), "o-", color=HELD_OUT, linewidth=1.0, markersize=5, label="held out")
        step, loss = min(held_out, key=lambda point: point[1])
        axes.plot([step], [loss], "*", color=BEST, markersize=15, zorder=5, label=f"best: {loss:.4f}, step {step}")
    skipped = [m.step for m in metrics if m.loss is not None and not math.isfinite(m.loss)]
    if skipped:
        edge = axes.get_xaxis_transform()
        axes.plot(skipped, [0] * len(skipped), "|", color="red", transform=edge, clip_on=False, label="skipped")
    axes.legend(frameon=False, fontsize=8)


def _marker(points: Sequence[tuple[int, float]]) -> str:
    """Of few points: a single one has no line."""
    return "." if len(points) < 20 else ""


def _begin_honestly(axes: Axes) -> None:
    """From 0 where the losses fall that far; an axis that begins higher makes a small fall look large."""
    low, high = axes.dataLim.intervaly
    if 0 <= low < high / 2:
        axes.set_ylim(bottom=0)


def _finite(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    return [(step, loss) for step, loss in points if math.isfinite(loss)]


def _columns(points: Sequence[tuple[int, Any]]) -> tuple[list[int], list[Any]]:
    return [step for step, _ in points], [value for _, value in points]
