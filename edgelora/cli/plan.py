"""`edgelora plan`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from edgelora.cli.arguments import Base, Json
from edgelora.cli.options import settled, with_options
from edgelora.config import TrainConfig

# What decides neither memory nor time, is an argument here (--memory for max_gpu_memory), or is not known (patience).
ELSEWHERE = {
    "base", "data", "out", "beta", "desirable_weight", "undesirable_weight", "learning_rate", "alpha",
    "weight_decay", "beta1", "beta2", "loraplus_ratio", "schedule", "warmup_steps", "decay_share", "max_grad_norm",
    "label_smoothing", "neftune_alpha", "max_gpu_memory", "patience", "keep_adapter", "save_every",
    "keep_checkpoints", "tensorboard", "resume", "overwrite", "update_proj_gap",
    "prompt_tuning_init", "prompt_tuning_init_text",
}  # fmt: skip


@with_options(TrainConfig, skip=ELSEWHERE, panels={"valid": "As for `edgelora train`"})
def plan(
    base: Base,
    data: Annotated[
        list[str] | None, typer.Argument(help="Rows: with them a few steps are timed.", show_default=False)
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="What may be taken in all, such as 8GB. Default: what is free.")
    ] = None,
    processes: Annotated[
        int, typer.Option(min=1, help="As many as torchrun would start here: what one takes, and not how long.")
    ] = 1,
    config: Annotated[
        Path | None, typer.Option(help="Settings in a TOML file; options override them.", show_default=False)
    ] = None,
    as_json: Json = False,
    **settings: Any,
) -> None:
    """What training would take: memory by its parts, what is chosen so that it fits, and with rows the time.

    Example: `edgelora plan base.gguf rows.jsonl --memory 8GB`
    """
    from edgelora.base.device_memory import parse_size
    from edgelora.cli.display import listener, output
    from edgelora.pipeline.plan import as_json as to_json
    from edgelora.pipeline.plan import estimate, lines, plan_run

    places = {"base": base, "data": data or [str(base)], "out": Path("adapter")}  # nothing is written there
    asked = settled(TrainConfig, config, {**places, **settings}, arguments=("base", "data"), command="plan")
    opened, found = plan_run(asked, None if memory is None else parse_size(memory), processes)
    timed = None
    if data and processes == 1:
        with listener(as_json) as display:
            found, timed = estimate(found, opened, display.note)
    if as_json:
        time = None if timed is None else {**asdict(timed), "seconds": timed.seconds}
        print(json.dumps({**to_json(found), "time": time}))
        return
    console = output()
    for name, text in lines(found, timed):
        console.print(f"{name:<24} {text}", soft_wrap=True, markup=False)
