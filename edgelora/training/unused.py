"""Settings that would do nothing in the run they were said for: refused, so that nobody believes they did something."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from edgelora.config import TrainConfig
from edgelora.errors import ConfigError
from edgelora.peft.method import Method
from edgelora.peft.methods import METHODS

OF_A_METHOD: dict[str, tuple[Callable[[Method], object], str]] = {
    "loraplus_ratio": (lambda row: row.faster, "its A and B learn at one rate, or it has none"),
    "update_proj_gap": (lambda row: row.projects, "its optimizer sees whole gradients"),
}
"""Settings of the step: which methods have a use for them, and why others have none."""
OF_A_CHOICE: dict[str, tuple[str, tuple[str, ...], str]] = {
    "beta1": ("optimizer", ("adamw", "adamw8bit", "lion"), "it keeps no mean of gradients"),
    "beta2": ("optimizer", ("adamw", "adamw8bit", "lion"), "how much it keeps follows from the number of the step"),
    "decay_share": ("schedule", ("wsd",), "when its learning rate begins to fall is no matter of choice"),
}
"""Settings of the step: which values of another setting have a use for them, and why others have none."""
HELD_OUT = "pass --valid ROWS, with rows that are not in the data, or leave it out"


def refuse_unused(config: TrainConfig) -> None:
    """Raise ConfigError for a setting of `config` that nothing in its run reads.

    One that is as it would be by itself passes: a file that `--print-config` wrote says all of them.
    """
    if config.patience is not None and config.valid is None:
        raise ConfigError(
            what=f"--patience {config.patience} without --valid",
            why="it counts measurements without a better held-out loss, and no rows are held out",
            fix=HELD_OUT,
        )
    if config.keep_adapter == "best" and config.valid is None:
        raise ConfigError(
            what="--keep-adapter best without --valid",
            why="the best is that of the lowest held-out loss, and no rows are held out",
            fix=HELD_OUT,
        )
    if config.eval_every is not None and config.valid is None and not config.samples:
        raise ConfigError(
            what=f"--eval-every {config.eval_every} without --valid or --samples",
            why="no rows are held out and no prompts given: there is nothing to measure",
            fix=HELD_OUT,
        )
    if config.objective == "sft" and config.beta != TrainConfig.model_fields["beta"].default:
        raise ConfigError(
            what=f"--beta {config.beta:g} with the objective sft",
            why="it weighs one answer against another, or the adapter against the base; here none are compared",
            fix="leave it out, or train with --objective dpo, ipo, orpo or kto",
        )
    for name, (takes, why) in OF_A_METHOD.items():
        _require_user(config, name, "method", [row.name for row in METHODS.values() if takes(row)], why)
    for name, (chooser, users, why) in OF_A_CHOICE.items():
        _require_user(config, name, chooser, users, why)


def _require_user(config: TrainConfig, name: str, chooser: str, users: Sequence[str], why: str) -> None:
    """Raise ConfigError if `name` was given, and what `chooser` is has no use for it."""
    given, chosen = getattr(config, name), getattr(config, chooser)
    if given != TrainConfig.model_fields[name].default and chosen not in users:
        raise ConfigError(
            what=f"--{name.replace('_', '-')} {given:g} with --{chooser} {chosen}",
            why=why,
            fix=f"leave it out, or take --{chooser} {', '.join(users)}",
        )
