"""The pictures of a run and of a sweep: what lies on their axes is what was measured."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest

pytest.importorskip("matplotlib", reason="pip install matplotlib")
from matplotlib.figure import Figure

from edgelora.errors import OutputError
from edgelora.progress import Smoothed
from edgelora.training.curve import UNITS, Trial, draw_curve, sweep_plot
from edgelora.training.metrics import Metrics
from edgelora.training.objectives import OBJECTIVES

RUN = [
    Metrics(0, 0.0, held_out_loss=3.0),
    Metrics(1, 0.25, 2.0, learning_rate=1e-4),
    Metrics(2, 0.5, 1.0, 0.9, 2e-4),
    Metrics(3, 0.75, math.nan, math.inf, 1.5e-4),
    Metrics(4, 1.0, 0.5, 0.95, 1e-4),
]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were written, to look at what is on them."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda f, *a, **k: (figures.append(f), save(f, *a, **k)))
    return figures


def lines(axes):
    """{label: [(x, y)]} of what is drawn; lines without a label of their own count by number."""
    return {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes.lines}


# -- what lies on the axes ----------------------------------------------------------------------------------------


def test_the_curve_shows_what_was_measured_and_nothing_that_is_not_finite(drawn, tmp_path):
    draw_curve(tmp_path / "curve.png", RUN, "base · lora, rank 4")
    upper, lower = drawn[0].axes
    average = Smoothed()
    smooth = [(step, average.add(loss)) for step, loss in ((1, 2.0), (2, 1.0), (4, 0.5))]
    assert lines(upper) == {
        "training, each step": [(1, 2.0), (2, 1.0), (4, 0.5)],
        "training, smoothed": smooth,
        "held out": [(0, 3.0), (2, 0.9), (4, 0.95)],
        "best: 0.9000, step 2": [(2, 0.9)],
        "skipped": [(3, 0)],
    }
    assert list(lines(lower).values()) == [[(1, 1e-4), (2, 2e-4), (3, 1.5e-4), (4, 1e-4)]]
    assert upper.get_title(loc="left") == "base · lora, rank 4"


@pytest.mark.parametrize(("losses", "from_zero"), [((3.0, 1.0), True), ((3.0, 2.9), False), ((-1.0, 1.0), False)])
def test_the_axis_begins_at_zero_where_the_losses_fall_far(drawn, tmp_path, losses, from_zero):
    draw_curve(tmp_path / "curve.png", [Metrics(i, 0.0, loss) for i, loss in enumerate(losses)], "")
    bottom, top = drawn[0].axes[0].get_ylim()
    assert (bottom == 0) == from_zero
    assert bottom <= min(losses) < max(losses) <= top  # nothing lies outside


def test_a_sweep_shows_every_trial_as_it_was_ranked_and_the_stopped_dashed(drawn, tmp_path):
    trials = [
        Trial("rank 8", [(10, 1.9), (20, 1.2), (30, 1.3)], 1.3), Trial("rank 4", [(10, 2.0), (20, 1.1)], 1.1, True),
        Trial("rank 16", [(10, math.nan)], math.inf, stopped=True),
    ]  # fmt: skip
    sweep_plot(tmp_path / "sweep.png", trials, "a sweep")
    axes = drawn[0].axes[0]
    assert list(lines(axes).items()) == [
        ("rank 8: 1.3000", [(10, 1.9), (20, 1.2), (30, 1.3)]),  # of its end, by which it was judged
        ("rank 4: 1.1000 (stopped)", [(10, 2.0), (20, 1.1)]),
        ("rank 16: not finite (stopped)", []),
    ]
    assert [line.get_linestyle() for line in axes.lines] == ["-", "--", "--"]


@pytest.mark.parametrize(("objective", "unit"), [("sft", "nats per token"), ("dpo", "per pair"), ("kto", "per row")])
def test_a_loss_is_told_with_what_it_is_a_mean_over(drawn, tmp_path, objective, unit):
    draw_curve(tmp_path / "curve.png", RUN, "a run", objective)
    sweep_plot(tmp_path / "sweep.png", [Trial("a", [(1, 2.0)], 2.0)], "a sweep", objective)
    assert drawn[0].axes[0].get_ylabel() == f"loss ({unit})"
    assert drawn[1].axes[0].get_ylabel() == f"held-out loss ({unit})"


def test_a_single_step_is_seen_on_both_axes(drawn, tmp_path):
    draw_curve(tmp_path / "curve.png", [Metrics(1, 0.1, 2.0, learning_rate=1e-4)], "a run")
    upper, lower = drawn[0].axes
    assert {line.get_marker() for line in (upper.lines[0], lower.lines[0])} == {"."}


def test_every_objective_has_a_unit():
    assert set(UNITS) == set(OBJECTIVES)


# -- the file -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metrics", [[], RUN[:1], RUN[1:2], RUN])
@pytest.mark.parametrize("title", ["a", "$x^$_ {} 模型"])
def test_a_picture_is_written_whatever_there_is_so_far(tmp_path, capsys, metrics, title):
    path = tmp_path / "curve.png"
    path.write_bytes(b"the last one")
    draw_curve(path, metrics, title)
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert [f.name for f in tmp_path.iterdir()] == ["curve.png"]
    assert "".join(capsys.readouterr()) == ""


def test_the_same_run_draws_the_same_bytes_whatever_a_person_has_set(tmp_path):
    import matplotlib

    draw_curve(tmp_path / "a.png", RUN, "a")
    with matplotlib.rc_context({"axes.facecolor": "black", "lines.linewidth": 9}):
        draw_curve(tmp_path / "b.png", RUN, "a")
        assert matplotlib.rcParams["axes.facecolor"] == "black"
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_drawing_that_fails_leaves_the_last_one(tmp_path, monkeypatch):
    path = tmp_path / "curve.png"
    path.write_bytes(b"the last one")
    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(OutputError, match="No space left"):
        draw_curve(path, RUN, "a")
    assert path.read_bytes() == b"the last one"
    assert [f.name for f in tmp_path.iterdir()] == ["curve.png"]


def full(*_, **__):
    raise OSError(28, "No space left on device")


def test_matplotlib_is_loaded_for_the_first_picture_and_never_its_windows(tmp_path):
    code = (
        "import sys; from pathlib import Path; from edgelora.training.curve import draw_curve\n"
        "assert 'matplotlib' not in sys.modules\n"
        "draw_curve(Path(sys.argv[1]), [], 'a')\n"
        "assert 'matplotlib.pyplot' not in sys.modules and 'tkinter' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "c.png")], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_what_matplotlib_says_of_its_own_folders_is_in_nobodys_way(tmp_path):
    """As where a home is read-only: each line of stderr is an event for a program that listens."""
    code = (
        "import sys; from pathlib import Path; from edgelora.training.curve import draw_curve\n"
        "draw_curve(Path(sys.argv[1]), [], 'a')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "c.png")], capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, "MPLCONFIGDIR": "/proc/none"},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
