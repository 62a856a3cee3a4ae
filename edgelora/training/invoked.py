"""What an aLoRA waits for: taken from the chat template where nobody says it, and found in every row it learns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from edgelora.base.model import Base
from edgelora.config import TrainConfig
from edgelora.data.encode import Example
from edgelora.data.preference import Labelled, Pair
from edgelora.data.rows import Message
from edgelora.device import Choice
from edgelora.errors import ConfigError, DataError
from edgelora.files.adapter_check import MAX_INVOCATION
from edgelora.nn.awake import last_place
from edgelora.peft.methods import METHODS


def invocation_of(config: TrainConfig, base: Base) -> tuple[TrainConfig, dict[str, Choice]]:
    """The config with the token ids that its aLoRA waits for, and why these; as it is for any other method.

    Raises ConfigError for ids that are none, for a text without any, and where the template begins no answer.
    """
    if not METHODS[config.method].waits:
        if config.invocation is not None or config.alora_invocation_tokens:
            raise ConfigError(
                what=f"invocation: nothing that --method {config.method} could use",
                why="it acts from the first token on",
                fix="leave it out, or take --method alora",
            )
        return config, {}
    if config.invocation is not None and config.alora_invocation_tokens:
        raise ConfigError(
            what="invocation and alora_invocation_tokens",
            why="both say what the adapter waits for, as a text and as ids",
            fix="pass one of them",
        )
    ids, why = config.alora_invocation_tokens, "asked for"
    if not ids:
        text = header_of(base) if config.invocation is None else config.invocation
        why = why if config.invocation is not None else "what the chat template writes before an answer"
        ids = _as_it_stands(text, base)
    _require_ids(ids, base)
    shown = base.tokenizer.decode(ids)
    settled = config.model_copy(update={"alora_invocation_tokens": ids, "invocation": None})
    return settled, {"invocation": Choice(repr(shown), f"{why}; token ids {' '.join(map(str, ids))}")}


def header_of(base: Base) -> str:
    """What the template writes before an answer, without blanks at its end, which may be one token with what is said.

    Raises ConfigError where it writes nothing.
    """
    said = (Message("user", "x"),)
    bare = base.template.render(said).text
    header = base.template.render(said, generation_prompt=True).text.removeprefix(bare).rstrip()
    if not header or header.startswith(bare):
        raise ConfigError(
            what="--method alora without --invocation: the chat template writes nothing before an answer",
            why="the adapter acts from certain tokens on, which must stand in every prompt",
            fix="say them: --invocation TEXT",
        )
    return header


def _as_it_stands(text: str, base: Base) -> tuple[int, ...]:
    """The tokens of what the template writes, in the midst of a prompt: SentencePiece alone would put a blank before
    it, which no prompt has there. Of what the template does not write, those that it has by itself."""

    def encoded(part: str) -> tuple[int, ...]:
        return tuple(base.tokenizer.encode(part, parse_special=True).ids)

    if base.template_source is None:
        return encoded(text)
    before, found, _ = base.template.render((Message("user", "x"),), generation_prompt=True).text.rpartition(text)
    front, both = encoded(before), encoded(before + text)
    return both[len(front) :] if found and both[: len(front)] == front else encoded(text)


def _require_ids(ids: tuple[int, ...], base: Base) -> None:
    strange = [one for one in ids if not 0 <= one < base.config.vocab_size]
    if not ids or strange or len(ids) > MAX_INVOCATION:
        raise ConfigError(
            what=f"invocation: {f'{strange[0]} is no token' if strange else f'{len(ids)} tokens'}",
            why=f"it is 1 to {MAX_INVOCATION} of the {base.config.vocab_size} tokens that the base knows",
            fix="pass a text as --invocation",
        )


def require_invoked(config: TrainConfig, rows: Iterable[Any], name: str) -> None:
    """Raise DataError for rows in which something is learned before the aLoRA acts: it could not learn that."""
    for number, row in enumerate(rows, 1):
        for example in _examples(row):
            begin, first = last_place(config.alora_invocation_tokens, example.input_ids), _first_learned(example)
            # what is learned is said by the token before it
            if begin > max(0, first - 1):
                raise DataError(
                    what=f"{name}, row {number}: what is learned begins before the last invocation, or there is none",
                    why="an aLoRA acts from its last invocation on, and learns nothing of what is before",
                    fix="pass --loss-on last for conversations of several turns, or another --invocation",
                )


def _first_learned(example: Example) -> int:
    return int(np.argmax(example.loss_mask))


def _examples(row: Example | Pair | Labelled) -> Iterator[Example]:
    if isinstance(row, Pair):
        yield from (row.chosen, row.rejected)
    else:
        yield row.example if isinstance(row, Labelled) else row
