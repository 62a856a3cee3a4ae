"""A conversation with a running model: what was said, who answers, and how. Neither a terminal nor llama.cpp here."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace

from edgelora.data.conversation import Message
from edgelora.errors import ConfigError, EdgeloraError
from runtime.names import require_scale, unknown_adapter
from runtime.reading import read
from runtime.service import AdapterInfo, Request, Sampling, Service, Usage

SEEDS = 2**32 - 1  # that many; the next is llama.cpp's word for "from the clock"
ONE_BY_ONE = ", each question by itself (it was trained on single turns)"


@dataclass(frozen=True)
class Settings:
    """How questions are asked and answers drawn.

    `system`: a message before the conversation; None takes the one that the active adapters were trained with, else
    the template's own; an empty one is none at all.
    """

    system: str | None = None
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int = 512
    allow_unverified: bool = False
    """Whether an adapter may be loaded that does not say which base it belongs to."""


DEFAULTS = Settings()


def as_asked(messages: Sequence[Message], adapters: Sequence[AdapterInfo], system: str | None = None) -> list[Message]:
    """What these adapters must be asked so that it looks as it did in their training.

    system: before all others; None takes the adapters' own, if they agree on one. Adapters that have only seen
    questions that stand alone get the last message alone: earlier turns would mislead them.
    """
    if system is None:
        own = {adapter.system for adapter in adapters}
        system = own.pop() if len(own) == 1 else None
    said = messages[-1:] if one_by_one(adapters) else messages
    return [*([Message("system", system)] if system else []), *said]


def one_question(text: str, adapters: Sequence[AdapterInfo], system: str | None = None) -> list[Message]:
    """The same of a question without a conversation."""
    return as_asked([Message("user", text)], adapters, system)


def one_by_one(adapters: Sequence[AdapterInfo]) -> bool:
    """Whether all of them (and there are some) have only seen questions that stand alone."""
    return bool(adapters) and all(adapter.single_turn for adapter in adapters)


class Chat:
    """One conversation. What streams an answer gives its text piece by piece, in whole characters."""

    def __init__(
        self, service: Service, settings: Settings = DEFAULTS, active: Mapping[str, float] | None = None,
        scales: Mapping[str, float] | None = None,
    ) -> None:  # fmt: skip
        """active: who answers at first; scales: at which an adapter answers that is named without one, if not 1."""
        self.service, self.settings = service, settings
        self._scales = dict(scales or {})
        self.messages: list[Message] = []
        self.usage: Usage | None = None
        """What the last answer cost."""
        self.active: dict[str, float] = {}
        self.use(active or {})
        self._asked = 0

    # -- who answers --------------------------------------------------------------------------------------------------

    def use(self, adapters: Mapping[str, float]) -> None:
        """Answer with these adapters at these scales from now on; none, or all at 0, is the base.

        Raises AdapterError for a name that is not loaded (with the nearest one), ConfigError for a scale out of range.
        """
        self.active = self.checked(adapters)

    def scale_of(self, name: str) -> float:
        """Of an adapter that is named without one."""
        return self._scales.get(name) or 1.0  # attached at 0 it has none: it was only to be loaded

    def checked(self, adapters: Mapping[str, float]) -> dict[str, float]:
        """These adapters without those at scale 0. Raises as `use` does."""
        for name, scale in adapters.items():
            if name not in self.service.adapters:
                raise unknown_adapter(name, self.service.adapters)
            require_scale(scale, name)
        return {name: scale for name, scale in adapters.items() if scale}

    def unload(self, name: str) -> None:
        """Forget an adapter; if it was active, the others stay active."""
        if name not in self.service.adapters:
            raise unknown_adapter(name, self.service.adapters)
        self.service.unload(name)
        self.active.pop(name, None)
        self._scales.pop(name, None)

    @property
    def single_turn(self) -> bool:
        """Whether all active adapters (and there are some) were trained on single questions."""
        return one_by_one(self._infos(self.active))

    @property
    def system(self) -> str | None:
        """The system message in effect, None where the template decides."""
        first = as_asked([], self._infos(self.active), self.settings.system)
        return first[0].content if first else None

    def _infos(self, adapters: Iterable[str]) -> list[AdapterInfo]:
        return [self.service.adapters[name] for name in adapters]

    # -- answers ------------------------------------------------------------------------------------------------------

    def ask(self, text: str) -> Iterator[str]:
        """Answer `text`. The turn is kept when the answer ends or is stopped (closed).

        An answer that fails leaves the conversation as it was.
        """
        return self._answer([*self.messages, Message("user", text)])

    def retry(self) -> Iterator[str]:
        """Answer the last question again, in place of the last answer; another one where tokens are drawn."""
        return self._answer(self.messages[: self._last_question() + 1])

    def compare(self, adapters: Mapping[str, float], text: str | None = None) -> Iterator[str]:
        """What these adapters answer to `text`, or to the last question; the conversation stays as it is."""
        asked = self.messages[: self._last_question() + 1] if text is None else [*self.messages, Message("user", text)]
        return self._stream(asked, self.checked(adapters))

    def _answer(self, asked: list[Message]) -> Generator[str, None, None]:
        parts: list[str] = []
        try:
            with closing(self._stream(asked, self.active)) as stream:
                for part in stream:
                    parts.append(part)
                    yield part
        except EdgeloraError:
            parts.clear()
            raise
        finally:
            self._asked += 1
            if parts:
                self.messages = [*asked, Message("assistant", "".join(parts))]

    def _stream(self, asked: Sequence[Message], adapters: Mapping[str, float]) -> Generator[str, None, None]:
        # under the same seed a second try would be the first one again
        seed = (self.settings.sampling.seed + self._asked) % SEEDS
        sampling = replace(self.settings.sampling, seed=seed)
        prompt = as_asked(asked, self._infos(adapters), self.settings.system)
        stream = self.service.generate(Request(prompt, adapters, sampling, self.settings.max_tokens))
        try:
            with closing(read(stream)) as pieces:
                for piece in pieces:
                    if piece.text:
                        yield piece.text
        finally:
            self.usage = stream.usage or self.usage

    # -- what was said ------------------------------------------------------------------------------------------------

    def undo(self) -> str:
        """Take the last question and its answer back; returns the question."""
        at = self._last_question()
        question = self.messages[at].content or ""
        del self.messages[at:]
        return question

    def reset(self) -> None:
        """Begin anew: the next answer is what the first one would have been."""
        self.messages, self._asked = [], 0

    def resume(self, messages: Sequence[Message]) -> None:
        """Go on with a conversation that somebody else had; its system message becomes this one's.

        Raises ConfigError for one that does not end with an answer.
        """
        said = list(messages)
        system = said.pop(0).content if said and said[0].role == "system" else None
        if not said or said[-1].role != "assistant" or all(m.role != "user" for m in said):
            raise ConfigError("no conversation to go on with", "it has no question that was answered", "choose another")
        self.reset()
        self.settings = replace(self.settings, system=system)
        self.messages = said

    def _last_question(self) -> int:
        """Which message it is. Raises ConfigError if there is none."""
        for at in range(len(self.messages) - 1, -1, -1):
            if self.messages[at].role == "user":
                return at
        raise ConfigError("no question was asked yet", "the conversation is empty", "ask something first")
