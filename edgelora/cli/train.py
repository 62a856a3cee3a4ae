"""`edgelora train`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgelora.cli.arguments import Json
from edgelora.cli.importing import uncollected
from edgelora.cli.options import printed, settled, with_options
from edgelora.config import TrainConfig
from edgelora.words import count, size

if TYPE_CHECKING:
    from edgelora.cli.display import Listener
    from edgelora.training.run import Run

PANELS = {
    "out": "The run", "data_format": "Data", "method": "Adapter", "learning_rate": "Step", "device": "Machine",
    "eval_every": "While it runs",
}  # fmt: skip


@with_options(TrainConfig, skip={"base", "data"}, panels=PANELS)
def train(
    base: Annotated[
        Path | None, typer.Argument(help="The base model: a .gguf file, or a Hugging Face folder.", show_default=False)
    ] = None,
    data: Annotated[
        list[str] | None, typer.Argument(help="Rows to learn: files or folders, FILE:0.5 to mix.", show_default=False)
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="Settings in a TOML file; options override them.", show_default=False)
    ] = None,
    print_config: Annotated[bool, typer.Option("--print-config", help="Print all settings as TOML and stop.")] = False,
    sweep: Annotated[
        list[str] | None,
        typer.Option(help="Rank settings by held-out loss: rank=4,8,16 lr=1e-4,5e-4.", show_default=False),
    ] = None,
    as_json: Json = False,
    **settings: Any,
) -> None:
    """Train an adapter over a GGUF file or a Hugging Face checkpoint, on the assistant's words only.

    Example: `edgelora train base.gguf rows.jsonl --out adapters/mine`
    """
    from edgelora.cli import sweep as sweeping
    from edgelora.cli.display import listener

    if sweep:
        sweep, base, data = sweeping.taken_apart(sweep, base, data)
    given, arguments = {"base": base, "data": data, **settings}, ("base", "data")
    if print_config:
        print(printed(TrainConfig, config, given, arguments))
        return
    asked = settled(TrainConfig, config, given, arguments)
    if sweep:
        sweeping.sweep(asked, sweep, as_json)
        return
    with listener(as_json) as display:
        with uncollected():
            from edgelora.training.interrupt import at_once, exit_code_of
            from edgelora.training.run import run_training
        try:
            run = run_training(asked, display.show, lambda name, c: display.choice(name, c.value, c.why), display.note)
        except (KeyboardInterrupt, SystemExit) as e:  # a second signal, or one before the first step
            raise at_once(asked, exit_code_of(e)) from e
        tell(run, asked, display)
    if as_json:
        print(json.dumps(summary(run)))


def tell(run: Run, config: TrainConfig, display: Listener) -> None:
    """The result in a line or two, and what to type next."""
    from edgelora.pipeline.methods import what_comes_next

    held = "" if run.held_out_loss is None else f", held-out loss {run.held_out_loss:.4f}"
    display.say(
        f"{run.out}: {count(run.n_steps, 'step')} over {count(run.n_rows, 'row')} in {run.seconds:.0f} s, "
        f"{run.tokens_per_s:.0f} tokens/s, peak memory {size(run.peak_bytes)}{held}"
    )
    if run.step != run.n_steps:
        display.note(f"it is the adapter of step {run.step}, whose held-out loss was the lowest")
    if better := better_before(run, config):
        display.note(better)
    display.say(f"next: {what_comes_next(run.method, config.base, run.out)}")


def better_before(run: Run, config: TrainConfig) -> str:
    """That the base alone or an earlier step had a lower held-out loss, and how one gets its adapter; or nothing."""
    from edgelora.training.interrupt import resuming

    now, best, earlier, again = run.held_out_loss, run.best, [], ""
    if now is None:
        return ""
    if run.base_loss is not None and not now <= run.base_loss:  # nor is what is no number better
        earlier.append(f"{run.base_loss:.4f} before the first step")
    if best is not None and best.step != run.step and not now <= best.loss:
        earlier.append(f"{best.loss:.4f} behind step {best.step}")
        again = f"; {resuming(config, '--keep-adapter', 'best')} writes the adapter of step {best.step}"
    return f"held-out loss was {' and '.join(earlier)}, it is {now:.4f} with this adapter{again}" if earlier else ""


def summary(run: Run) -> dict[str, Any]:
    """For --json."""
    last = run.losses[-1] if run.losses else None
    return {
        "out": str(run.out), "folder": str(run.folder), "steps": run.n_steps, "adapter_of_step": run.step,
        "rows": run.n_rows, "seconds": run.seconds, "tokens_per_s": run.tokens_per_s, "peak_bytes": run.peak_bytes,
        "last_loss": last if last == last else None, "held_out_loss": run.held_out_loss,
        "skipped_steps": run.skipped_steps,
    }  # fmt: skip
