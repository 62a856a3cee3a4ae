"""One answer in work: what of its prompt is still to be evaluated, then token by token until it ends."""

from __future__ import annotations

import codecs
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from runtime.service import Finish, Piece, Request, Usage
from runtime.states import Chain, Key, Part, Slot
from runtime.stream import LiveStream


class Vocabulary(Protocol):
    """What an answer asks of the model."""

    def piece(self, token: int) -> bytes: ...
    def ends_generation(self, token: int) -> bool: ...


@dataclass(eq=False)
class Answer:
    """For the owner's thread. `parts`: of the prompt, not yet evaluated; `room`: positions that its sequence has."""

    request: Request
    stream: LiveStream
    vocabulary: Vocabulary
    key: Key
    """All its adapters, held until it ends."""
    active: Key
    """Those that its answer is computed with: an aLoRA that was not invoked is none of them."""
    parts: deque[Part]
    chain: Chain
    chunk: int
    room: int
    slot: Slot | None = None
    lane: int = -1
    position: int = 0
    """How many tokens its sequence holds."""
    reused: int = 0
    tokens: list[int] = field(default_factory=list)
    finish: Finish | None = None
    begun: float = field(default_factory=time.perf_counter)
    first: float | None = None
    started: float | None = None

    def __post_init__(self) -> None:
        self.n_prompt = self.parts[-1].last
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._unsaid: list[int] = []

    @property
    def group(self) -> tuple[int, Key]:
        """Answers of one group can be evaluated in one decode: the same context, the same adapters."""
        return self.lane, self.parts[0].key if self.parts else self.active

    def begin(self, n_shared: int) -> None:
        """It has a sequence that holds this much of its prompt."""
        self.position = self.reused = n_shared
        self.started = time.perf_counter()

    def take(self, row: np.ndarray) -> None:
        """Choose the next token by the logits (V,) that follow what was evaluated."""
        token = int(row.argmax())
        now = time.perf_counter()
        self.first = self.first or now
        if self.vocabulary.ends_generation(token):
            self.finish = "stop"
            return
        self.tokens.append(token)
        self._unsaid.append(token)
        self._say(self._decoder.decode(self.vocabulary.piece(token)))
        if len(self.tokens) >= self.request.max_tokens or self.position >= self.room:
            self.finish = "length"

    def _say(self, text: str) -> None:
        if text:
            self.stream.give(Piece(text, tuple(self._unsaid)))
            self._unsaid.clear()

    def end(self, finish: Finish, kv_bytes: int) -> None:
        """Say what is left and how it went. kv_bytes: what its sequence holds."""
        now = time.perf_counter()
        self._say(self._decoder.decode(b"", final=True))
        first, started = self.first or now, self.started or now
        self.stream.end(
            Usage(
                prompt_tokens=self.n_prompt, reused_tokens=self.reused, generated_tokens=len(self.tokens),
                prompt_seconds=first - started, generation_seconds=now - first,
                first_token_seconds=first - self.begun, kv_bytes=kv_bytes, finish=finish,
            )
        )  # fmt: skip


def tokens_of(answers: Sequence[Answer]) -> list[tuple[int, int, int]]:
    """(token, position, sequence) of each answer's last token, which is still to be evaluated."""
    return [(a.tokens[-1], a.position, a.slot.sequence) for a in answers if a.slot is not None]
