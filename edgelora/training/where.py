"""Where the adapter of a run goes and how strong it is there, out of its settings."""

from __future__ import annotations

from edgelora.base.model import Base
from edgelora.config import TrainConfig
from edgelora.errors import ConfigError
from edgelora.peft.inject import chosen
from edgelora.peft.longlora import SHARE
from edgelora.peft.methods import METHODS
from edgelora.peft.saved import beside
from edgelora.peft.strength import strengths
from edgelora.peft.targets import Where
from edgelora.peft.virtual_settings import VirtualTokens


def where_of(config: TrainConfig) -> Where:
    """PEFT's settings among those of a run.

    Raises ConfigError for dropout where two log-probabilities are compared, and for groups that nothing uses.
    """
    if config.lora_dropout and config.objective != "sft":
        raise ConfigError(
            what=f"lora_dropout with --objective {config.objective}",
            why="each of the log-probabilities that are compared would be of another adapter; TRL leaves it out, too",
            fix="leave it out",
        )
    if config.group_size is not None and not METHODS[config.method].groups:
        raise ConfigError(
            what=f"group_size: nothing that --method {config.method} could use",
            why="its tokens attend to all before them while it learns",
            fix="leave it out, or take --method longlora",
        )
    return Where(
        config.target_modules,
        config.exclude_modules,
        config.layers_to_transform,
        {one.layers: int(one.value) for one in config.rank_pattern},
        {one.layers: one.value for one in config.alpha_pattern},
        config.use_rslora,
        config.lora_dropout,
        _virtual(config),
        config.alora_invocation_tokens,
        tuple(int(one) for one in config.train_tokens if one.isdecimal()),  # all of them, once it is settled
        config.bias,
        config.modules_to_save,
    )


def group_of(config: TrainConfig) -> int:
    """How many tokens attend to each other while a LongLoRA learns. `config` is settled."""
    assert config.max_length is not None
    return config.group_size or max(2, config.max_length // SHARE)


def _virtual(config: TrainConfig) -> VirtualTokens:
    """Raises ConfigError for a text that contradicts what is said of the start."""
    text, start = config.prompt_tuning_init_text, config.prompt_tuning_init
    if (start == "text") if text is None else (start not in (None, "text")):
        raise ConfigError(
            what=f"--prompt-tuning-init {start} {'without' if text is None else 'with'} --prompt-tuning-init-text",
            why="a text is what virtual tokens begin as, or they begin as something else",
            fix="pass --prompt-tuning-init-text alone, or leave it out",
        )
    return VirtualTokens(
        config.num_virtual_tokens,
        "text" if text is not None else start,
        config.encoder_reparameterization_type,
        config.encoder_hidden_size,
        config.prefix_projection,
    )


def require_place(config: TrainConfig, base: Base) -> None:
    """Raise ConfigError if there is no such adapter on `base`: names that fit nothing, ranks beyond a matrix …"""
    assert config.rank is not None
    assert config.alpha is not None
    where, row = where_of(config), METHODS[config.method]
    names, _ = chosen(config.method, base.linears, base.norms, where)
    strengths(row, {name: base.linears[name] for name in names}, where, config.rank, config.alpha)
    beside(row, base.layers, names, where)
