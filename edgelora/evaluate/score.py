"""Held-out loss and right answers of a model on a task, for the whole set and for each of its groups."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from edgelora.data.conversation import Conversation
from edgelora.data.encode import encode_conversation, encode_prompt
from edgelora.data.template import ChatTemplate
from edgelora.data.tokenizer import Tokenizer
from edgelora.errors import DataError
from edgelora.evaluate.metrics import METRICS, Metric
from edgelora.evaluate.protocols import Question, Scorer
from edgelora.progress import OnProgress, silent

SPARE_TOKENS = 16  # an answer may run this much longer than the longest reference before it is cut
BOOTSTRAP_DRAWS = 2000


@dataclass(frozen=True)
class Score:
    """`exact` of `n_rows` answers equal the reference; `nll_nats` is summed over `n_tokens` answer tokens."""

    n_rows: int
    exact: int
    n_tokens: int
    nll_nats: float
    exact_interval: tuple[float, float]

    @property
    def exact_match(self) -> float:
        return self.exact / self.n_rows

    @property
    def loss(self) -> float:
        """Mean −log p of an answer token, in nats."""
        return self.nll_nats / self.n_tokens


@dataclass(frozen=True)
class RowScore:
    """One row: whether its answer is right by the metric, and −log p (nats) summed over its reference's tokens."""

    right: bool
    nll_nats: float
    n_tokens: int
    group: str | None = None


@dataclass(frozen=True)
class Scored:
    """The score of all rows, that of each group, and every answer (for reading). `metric`: a name of METRICS, or
    `pattern`, by which `rows` are right."""

    all: Score
    groups: dict[str, Score]
    answers: list[str]
    metric: str = "exact"
    rows: tuple[RowScore, ...] = ()


def questions(conversations: Sequence[Conversation], tokenizer: Tokenizer, template: ChatTemplate) -> list[Question]:
    """Each row's prompt and its last assistant turn as the reference.

    Raises DataError for an answer of weight 0, or if the template writes a conversation otherwise than its beginning.
    """
    out = []
    for number, conversation in enumerate(conversations, 1):
        prompt = encode_prompt(conversation.prompt, tokenizer, template, conversation.tools)
        example = encode_conversation(conversation, tokenizer, template)
        whole = example.input_ids.tolist()
        if not conversation.messages[-1].weight:
            raise DataError(
                what=f"row {number}: its last answer has the weight 0",
                why="the last answer is what is scored, and this one is marked as no answer to give",
                fix="give it a weight, or leave the row out",
            )
        last = int(example.loss_mask.nonzero()[0][-1]) + 1
        if whole[: len(prompt)] != prompt or last <= len(prompt):
            raise DataError(
                what=f"row {number}: its prompt is not how the whole conversation begins",
                why="the chat template rewrites earlier turns, so an answer cannot be scored after its prompt",
                fix="use single-turn rows for evaluation with this base",
            )
        out.append(Question(prompt, whole[len(prompt) : last]))
    return out


def answer_room(asked: Sequence[Question]) -> int:
    """How many tokens an answer may have."""
    return max(len(q.reference) for q in asked) + SPARE_TOKENS


def score(
    scorer: Scorer,
    conversations: Sequence[Conversation],
    asked: Sequence[Question],
    tokenizer: Tokenizer,
    on_progress: OnProgress = silent,
    metric: tuple[str, Metric] = ("exact", METRICS["exact"]),
) -> Scored:
    """Answer every row (`asked` are its `questions`) greedily and score its reference.

    Exact match compares whole answers, white space at the ends trimmed; `metric`, as `choose_metric` gives it, says
    beside it which are right.
    """
    answers = scorer.answer(asked, answer_room(asked), on_progress)
    texts = [tokenizer.decode(a.tokens).strip() for a in answers]
    exact = [text == c.answer.strip() for text, c in zip(texts, conversations, strict=True)]
    rows = [
        RowScore(metric[1].right(text, c.answer), float(a.nll.sum()), len(a.nll), c.group)
        for text, c, a in zip(texts, conversations, answers, strict=True)
    ]
    groups: dict[str, list[int]] = {}
    for i, conversation in enumerate(conversations):
        if conversation.group is not None:
            groups.setdefault(conversation.group, []).append(i)

    def part(numbers: Sequence[int]) -> Score:
        return Score(
            n_rows=len(numbers),
            exact=sum(exact[i] for i in numbers),
            n_tokens=sum(rows[i].n_tokens for i in numbers),
            nll_nats=sum(rows[i].nll_nats for i in numbers),
            exact_interval=bootstrap([exact[i] for i in numbers]),
        )

    return Scored(
        part(range(len(exact))), {name: part(some) for name, some in groups.items()}, texts, metric[0], tuple(rows)
    )


def bootstrap(right: Sequence[bool], seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of a share by resampling rows (percentile bootstrap, Efron 1979)."""
    draw, n = random.Random(seed), len(right)
    shares = sorted(sum(draw.choices(right, k=n)) / n for _ in range(BOOTSTRAP_DRAWS))
    return shares[int(0.025 * BOOTSTRAP_DRAWS)], shares[int(0.975 * BOOTSTRAP_DRAWS) - 1]
