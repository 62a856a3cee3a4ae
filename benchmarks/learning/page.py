"""docs/methods.md, from a summary. What it says of results follows from figures by the rules of learning/claims.py."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import Any

from study.page import markdown

from learning.rows import BEYOND, MARKS, OF_SOURCE, Q4_0, Q4_1

HEAD = """# What each method learns, and what it costs

Written by `python benchmarks/methods.py --page` from `benchmarks/results/methods.json`.

Every row of `edgelora methods`, trained on SmolLM2-135M with the same rows for as many steps. It is one small model,
two tasks and short trainings: of larger ones it says little. `edgelora train --sweep` compares on your own rows.

**How far this is:** {done} of {total} results. {state}
"""

CLAIMS = """
## The papers' claims

{claims}

*Confirmed here*: the whole 95 % interval of the difference is below 0 (of a speed: above 1.5). *Not confirmed*: all of
it is above −{margin} nats (of a speed: below 1.5), so that whatever is gained is less than that. *Not decidable at this
size*: neither, these rows and seeds cannot tell. Both sides of a claim have the learning rate that was best for each.
An interval holds the chance of seeds, and at the end that of the rows held out too, for these two tasks and no others.
Of {n_claims} intervals without anything behind them one in twenty shows something by chance.

A loss by a step is that of training, the mean of the {window} steps until there: each step's rows were not learned from
before it. A speed is how many times fewer steps are needed until such a mean is as low as the other's last one, and 1
where it never is.
"""

TABLES = """
## Over the Q4_1 file

{q4_1}

The loss is the mean −log p (nats) of an answer's token over {test_rows} rows held out, ± the deviation over seeds
(their number). Before any training it is {before_q4_1}. *Against lora* is the mean difference over both
tasks on the same seeds with its 95 % interval, below 0 where less is lost than with lora, * where it does not hold 0;
of one seed it holds the chance of the rows alone, and is too narrow. *Memory* is the highest of the process, with all
that Python and torch take. *File* is the GGUF that the adapter leaves as (F16), or, where it leaves as none (†), its
tensors as they are kept (float32). ‡: it changes weights, and had those of the file held as float32, not as blocks.

{times}

## Over Q4_0, quantized from 16 bits

{q4_0}

QLoRA, LoftQ and QPiSSA differ in what quantization took away, so there must be a model before it. SmolLM2 is here as
Q4_1 alone: that file, dithered by half a step to leave its grid, is the F16 that these start from. `qlora` is a LoRA
over its Q4_0, `loftq` begins there at what was lost, and `qpissa` is over the Q4_0 of what its 16 leading ranks leave
(`edgelora residual`). Before any training the loss over the Q4_0 is {before_q4_0}.
A step of each is that of a LoRA, and was not timed again. `dora` above is QDoRA: its base is quantized too.
"""

HOW = """
## How it was measured

{tasks}

{steps} steps of {batch_rows} rows, no row twice, and the rows of a seed in the same order for all. The learning rate
rises over {warmup} steps and falls to 0. Rank and α are the method's own. At rank 16 rsLoRA with its own α is LoRA
number by number, so both are compared at rank 64. The rows of `token_rows` are those of {marks},
in the same model with a head of its own (`edgelora untie`). Scores are torch's over float32 products, since some
methods run nowhere else.

Learning rates: the method's own (in its file, `edgelora/peft`), three times it and a third of it were tried on
{check_task} with one seed, by the loss on {valid_rows} validation rows; for as long as the best was at the edge of what
was tried, the one beyond as well, up to ×{furthest:g}. All of a row's figures are at the best.

{rates}

    .venv/bin/python benchmarks/methods.py --data DATASETS --room FOLDER --jobs 1

Rows are `TASK.train.jsonl`, `TASK.valid.jsonl` and `TASK.test.jsonl` in DATASETS. It goes on where it was
stopped; this has taken {hours:.1f} hours of CPU time on {processor}.
"""


def written(found: Mapping[str, Any]) -> str:
    """The whole text."""
    before = {over: _before(found, over) for over in (Q4_1, Q4_0)}
    return "".join([
        HEAD.format(**found, state=_state(found)),
        CLAIMS.format(claims=_claims(found), n_claims=len(found["claims"]), **found_of(found, "margin", "window")),
        TABLES.format(
            q4_1=_table(found, OF_SOURCE), q4_0=_table(found, (Q4_0, "rest")), times=_times(found),
            before_q4_1=before[Q4_1], before_q4_0=before[Q4_0], test_rows=found["test_rows"],
        ),
        HOW.format(
            tasks=markdown(["task", "answer"], [(t["name"], t["title"]) for t in found["tasks"]]), rates=_rates(found),
            hours=found["cpu_seconds"] / 3600, marks=" and ".join(f"`{mark}`" for mark in MARKS.train_tokens),
            **found_of(found, "steps", "batch_rows", "warmup", "check_task", "valid_rows", "processor"),
            furthest=max(BEYOND.values()),
        ),
    ])  # fmt: skip


def found_of(found: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: found[name] for name in names}


def _state(found: Mapping[str, Any]) -> str:
    said = [
        "It is whole." if found["done"] == found["total"] else "It is partial: figures may change, claims are open."
    ]
    if found["missing"]:
        said.append(f"Not trained yet, or not trainable here: {'; '.join(found['missing'])}.")
    said += [f"{name} failed: {why}." for name, why in found["failed"].items()]
    return " ".join(said)


def _claims(found: Mapping[str, Any]) -> str:
    rows = [
        (f"{claim['what']} ({claim['paper']})", _figure(claim), claim["runs"], f"**{claim['verdict']}**")
        for claim in found["claims"]
    ]
    return markdown(["claim", "difference, or times as fast", "runs", ""], rows)


def _figure(claim: Mapping[str, Any]) -> str:
    figure = claim["figure"]
    if figure is None:
        return "–"
    if claim["unit"] == "nats":
        return _interval(figure)
    value, low, high = (math.exp(number) for number in (figure["value"], *figure["interval_95"]))
    return f"{value:.2f} ({low:.2f} to {high:.2f})"


def _interval(figure: Mapping[str, Any]) -> str:
    low, high = figure["interval_95"]
    return f"{figure['value']:+.3f} ({low:+.3f} to {high:+.3f})"


def _table(found: Mapping[str, Any], overs: Sequence[str]) -> str:
    tasks, own = [task["name"] for task in found["tasks"]], [row for row in found["rows"] if row["over"] in overs]
    if not own:
        return "Nothing yet."
    reference = own[0]["against"]
    head = [
        "method", *(f"loss, {task}" for task in tasks), f"against {reference}", "rank", "trained", "step, × lora",
        "memory, MB", "file, MB",
    ]  # fmt: skip
    rows = [
        (
            f"{row['name']}{' ‡' * (row['held'] == 'f32')}", *(_loss(row["by_task"].get(task)) for task in tasks),
            _against(row), row["rank"] or "–", f"{row['trained']:,}", _step(row), f"{row['peak_bytes'] / 1e6:.0f}",
            f"{row['artefact_bytes'] / 1e6:.2f}{' †' * (row['artefact'] != 'GGUF')}",
        )
        for row in own
    ]  # fmt: skip
    return markdown(head, rows)


def _loss(of_task: Mapping[str, Any] | None) -> str:
    if of_task is None:
        return "–"
    spread = "" if of_task["spread"] is None else f" ± {of_task['spread']:.3f} ({of_task['seeds']})"
    return f"{of_task['loss']:.3f}{spread}"


def _against(row: Mapping[str, Any]) -> str:
    figure = row["difference"]
    return "–" if figure is None else f"{_interval(figure)}{' *' * figure['is_clear']}"


def _step(row: Mapping[str, Any]) -> str:
    step = row["step"]
    return f"{step['seconds'] / step['beside']:.2f}" if step else "–"


def _times(found: Mapping[str, Any]) -> str:
    timed = next((row["step"] for row in found["rows"] if row["step"]), None)
    if timed is None:
        return "Steps were not timed yet."
    threads = f"{timed['threads']} thread{'s' * (timed['threads'] != 1)}"
    return fill(
        f"*Step* is the median of {timed['rounds']} steps of {found['batch_rows']} rows over that of a LoRA of rank "
        "16, each with a step in every round of one process, so that what else the machine does falls on all. The "
        "first round, in which GaLore finds its directions, is left out. "
        f"The LoRA's step took {timed['beside']:.2f} s with {threads}.",
        width=120,
    )


def _before(found: Mapping[str, Any], over: str) -> str:
    known = {task: loss for task, loss in found["before"][over].items() if loss is not None}
    return ", ".join(f"{loss:.3f} ({task})" for task, loss in known.items()) or "not measured yet"


def _rates(found: Mapping[str, Any]) -> str:
    factors = sorted({factor for row in found["rates"] for factor in row["losses"]}, key=float)
    if not factors:
        return "Nothing yet."
    rows = []
    for row in found["rates"]:
        losses, own = row["losses"], sorted(row["losses"], key=float)
        chosen, taken = row["chosen"], "not chosen yet"
        if chosen is not None:
            edge = " (the edge of what was tried)" if chosen in (own[0], own[-1]) else ""
            taken = f"{row['rates'][chosen]:g}{edge}"
        rows.append((row["row"], *(_rate(losses, factor) for factor in factors), taken))
    return markdown(["method", *(f"loss at ×{factor}" for factor in factors), "taken"], rows)


def _rate(losses: Mapping[str, float | None], factor: str) -> str:
    if factor not in losses:
        return ""
    loss = losses[factor]
    return "failed" if loss is None else f"{loss:.3f}"
