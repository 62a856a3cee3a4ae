"""One answer in work: what of its prompt is still to be evaluated, then token by token until it ends."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from runtime.lookup import Lookup
from runtime.sampling import Sampler
from runtime.service import Finish, Piece, Request, TokenLogprob, Usage
from runtime.states import Chain, Key, Part, Slot
from runtime.stream import LiveStream
from runtime.text import TextStream


class Vocabulary(Protocol):
    """What an answer asks of the model."""

    def piece(self, token: int) -> bytes:
        """The bytes of its text."""
        ...

    def ends_generation(self, token: int) -> bool:
        """Whether an answer ends with it."""
        ...


@dataclass(frozen=True)
class Limits:
    """Of every answer of an engine: where reuse may end, what a sequence has room for, how far guesses go."""

    chunk: int
    room: int
    draft_tokens: int = 0


@dataclass(eq=False)
class Answer:
    """For the owner's thread. `parts`: of the prompt, not yet evaluated."""

    request: Request
    stream: LiveStream
    vocabulary: Vocabulary
    sampler: Sampler
    limits: Limits
    key: Key
    """All its adapters, held until it ends."""
    active: Key
    """Those that its answer is computed with: an aLoRA that was not invoked is none of them."""
    parts: deque[Part]
    chain: Chain
    slot: Slot | None = None
    lane: int = -1
    position: int = 0
    """How many tokens its sequence holds."""
    reused: int = 0
    last: int = -1
    """Its newest token, not yet evaluated."""
    n_tokens: int = 0
    finish: Finish | None = None
    begun: float = field(default_factory=time.perf_counter)
    started: float | None = None
    first: float | None = None

    def __post_init__(self) -> None:
        self.n_prompt = self.parts[-1].last
        self._text = TextStream(self.request.sampling.stop)
        prompt = (token for part in self.parts if not part.is_head for token in part.tokens)
        self._lookup = Lookup(prompt) if self.limits.draft_tokens else None
        self._unsaid: list[int] = []
        self._logprobs: list[TokenLogprob] = []

    @property
    def group(self) -> tuple[int, Key]:
        """Answers of one group can be evaluated in one decode: the same context, the same adapters."""
        return self.lane, self.parts[0].key if self.parts else self.active

    def begin(self, n_shared: int) -> None:
        """It has a sequence that holds this much of its prompt."""
        while self.parts[0].first < n_shared:
            self.parts.popleft()
        self.position = self.reused = n_shared
        self.started = time.perf_counter()

    def due(self) -> list[int]:
        """The tokens to evaluate next: the newest, and guesses at those behind it."""
        n_guesses = min(self.limits.draft_tokens, self.limits.room - self.position - 1)
        return [self.last, *(self._lookup.draft(n_guesses) if self._lookup and n_guesses > 0 else ())]

    def advance(self, due: list[int], rows: np.ndarray) -> None:
        """Take in the logits (len(due), V) behind what was due, as far as the guesses were right."""
        for row, guess in zip(rows, [*due[1:], None], strict=True):
            self.position += 1
            self.take(row)
            if self.finish is not None or self.last != guess:
                return

    def take(self, row: np.ndarray) -> None:
        """Choose the next token by the logits (V,) that follow what was evaluated. Raises EngineError."""
        token = self.sampler.pick(row)
        self.first = self.first or time.perf_counter()
        if self.vocabulary.ends_generation(token):
            self.finish = "stop"
            return
        if (logprob := self.sampler.logprob(row, token)) is not None:
            self._logprobs.append(logprob)
        self.sampler.accept(token)
        if self._lookup is not None:
            self._lookup.extend((token,))
        self.last = token
        self.n_tokens += 1
        self._unsaid.append(token)
        self._say(self._text.push(self.vocabulary.piece(token)))
        if self._text.stopped is not None:
            self.finish = "stop"
        elif self.n_tokens >= self.request.max_tokens or self.position >= self.limits.room:
            self.finish = "length"

    def _say(self, text: str, *, last: bool = False) -> None:
        if text or (last and self._unsaid):
            self.stream.give(Piece(text, tuple(self._unsaid), tuple(self._logprobs)))
            self._unsaid.clear()
            self._logprobs.clear()

    def end(self, finish: Finish, kv_bytes: int) -> None:
        """Say what is left and how it went. kv_bytes: what its sequence holds."""
        now = time.perf_counter()
        self._say(self._text.finish(), last=True)
        first, started = self.first or now, self.started or now
        self.stream.end(
            Usage(
                prompt_tokens=self.n_prompt, reused_tokens=self.reused, generated_tokens=self.n_tokens,
                prompt_seconds=first - started, generation_seconds=now - first,
                first_token_seconds=first - self.begun, kv_bytes=kv_bytes, finish=finish,
            )
        )  # fmt: skip
