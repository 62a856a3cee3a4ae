"""THE TABLE of objectives: what a step minimises, over which rows."""

from __future__ import annotations

from typing import Any

from edgelora.config import TrainConfig
from edgelora.errors import ConfigError
from edgelora.training.objectives.dpo import DPO
from edgelora.training.objectives.ipo import IPO
from edgelora.training.objectives.kto import KTO
from edgelora.training.objectives.objective import Objective
from edgelora.training.objectives.orpo import ORPO
from edgelora.training.objectives.sft import SFT

OBJECTIVES: dict[str, Objective[Any]] = {
    "sft": SFT(),
    "dpo": DPO(),
    "ipo": IPO(),
    "orpo": ORPO(),
    "kto": KTO(),
}


def objective_of(config: TrainConfig) -> Objective[Any]:
    """The row of `config.objective`. Raises ConfigError for a setting that it has no use for or cannot work with."""
    if config.label_smoothing and config.objective != "sft":
        raise ConfigError(
            what=f"--label-smoothing with the objective {config.objective}",
            why="it compares the probabilities of answers; smoothed ones are none",
            fix="leave --label-smoothing out, or train with --objective sft",
        )
    if config.objective != "kto" and (config.desirable_weight, config.undesirable_weight) != (1.0, 1.0):
        raise ConfigError(
            what=f"--desirable-weight or --undesirable-weight with the objective {config.objective}",
            why="they weigh rated answers against each other; here there are none",
            fix="leave them out, or train with --objective kto",
        )
    if config.objective == "kto" and config.batch_rows == 1:
        raise ConfigError(
            what="the objective kto with --batch-rows 1",
            why="its KL term is estimated from prompts with the answers of other rows of the step",
            fix="pass --batch-rows 8 or more",
        )
    return OBJECTIVES[config.objective]
