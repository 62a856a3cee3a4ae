"""Which tokens' rows are trained: the ids of those that `--train-tokens` names."""

from __future__ import annotations

from edgelora.base.model import Base
from edgelora.config import TrainConfig
from edgelora.errors import ConfigError
from edgelora.peft.methods import METHODS
from edgelora.peft.token_rows import require_tokens


def tokens_of(config: TrainConfig, base: Base) -> TrainConfig:
    """The config with ids in the place of texts; as it is where a method trains no token's rows.

    Raises ConfigError for what is no token, and for tokens that the method has no use for.
    """
    if not METHODS[config.method].rows:
        if config.train_tokens:
            raise ConfigError(
                what=f"train_tokens: nothing that --method {config.method} could use",
                why="it leaves the rows of all tokens as they are",
                fix="leave it out, or take --method token_rows",
            )
        return config
    ids = [_id_of(text, base) for text in config.train_tokens]
    require_tokens(ids, base.config.vocab_size)
    return config.model_copy(update={"train_tokens": tuple(str(one) for one in sorted(set(ids)))})


def _id_of(text: str, base: Base) -> int:
    """An id as it is; else that of the token with this text."""
    if text.isdecimal():
        return int(text)
    tokens = base.tokenizer.tokens
    if text in tokens:
        return tokens.index(text)
    ids = base.tokenizer.encode(text, parse_special=True).ids
    if len(ids) != 1:
        raise ConfigError(
            what=f"train_tokens: {text} is {len(ids)} tokens",
            why="the row of one token is trained, and the vocabulary stays as it is",
            fix="name a reserved token of the base in its place, or each of these by its id; or train over a base that "
            "has it, which `edgelora add-tokens` writes",
        )
    return ids[0]
