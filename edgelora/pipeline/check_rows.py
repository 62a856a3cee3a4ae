"""What an export is checked on: the user's own rows, or a few that are built in."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from edgelora.data.conversation import Conversation, Message, read_conversations
from edgelora.data.encode import turn_weights
from edgelora.data.template import ChatTemplate
from edgelora.data.tokenizer import Tokenizer
from edgelora.errors import DataError

CHECKED_ROWS = 64


class Speaks(Protocol):
    """A model as far as texts go: how it reads them, and how a conversation looks to it."""

    @property
    def path(self) -> Path: ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def template_source(self) -> str | None:
        """The text of its chat template; None where it has none."""
        ...

    @property
    def template(self) -> ChatTemplate:
        """Raises BaseModelError where it has none."""
        ...


DEFAULT_CHECK = tuple(
    Conversation((Message("user", question), Message("assistant", answer)))
    for question, answer in (
        ("What is the capital of France?", "The capital of France is Paris."),
        ("Write a short note to thank a colleague.", "Thank you for your help with the report, it was a great relief."),
        ("How do I boil an egg?", "Put it in boiling water for eight minutes, then cool it under cold water."),
        ("Turn 3.5 km into metres.", "3.5 km are 3500 metres."),
        ("List three colours.", "Red, green and blue."),
        ("Why does ice float on water?", "Ice is less dense than water because its molecules are further apart."),
        ("Give me a JSON object with a name.", '{"name": "Ada"}'),
        ("Translate 'good morning' into French.", "Bonjour."),
    )
)

# their ids are compared as well; for a model without a chat template, all that is
CHECK_TEXTS = (
    "The harbour was quiet in the early morning. A few boats lay at the pier, and an old man mended his nets without "
    "looking up. “You are late,” he said. She laughed: it was only ten past six, after all.",
    "def mean(values: list[float]) -> float:\n    if not values:\n        return 0.0\n"
    "    return sum(values) / len(values)",
    "In 2024 the firm sold 1,234,567 units (up 12.5 %), earned $98.7m and employed 3,210 people in 14 countries.",
    "Größe, façade, naïve, señor, Þing, Łódź; Ελλάδα, Москва, 東京, 서울, नमस्ते 🙂👩\u200d🚀 — ½ ≠ 0,5"
    "\t\ttabs,  two blanks\n\n\nnew lines.",
)


def rows_to_check(data: Path | None, limit: int = CHECKED_ROWS, base: Speaks | None = None) -> list[Conversation]:
    """The first rows of `data` in which something is learned (what comes before it is compared with it).

    The built-in ones without `data`. Raises DataError if no row has an answer of a weight above 0, or if `base`, the
    model that will read them, has no chat template.
    """
    if data is None:
        return list(DEFAULT_CHECK[:limit])
    if base is not None:
        require_template(base)
    rows = [row for row in read_conversations(data) if any(turn_weights(row))][:limit]
    if not rows:
        raise DataError(
            what=f"{data}: no row has an answer to compare",
            why="every assistant message in it has the weight 0",
            fix="pass other rows with --data, or leave it out",
        )
    return rows


def require_template(base: Speaks) -> None:
    """Raise DataError if nobody knows how rows look to this model."""
    if base.template_source is None:
        raise DataError(
            what=f"{base.path}: it has no chat template, and your rows are conversations",
            why="without one nobody knows how they look to this model, so they cannot be compared",
            fix="leave --data out: it is checked on plain texts then",
        )
