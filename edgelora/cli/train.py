"""`edgelora train`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from edgelora.cli.arguments import Base, Json, Out, Overwrite
from edgelora.config import TrainConfig
from edgelora.errors import ConfigError

DEFAULT: dict[str, Any] = {name: field.default for name, field in TrainConfig.model_fields.items()}


def train(
    base: Base,
    data: Annotated[Path, typer.Argument(help="Rows to learn: JSONL, a conversation a line.", show_default=False)],
    out: Out,
    valid: Annotated[Path | None, typer.Option(help="Held-out rows whose loss is measured at the end.")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank r of the adapter.")] = DEFAULT["rank"],
    alpha: Annotated[float | None, typer.Option(help="α: the adapter is scaled by α/r.")] = DEFAULT["alpha"],
    learning_rate: Annotated[float | None, typer.Option(help="At its peak.")] = DEFAULT["learning_rate"],
    epochs: Annotated[float, typer.Option(help="How often each row is seen.")] = DEFAULT["epochs"],
    batch_rows: Annotated[int, typer.Option(help="Rows for each optimizer step.")] = DEFAULT["batch_rows"],
    micro_batch_tokens: Annotated[int | None, typer.Option(help="Tokens computed at once; decides the memory.")] = DEFAULT[
        "micro_batch_tokens"
    ],
    max_length: Annotated[int | None, typer.Option(help="The longest row allowed, in tokens.")] = DEFAULT["max_length"],
    base_dtype: Annotated[
        str, typer.Option(help="How the base is held: auto, blocks (as stored), nf4, bf16, f32, q4_k …")
    ] = DEFAULT["base_dtype"],
    chat_template: Annotated[
        str | None, typer.Option(help="For a base without one: chatml, or a Jinja file.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="Same seed, data and machine: same adapter.")] = DEFAULT["seed"],
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Train a LoRA adapter over a GGUF file or a Hugging Face checkpoint, on the assistant's words only.

    Example: `edgelora train base.gguf rows.jsonl --out adapters/mine`
    """
    from edgelora.cli.display import Display
    from edgelora.invocation import command

    with Display() as display:
        config = _config({
            "base": base, "data": data, "out": out, "valid": valid, "rank": rank, "alpha": alpha,
            "learning_rate": learning_rate, "epochs": epochs, "batch_rows": batch_rows,
            "micro_batch_tokens": micro_batch_tokens, "max_length": max_length, "base_dtype": base_dtype,
            "chat_template": chat_template, "seed": seed, "overwrite": overwrite,
        })  # fmt: skip
        from edgelora.training.run import run_training

        run = run_training(config, display.show, lambda name, c: display.say(f"{name}: {c.value} ({c.why})"))
        held = "" if run.result.held_out_loss is None else f", held-out loss {run.result.held_out_loss:.4f}"
        display.say(
            f"{run.out}: {run.n_steps} steps over {run.n_rows} rows in {run.seconds:.0f} s, "
            f"{run.result.tokens_per_s:.0f} tokens/s, peak memory {run.peak_bytes / 1e6:.0f} MB{held}"
        )
        display.say("next: " + command("export", base, run.out, "--out", Path(f"{run.out}.gguf")))
    if as_json:
        result = run.result
        print(json.dumps({
            "out": str(run.out), "steps": run.n_steps, "rows": run.n_rows, "seconds": run.seconds,
            "tokens_per_s": result.tokens_per_s, "peak_bytes": run.peak_bytes, "last_loss": result.losses[-1],
            "held_out_loss": result.held_out_loss, "skipped_steps": result.skipped_steps,
        }))  # fmt: skip


def _config(settings: dict[str, object]) -> TrainConfig:
    """A TrainConfig, or a ConfigError that names every setting that cannot be."""
    try:
        return TrainConfig.model_validate(settings)
    except ValidationError as e:
        faults = "; ".join(f"--{str(f['loc'][0]).replace('_', '-')}: {f['msg']}" for f in e.errors())
        raise ConfigError(faults, "these settings cannot train anything", "see `edgelora train --help`") from e
