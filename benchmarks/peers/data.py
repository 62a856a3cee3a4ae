"""What all sides train on: ragged chats, full rows, and the schedule of the learning rate. Imports no torch.

A chat is one question and one answer, cut so that its length in tokens is the one that was drawn. The texts are rows of
`../shared/data/datasets` (general, math, sql, style), or those of `examples/` where that folder is missing.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgelora.base.model import Base
from edgelora.data.encode import Example, encode_conversation
from edgelora.data.rows import Conversation, Message
from edgelora.home import CHECKOUT
from edgelora.training.schedule import share_at

BATCH = 4
N_CHATS, N_HELD_OUT, N_FULL_ROWS = 256, 48, 24
SHORTEST, LONGEST, MEDIAN, SIGMA = 50, 500, 158, 0.5  # log-normal: the median is their geometric mean
RANK, ALPHA, LEARNING_RATE, WARMUP, MAX_GRAD_NORM = 16, 32.0, 1e-3, 5, 1.0


def share(step: int, total: int) -> float:
    """The share of LEARNING_RATE at `step` of `total`: linear up, then linear down to 0, the same on every side."""
    return share_at("linear", step, total, WARMUP, decay_share=1.0)


def texts() -> Iterator[str]:
    """Messages of the data sets, a row of each set in turn, again and again."""
    shared = CHECKOUT.parent / "shared" / "data" / "datasets"
    files = [shared / f"{name}.train.jsonl" for name in ("general", "math", "sql", "style")]
    if not shared.is_dir():
        files = [CHECKOUT / "examples" / name / "train.jsonl" for name in ("couplets", "home")]
    rows = [file.read_text(encoding="utf-8").splitlines() for file in files]
    for i in itertools.count():
        for lines in rows:
            for message in json.loads(lines[i % len(lines)])["messages"]:
                if message["role"] != "system" and message["content"].strip():
                    yield message["content"].strip()


def chats(base: Base, count: int, seed: int = 0) -> list[tuple[Conversation, Example]]:
    """Chats whose lengths are log-normal between SHORTEST and LONGEST tokens, with their ids."""
    lengths = np.random.default_rng(seed).lognormal(np.log(MEDIAN), SIGMA, count).clip(SHORTEST, LONGEST)
    source, found = texts(), []
    for length in lengths.astype(int):
        question = " ".join(next(source).split()[:60])  # a long one would leave a short chat without an answer
        words: list[str] = []
        while len(base.tokenizer.encode(" ".join(words)).ids) < length:
            words += next(source).split(" ")
        found.append(_cut(base, question, words, int(length)))
    return found


def _cut(base: Base, question: str, words: list[str], length: int) -> tuple[Conversation, Example]:
    """The chat with as many words of its answer as fit into `length` tokens (one at least)."""
    low, high = 1, len(words)
    best = _chat(base, question, words[:1])
    while low <= high:
        middle = (low + high) // 2
        chat = _chat(base, question, words[:middle])
        if len(chat[1]) <= length:
            best, low = chat, middle + 1
        else:
            high = middle - 1
    return best


def _chat(base: Base, question: str, words: list[str]) -> tuple[Conversation, Example]:
    conversation = Conversation((Message("user", question), Message("assistant", " ".join(words).strip())))
    return conversation, encode_conversation(conversation, base.tokenizer, base.template)


@dataclass(frozen=True)
class Facts:
    """What makes the data easy or hard: the share of tokens with loss, and a padded batch in tokens that count."""

    rows: int
    mean_tokens: float
    loss_share: float
    padding_factor: float


def write(base: Base, folder: Path) -> Facts:
    """The files of all sides: chats as each tool reads them, and the same encoded."""
    rows = chats(base, N_CHATS + N_HELD_OUT)
    conversations = [conversation for conversation, _ in rows]
    examples = [example for _, example in rows]
    _write_lines(folder / "messages.jsonl", ({"messages": _dicts(c.messages)} for c in conversations[:N_CHATS]))
    _write_lines(
        folder / "prompt_completion.jsonl",
        (
            {"prompt": _dicts(c.prompt), "completion": _dicts(c.messages[len(c.prompt) :])}
            for c in conversations[:N_CHATS]
        ),
    )
    save(folder / "chats.npz", examples[:N_CHATS])
    save(folder / "held_out.npz", examples[N_CHATS:])
    stream = np.concatenate([example.input_ids for example in examples])
    for length in (512, 1024):
        full = [np.resize(stream[i * length :], length) for i in range(N_FULL_ROWS)]
        save(folder / f"full-{length}.npz", [Example(ids, np.arange(length) > 0) for ids in full])
    kept = examples[:N_CHATS]
    lengths = np.array([len(e) for e in kept])
    padded = lengths.reshape(-1, BATCH).max(1).sum() * BATCH
    learned = sum(int(e.loss_mask.sum()) for e in kept)
    return Facts(len(kept), float(lengths.mean()), learned / lengths.sum(), float(padded / lengths.sum()))


def _dicts(messages: tuple[Message, ...]) -> list[dict[str, str]]:
    return [{"role": m.role, "content": m.content or ""} for m in messages]


def _write_lines(path: Path, rows: Iterator[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def save(path: Path, examples: list[Example]) -> None:
    """Ids and loss masks, end to end, with the lengths."""
    ids, mask = (np.concatenate([getattr(e, name) for e in examples]) for name in ("input_ids", "loss_mask"))
    np.savez(path, ids=ids, mask=mask, lengths=np.array([len(e) for e in examples]))


def load(path: Path) -> list[Example]:
    with np.load(path) as stored:
        borders = np.cumsum(stored["lengths"])[:-1]
        parts = zip(np.split(stored["ids"], borders), np.split(stored["mask"], borders), strict=True)
        return [Example(ids, mask) for ids, mask in parts]


def batches(examples: list[Example], rows: int, seed: int | None = None) -> Iterator[list[Example]]:
    """`rows` examples at a time, for ever: in order, or in an order drawn anew for each pass."""
    shuffle = np.random.default_rng(seed)
    while True:
        order = np.arange(len(examples)) if seed is None else shuffle.permutation(len(examples))
        for first in range(0, len(order) - rows + 1, rows):
            yield [examples[i] for i in order[first : first + rows]]
