"""Multiple choice by log-likelihood: the alternative that the model finds likeliest, by three customs of counting.

`sum`: the highest log p of the whole ending (lm-eval's acc). `per_character`: divided by the ending's length in
characters (lm-eval's acc_norm). `per_token`: by its number of tokens (llama-perplexity's --multiple-choice). No
examples before the question and no chat template, as all of them have it.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgelora.data.tokenizer import Tokenizer
from edgelora.errors import DataError
from edgelora.evaluate.protocols import Alternative

COUNTED = {
    "sum": "log p of the whole ending (lm-eval's acc)",
    "per_character": "log p per character (lm-eval's acc_norm)",
    "per_token": "log p per token (llama-perplexity)",
}
CUSTOMS = tuple(COUNTED)


@dataclass(frozen=True)
class Choice:
    """`contexts` and `endings`, one of each alternative (the same context for all, or the same ending), and which of
    them is right."""

    contexts: tuple[str, ...]
    endings: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class ChoiceScore:
    """For each custom, which rows were right; `chance`: the share that guessing gets right."""

    right: Mapping[str, list[bool]]
    chance: float

    def share(self, custom: str) -> float:
        """The share of rows that are right by one of CUSTOMS."""
        return sum(self.right[custom]) / len(self.right[custom])


def parse_choice(row: Mapping[str, Any]) -> Choice:
    """`{"question", "choices", "answer"}` (ARC) or `{"contexts", "continuation", "answer"}` (Winogrande), the answer a
    number from 0. Raises ValueError with the reason."""
    if {"question", "choices", "answer"} <= set(row):
        endings = _texts(row["choices"], "choices")
        contexts = (f"Question: {_text(row['question'], 'question')}\nAnswer:",) * len(endings)
    elif {"contexts", "continuation", "answer"} <= set(row):
        contexts = _texts(row["contexts"], "contexts")
        endings = (_text(row["continuation"], "continuation"),) * len(contexts)
    else:
        raise ValueError(f"its columns are {', '.join(row) or 'none'}; {_nearest(row)}")
    answer = row["answer"]
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(endings):
        raise ValueError(f"`answer` is {answer!r}, not a number from 0 to {len(endings) - 1}")
    return Choice(contexts, endings, answer)


def is_choice(row: Mapping[str, Any], *, nearly: bool = False) -> bool:
    """Whether a row looks like multiple choice: there are alternatives in it; `nearly`: under a name misspelt."""
    named = ("choices", "contexts")
    return any(key in named or (nearly and difflib.get_close_matches(str(key), named, 1, 0.8)) for key in row)


def read_choices(rows: Iterable[Mapping[str, Any]], name: str) -> list[Choice]:
    """Every row of a file. Raises DataError with the first that is broken, or for none at all."""
    found = []
    for number, row in enumerate(rows, 1):
        try:
            found.append(parse_choice(row))
        except ValueError as e:
            raise DataError(
                what=f"{name}:{number}: this row is no multiple choice",
                why=str(e),
                fix='write {"question": …, "choices": […], "answer": 0} or {"contexts": […], "continuation": …, …}',
            ) from e
    if not found:
        raise DataError(what=f"{name}: it has no rows", why="there is nothing to score", fix="check the file")
    return found


def alternatives(choice: Choice, tokenizer: Tokenizer) -> list[Alternative]:
    """The ids of each alternative; what is scored begins where the ids of its context end."""
    bos = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
    found = []
    for context, ending in zip(choice.contexts, choice.endings, strict=True):
        before, whole = tokenizer.encode(context).ids, tokenizer.encode(f"{context} {ending}").ids
        first = next((i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(before))
        first = max(min(first, len(whole) - 1), 0 if bos else 1)  # something must stand before what is scored
        found.append(Alternative((*bos, *whole), len(bos) + first))
    return found


def score_choices(
    choices: Sequence[Choice],
    tokenizer: Tokenizer,
    log_p: Callable[[Sequence[Alternative]], Sequence[np.ndarray]],
) -> ChoiceScore:
    """`log_p(alternatives of one question)`: of each, the log-probabilities (nats) of its scored tokens."""
    right: dict[str, list[bool]] = {custom: [] for custom in CUSTOMS}
    for choice in choices:
        values = log_p(alternatives(choice, tokenizer))
        sums = np.array([float(np.sum(value)) for value in values])
        lengths = {
            "sum": np.ones(len(sums)),
            "per_character": np.array([len(ending) for ending in choice.endings]),
            "per_token": np.array([len(value) for value in values]),
        }
        for custom in CUSTOMS:
            right[custom].append(int(np.argmax(sums / lengths[custom])) == choice.answer)
    return ChoiceScore(right, float(np.mean([1 / len(choice.endings) for choice in choices])))


def _texts(value: Any, field: str) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) < 2:
        raise ValueError(f"`{field}` is no list of two texts or more")
    return tuple(_text(inner, field) for inner in value)


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"`{field}` is no text, or an empty one")
    return value


def _nearest(row: Mapping[str, Any]) -> str:
    known = ("question", "choices", "answer", "contexts", "continuation")
    close = {key: match[0] for key in row if (match := difflib.get_close_matches(key, known, 1)) and key not in known}
    said = ", ".join(f"`{key}` looks like `{name}`" for key, name in close.items())
    return said or "question, choices and answer are expected, or contexts, continuation and answer"
