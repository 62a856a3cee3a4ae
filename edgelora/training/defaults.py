"""Rank, α and learning rate where they are left to us: by the base's size, the method and the objective, with sources.

Starting points, not optima: `edgelora train --sweep` finds those on the data at hand. A method's own stand in its row.
"""

from __future__ import annotations

from collections.abc import Iterator

from edgelora.config import Objective, TrainConfig
from edgelora.device import Choice
from edgelora.errors import ConfigError
from edgelora.peft.defaults import Sourced
from edgelora.peft.methods import METHODS

# What is left of it for preferences: such losses only nudge a model that can answer already.
OBJECTIVE_SHARE: dict[Objective, Sourced] = {
    "sft": Sourced(1.0, ""),
    "dpo": Sourced(1 / 40, "a fortieth for DPO (TRL's and Unsloth's recipes: 5e-6 where answers take 2e-4)"),
    "ipo": Sourced(
        1 / 40, "a fortieth for IPO, as for DPO (TRL's and Unsloth's recipes: 5e-6 where answers take 2e-4)"
    ),
    "kto": Sourced(1 / 40, "a fortieth for KTO (its best is like DPO's, says TRL's recipe)"),
    "orpo": Sourced(0.4, "two fifths for ORPO (TRL's recipe for a LoRA: 8e-5 where answers take 2e-4)"),
}

LION_SHARE = Sourced(
    1 / 5, "a fifth for Lion, whose steps are larger: 3 to 10 times lower than AdamW's (arXiv:2302.06675)"
)

WHOLE_SHARE = Sourced(1 / 10, "a tenth for all weights: what full fine-tuning takes of a LoRA's (LoRA Without Regret)")

WHOLE_BESIDE = Sourced(
    1 / 10,
    "a tenth of the learning rate for matrices that are trained whole beside A and B: what full fine-tuning takes of a "
    "LoRA's (LoRA Without Regret); Unsloth's recipe takes 2 to 10 times less for embedding matrices",
)


def choose(config: TrainConfig, n_weights: int) -> tuple[TrainConfig, dict[str, Choice]]:
    """`config` with rank, alpha and learning rate filled in where they are None, and why each was chosen.

    n_weights: of the whole base. Raises ConfigError for a rank or an α that the method has not: the run's settings have
    both all the same, and nobody is told why.
    """
    _require_taken(config)
    row = METHODS[config.method]
    values: dict[str, float] = {}
    choices: dict[str, Choice] = {}
    rank = config.rank
    if rank is None:
        values["rank"] = rank = int(row.defaults.rank.value)
        choices["rank"] = Choice(str(rank), row.defaults.rank.why)
    if config.alpha is None:
        values["alpha"], why = row.defaults.alpha(rank)
        choices["alpha"] = Choice(f"{values['alpha']:g}", why)
    if config.learning_rate is None:
        values["learning_rate"], why = _learning_rate(config, n_weights, config.alpha or values["alpha"])
        choices["learning_rate"] = Choice(f"{values['learning_rate']:g}", why)
    if not row.ranked:
        choices.pop("rank", None)
        choices.pop("alpha", None)
    return config.model_copy(update=values), choices


def _require_taken(config: TrainConfig) -> None:
    given = {"--rank": config.rank, "--alpha": config.alpha}
    said = [f"{option} {value:g}" for option, value in given.items() if value is not None]
    if said and not METHODS[config.method].ranked:
        raise ConfigError(
            what=f"--method {config.method} {' '.join(said)}: it has neither a rank nor an α",
            why=f"it trains {METHODS[config.method].trains}",
            fix=f"leave {' and '.join(option.split()[0] for option in said)} away, or choose a method that has them",
        )


def _learning_rate(config: TrainConfig, n_weights: int, alpha: float) -> tuple[float, str]:
    defaults = METHODS[config.method].defaults
    of_projection = defaults.rate_of_projection if config.prefix_projection else None
    base = (of_projection or defaults.rate)(n_weights)
    shares = list(_shares(config, alpha))
    value = base.value
    for share in shares:
        value *= share.value
    return float(f"{value:.3g}"), "; ".join([base.why, *(share.why for share in shares if share.why)])


def _shares(config: TrainConfig, alpha: float) -> Iterator[Sourced]:
    """What is left of it for what else was asked for, and for how the method takes its steps."""
    row = METHODS[config.method]
    yield OBJECTIVE_SHARE[config.objective]
    if config.optimizer == "lion":
        yield LION_SHARE
    if row.trains_weights:
        yield WHOLE_SHARE
    if row.projects:
        yield Sourced(1 / alpha, f"over α {alpha:g}, by which each step is multiplied again")
    if row.faster:
        share = config.loraplus_ratio**-0.5
        yield Sourced(share, f"{share:.2g} of it for A, as B learns faster by as much (PEFT's example: 5e-5 with 16)")
