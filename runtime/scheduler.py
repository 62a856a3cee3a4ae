"""Who computes next: several conversations in one context, grouped by adapters, fair between the groups.

A group's turn is one part of a prompt, if one waits, then QUANTUM tokens of answers: so that prompts do not starve
answers, nor many answers a prompt. Parts of prompts are evaluated alone, which keeps the shape of each decode the same
whoever else is there; the answers of a group are evaluated together.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from functools import partial

from edgelora.errors import EdgeloraError
from runtime.adapters import Adapters
from runtime.answer import Answer
from runtime.lanes import Lane, Lanes
from runtime.service import Finish
from runtime.states import Key
from runtime.stream import LiveStream

QUANTUM = 16

Group = tuple[int, Key]


class Turns:
    """Round robin between groups that come and go: a new one waits until all that were there have had a turn."""

    def __init__(self) -> None:
        self._served: dict[Group, int] = {}
        self._now = 0

    def next(self, groups: set[Group]) -> Group:
        """Whose turn it is: of these groups (one at least) the one served longest ago."""
        self._served = {g: n for g, n in self._served.items() if g in groups}
        for group in groups:
            self._served.setdefault(group, self._now)
        self._now += 1
        chosen = min(self._served, key=lambda g: self._served[g])
        self._served[chosen] = self._now
        return chosen


class Scheduler:
    """For the owner's thread. At most `conversations` answers are in work, the others wait."""

    def __init__(self, lanes: Lanes, adapters: Adapters, conversations: int, token_bytes: int) -> None:
        self._lanes, self._adapters = lanes, adapters
        self._limit, self._token_bytes = conversations, token_bytes
        self._waiting: OrderedDict[Key, deque[Answer]] = OrderedDict()
        self._running: list[Answer] = []
        self._turns = Turns()
        self._group: Group | None = None
        self._prompt_due, self._left, self._taken = False, 0, 0

    @property
    def n_running(self) -> int:
        return len(self._running)

    @property
    def n_waiting(self) -> int:
        return sum(map(len, self._waiting.values()))

    def submit(self, answer: Answer) -> None:
        """Let an answer wait for its turn, and hold its adapters until it has ended."""
        self._adapters.hold(answer.key)
        self._waiting.setdefault(answer.key, deque()).append(answer)

    def cancel(self, stream: LiveStream) -> None:
        """End an answer where it is; nothing happens if it has ended."""
        for answer in (*self._running, *(a for queue in self._waiting.values() for a in queue)):
            if answer.stream is stream:
                self._end(answer, "cancelled")

    def fail_all(self, error: EdgeloraError) -> None:
        """End every answer with this error, those that wait too."""
        for answer in (*self._running, *(a for queue in self._waiting.values() for a in queue)):
            self._fail(answer, error)

    def step(self) -> bool:
        """One decode. False if there is nothing to do."""
        self._admit()
        if not self._running:
            return False
        group = self._turn()
        lane = self._lanes.all[group[0]]
        members = [a for a in self._running if a.group == group]
        prompts, answers = [a for a in members if a.parts], sorted((a for a in members if not a.parts), key=_sequence)
        due, self._prompt_due = self._prompt_due, False
        if due and prompts:
            self._evaluate(lane, prompts[0])
        elif answers:
            self._left -= len(answers)
            self._advance(lane, group[1], answers)
        else:
            self._left = 0
        return True

    def _turn(self) -> Group:
        """The group whose turn it is."""
        groups = {a.group for a in self._running}
        if self._group not in groups or not (self._prompt_due or self._left > 0):
            self._group = self._turns.next(groups)
            self._prompt_due, self._left = True, QUANTUM
        assert self._group is not None
        return self._group

    def _admit(self) -> None:
        """Let those in that waited, one of each set of adapters by turns."""
        while self._waiting and len(self._running) < self._limit:
            key, queue = self._waiting.popitem(last=False)
            answer = queue.popleft()
            if queue:
                self._waiting[key] = queue  # behind the others
            self._running.append(answer)
            self._taken += 1
            try:
                self._seat(answer)
            except EdgeloraError as e:
                self._fail(answer, e)

    def _seat(self, answer: Answer) -> None:
        answer.lane = self._lanes.choose(answer.active)
        answer.slot, shared = self._lanes.all[answer.lane].take(answer.chain, answer.active, self._taken)
        answer.begin(shared * answer.limits.chunk)

    def _evaluate(self, lane: Lane, answer: Answer) -> None:
        assert answer.slot is not None
        part = answer.parts[0]
        try:
            rows = lane.evaluate(part, answer.slot, last=len(answer.parts) == 1)
        except EdgeloraError as e:
            self._fail(answer, e)
            return
        answer.parts.popleft()
        answer.position = part.last
        answer.slot.chain = answer.chain[: part.last // answer.limits.chunk]
        if not answer.parts:
            self._choose(answer, partial(answer.take, rows[0]))

    def _advance(self, lane: Lane, key: Key, answers: list[Answer]) -> None:
        due = [answer.due() for answer in answers]
        try:
            rows = lane.step(
                key, [(a.slot, a.position, tokens) for a, tokens in zip(answers, due, strict=True) if a.slot]
            )
        except EdgeloraError as e:
            for answer in answers:
                self._fail(answer, e)
            return
        for answer, tokens, found in zip(answers, due, rows, strict=True):
            before = answer.position
            self._choose(answer, partial(answer.advance, tokens, found))
            if answer.slot is not None and answer.position < before + len(tokens):
                lane.forget(answer.slot, answer.position)

    def _choose(self, answer: Answer, take: Callable[[], None]) -> None:
        """Let an answer go on, and leave if that ends it."""
        try:
            take()
        except EdgeloraError as e:
            self._fail(answer, e)
            return
        if answer.finish is not None:
            self._end(answer, answer.finish)

    def _end(self, answer: Answer, finish: Finish) -> None:
        answer.end(finish, answer.position * self._token_bytes)
        self._leave(answer)

    def _fail(self, answer: Answer, error: EdgeloraError) -> None:
        answer.stream.fail(error)
        if answer.slot is not None:
            self._lanes.all[answer.lane].drop(answer.slot)
        self._leave(answer)

    def _leave(self, answer: Answer) -> None:
        """Out of work or out of the queue, its sequence and adapters free for others."""
        if answer in self._running:
            self._running.remove(answer)
        else:
            queue = self._waiting[answer.key]
            queue.remove(answer)
            if not queue:
                del self._waiting[answer.key]
        if answer.slot is not None:
            answer.slot.busy = False
        self._adapters.release(answer.key)
        answer.sampler.close()


def _sequence(answer: Answer) -> int:
    """llama.cpp evaluates consecutive sequences together."""
    return -1 if answer.slot is None else answer.slot.sequence
