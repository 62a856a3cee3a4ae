"""Which tokens' rows are trained: the ids of those that `--train-tokens` names."""

from __future__ import annotations

from gguf.constants import TokenType

from edgelora.base.model import Base
from edgelora.config import TrainConfig
from edgelora.errors import ConfigError
from edgelora.peft.methods import METHODS
from edgelora.peft.token_rows import require_tokens

ADDED = (TokenType.USER_DEFINED, TokenType.CONTROL)


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
    """An id as it is; else that of the token with this text.

    Digits mean an id, though pieces of words may be digits too; of a token that was added either could be meant.
    """
    tokens = base.tokenizer.tokens
    if text.isdecimal():
        own = tokens.index(text) if text in tokens else None
        if own is not None and own != int(text) and base.vocabulary.types[own] in ADDED:
            raise ConfigError(
                what=f"train_tokens: {text} is an id, and the text of the token {own}",
                why="the row of the one or of the other would be trained",
                fix=f"pass {own} for the token with this text, 0{text} for the one with this id",
            )
        return int(text)
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
