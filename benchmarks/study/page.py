"""docs/which-way.md and its plot, from a summary. Every sentence about results follows from a figure by a rule."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HEAD = """# Which way to a quantized fine-tune

Written by `python benchmarks/which_way.py --room FOLDER --write` from what it measured.

A LoRA can be merged into the 16-bit model, which is then quantized; it can stay a file of its own, live over the
quantized model; and it can be trained over that quantized model to begin with. llama.cpp's users have asked since 2025
which is better (ggml-org/llama.cpp#13485). This is what was found for SmolLM2-135M, a LoRA of rank {rank} and short
trainings. The sizes of effects are this model's and these tasks' alone: `edgelora report` measures yours.
"""

STATE = """
**How far this is:** {done} of {total} results. {runs}
"""

HOW = """
## How it was measured

{tasks}

A LoRA of rank {rank} on all linear layers, {batch_rows} rows a step, the seeds {seeds}. With a seed all ways of a task
saw the same rows in the same order, and answered the same held-out rows in llama.cpp.

The base is padded with zeros from 576 to 768 columns, the same function in rows that K-quants divide. Its weights were
Q4_1 before, which would flatter types of the same grid: they are dithered by half a step, and that dithered model is
the F16 that all ways start from.

Loss is the mean −log p of an answer's token in nats, then over tasks. Differences are paired by row; their 95 %
intervals hold the chance of rows and of seeds (`benchmarks/study/reading.py`), for these tasks and no others.
*Better* and *worse* mean that an interval does not hold 0, *no difference* that it does: then these rows and seeds
cannot tell, which is no proof of equality. This page has {comparisons} intervals: of those without a difference behind
them one in twenty shows one by chance.

{certainty}

The importance matrix is of {imatrix} tokens of the task's own rows with the adapter on. Learning rates were tried for
each way on {check_task} with one seed, by the loss on its validation rows: {checked}.
Where the best of three was at the edge, one beyond was tried. Each way took its best; (1), (2) and (6) share trainings
where they took the same one.

    .venv/bin/python benchmarks/which_way.py --data DATASETS --room FOLDER --jobs 2

Rows are `TASK.train.jsonl`, `TASK.valid.jsonl` and `TASK.test.jsonl` in DATASETS. It goes on where it was
stopped; a whole study is about two and a half hours of CPU time, and this one has taken
{hours:.1f} on {processor}.
"""

QUESTIONS = """
## Question by question

Difference of loss in nats, below 0 is better; * where the interval does not hold 0.

"""

PLOT = "which-way.svg"
PICTURE = f"""
![Difference of each way to merging]({PLOT})

Bars are 95 % intervals; each level has a scale of its own.
"""
TRAINED_OVER_IT = {4, 5, 7}
# Okabe and Ito's colours, which people who see few colours can tell apart
COLORS = {2: "#0072B2", 3: "#56B4E9", 4: "#CC79A7", 5: "#E69F00", 6: "#009E73", 7: "#D55E00"}


def written(found: Mapping[str, Any]) -> str:
    """The whole text."""
    parts = [HEAD.format(**found), STATE.format(**found, runs=_runs(found))]
    if found["levels"]:
        parts += ["\n## What was found\n\n", *_readings(found), PICTURE]
        parts += [_level(found, quant) for quant in found["levels"]]
        parts.append(_questions(found))
    return "".join([*parts, _how(found), _rates(found)])


def _runs(found: Mapping[str, Any]) -> str:
    wanted = len(found["tasks"]) * len(found["seeds"])
    done = {quant: len(level["runs"]) for quant, level in found["levels"].items()}
    if done and len(done) == 5 and min(done.values()) == wanted:
        return f"Whole: every way at every level on {wanted} runs (task and seed)."
    said = ", ".join(f"{quant} {n}" for quant, n in done.items()) or "none"
    return (
        f"It is partial: of {wanted} runs (task and seed) every way was done on: {said}. Where only one seed was done, "
        "intervals hold the chance of the rows alone, and are too narrow."
    )


def _readings(found: Mapping[str, Any]) -> list[str]:
    return [f"* {_reading(quant, level)}\n" for quant, level in found["levels"].items()]


def _reading(quant: str, level: Mapping[str, Any]) -> str:
    ways, best = level["ways"], level["best"]
    sorts: dict[str, list[str]] = {"better": [], "no difference": [], "worse": []}
    for number, of in ways.items():
        if int(number) != 1:
            sorts[verdict(of["loss_against_usual"])].append(f"({number})")
    said = "; ".join(f"{name} {', '.join(some)}" for name, some in sorts.items() if some)
    as_good = ", ".join(f"({number})" for number in level["as_good"])
    near = f", not shown to be better than {as_good}" if as_good else ", better than all others"
    return (
        f"**{quant}**: {conclusion(level)} ({best}) has the lowest loss, {ways[str(best)]['loss']:.3f}{near}. Against "
        f"(1), merging: {said}."
    )


def conclusion(level: Mapping[str, Any]) -> str:
    """What to do at a level, from what is clearly better there than merging an adapter that was trained over F16."""
    better = {
        int(n) for n, of in level["ways"].items() if int(n) != 1 and verdict(of["loss_against_usual"]) == "better"
    }
    asked = {(q["b"], q["a"]): q["loss"] for q in level["questions"]}
    if better & TRAINED_OVER_IT:
        merged = asked.get((5, 4))
        kept = " and keep the adapter live" if merged is not None and verdict(merged) == "worse" else ""
        return f"Train over the very file that will run{kept}."
    if 6 in better:
        return (
            "Merge, with an importance matrix of the task; what the adapter is trained over makes no clear difference."
        )
    if better:
        return f"Take {' or '.join(f'({n})' for n in sorted(better))}."
    return "No way is shown to be better than merging: take one file, or adapters that can be switched, as you like."


def verdict(figure: Mapping[str, Any]) -> str:
    """Of a loss: lower is better."""
    if not figure["is_clear"]:
        return "no difference"
    return "better" if figure["value"] < 0 else "worse"


def _level(found: Mapping[str, Any], quant: str) -> str:
    level = found["levels"][quant]
    rows = []
    for number, of in level["ways"].items():
        usual = int(number) == 1
        rows.append([
            f"({number}) {found['ways'][number]}", f"{of['loss']:.3f}",
            "–" if usual else _interval(of["loss_against_usual"], 3),
            "–" if usual else verdict(of["loss_against_usual"]), f"{100 * of['right']:.1f}",
            "–" if usual else _interval(of["right_against_usual"], 1, 100),
        ])  # fmt: skip
    head = ["way", "loss", "against (1)", "", "right, %", "against (1), points"]
    runs = len(level["runs"])
    about = f"\n### {quant}, {level['bytes'] / 1e6:.0f} MB, {runs} run{'s' * (runs != 1)}\n\n"
    return about + markdown(head, rows) + "\n" + "".join(_broken(one) for one in level["broken"])


def _broken(run: Mapping[str, Any]) -> str:
    way = run["way"]
    return (
        f"\nOne training of ({way}), {run['task']} with seed {run['seed']}, broke down at its learning rate: loss "
        f"{run['loss']:.3f}, where the median of its seeds is {run['median']:.3f}. It is counted as it is, so that the "
        f"figures of ({way}) say little here.\n"
    )


def _questions(found: Mapping[str, Any]) -> str:
    levels = found["levels"]
    names = list(dict.fromkeys(q["what"] for level in levels.values() for q in level["questions"]))
    rows = []
    for name in names:
        cells = {
            quant: next((q for q in level["questions"] if q["what"] == name), None) for quant, level in levels.items()
        }
        pair = next(q for q in cells.values() if q is not None)
        said = ["" if q is None else f"{_interval(q['loss'], 3)}{' *' * q['loss']['is_clear']}" for q in cells.values()]
        rows.append([f"{name}: ({pair['b']}) − ({pair['a']})", *said])
    before = found["before"]
    text = QUESTIONS + markdown(["", *levels], rows) + "\n"
    if before:
        text += (
            f"\nThe adapter trained over F16, live over F16, with nothing quantized: loss {before['loss']:.3f}, "
            f"{100 * before['right']:.1f} % right.\n"
        )
    return text


def _interval(figure: Mapping[str, Any], digits: int, times: float = 1.0) -> str:
    low, high = (times * end for end in figure["interval_95"])
    return f"{times * figure['value']:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"


def _how(found: Mapping[str, Any]) -> str:
    tasks = [(t["name"], t["title"], t["steps"], t["rows"]) for t in found["tasks"]]
    checked = list(dict.fromkeys(row["at"] for row in found["rates"]))
    head, levels = ["task", "answer", "steps of training", "rows held out"], found["levels"].values()
    comparisons = sum(len(level["questions"]) + 3 * (len(level["ways"]) - 1) for level in levels)
    return HOW.format(
        tasks=markdown(head, tasks), seeds=", ".join(map(str, found["seeds"])), rank=found["rank"],
        batch_rows=found["batch_rows"], comparisons=comparisons, certainty=_certainty(found),
        check_task=found["check"]["task"], imatrix=f"{found['check']['imatrix_tokens']:,}",
        checked=f"at {checked[0]} for the levels below 4 bits, at {checked[-1]} for the others",
        hours=found["cpu_seconds"] / 3600, processor=found["processor"],
    )  # fmt: skip


def _certainty(found: Mapping[str, Any]) -> str:
    """How small a difference can be seen."""
    said = []
    for quant, level in found["levels"].items():
        halves = sorted(_half(q["loss"]) for q in level["questions"])
        said.append(f"{halves[len(halves) // 2]:.3f} at {quant}")
    seen = f"Half an interval is {', '.join(said)} (the median of the questions above). " if said else ""
    rows = sum(task["rows"] for task in found["tasks"])
    return (
        f"The budget, {len(found['seeds'])} seeds and {rows} rows, costs certainty. {seen}Smaller differences are not "
        "seen here; half of that width takes four times the rows and seeds."
    )


def _half(figure: Mapping[str, Any]) -> float:
    low, high = figure["interval_95"]
    return float(high - low) / 2


def _rates(found: Mapping[str, Any]) -> str:
    tried = sorted({rate for row in found["rates"] for rate in row["losses"]}, key=float)
    rows = []
    for row in found["rates"]:
        losses, own = row["losses"], sorted(row["losses"], key=float)
        chosen = "–" if row["chosen"] is None else f"{row['chosen']:g}"
        edge = " (the edge of what was tried)" if chosen in (own[0], own[-1]) else ""
        told = [f"{losses[rate]:.3f}" if losses.get(rate) is not None else "–" for rate in tried]
        rows.append([f"({row['way']})", row["at"], *told, chosen + edge])
    return "\n" + markdown(["way", "at", *(f"loss at {rate}" for rate in tried), "taken"], rows) + "\n"


def markdown(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)])


def svg(found: Mapping[str, Any]) -> str:
    """A panel for each level: the difference of each way's loss to (1), with its interval."""
    import matplotlib
    from matplotlib.figure import Figure

    levels = found["levels"]
    buffer = io.StringIO()
    # the same figures, the same bytes
    with matplotlib.rc_context({"svg.hashsalt": "which-way", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(2.1 * len(levels) + 0.6, 3.2), layout="constrained")
        panels = figure.subplots(1, len(levels), squeeze=False)[0]
        for axes, (quant, level) in zip(panels, levels.items(), strict=True):
            _panel(axes, quant, level)
        panels[0].set_ylabel("loss against (1), nats; lower is better")
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def _panel(axes: Axes, quant: str, level: Mapping[str, Any]) -> None:
    others = [number for number in level["ways"] if int(number) != 1]
    for x, number in enumerate(others):
        found = level["ways"][number]["loss_against_usual"]
        low, high = found["interval_95"]
        color = COLORS[int(number)]
        axes.plot([x, x], [low, high], color=color, linewidth=1.5)
        axes.plot([x], [found["value"]], "o", color=color, markersize=5)
    axes.axhline(0, color="#777777", linewidth=0.8)
    axes.set_xticks(range(len(others)), [f"({number})" for number in others])
    axes.set_title(quant)
    axes.spines[["top", "right"]].set_visible(False)
