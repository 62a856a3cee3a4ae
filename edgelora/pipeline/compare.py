"""The same tokens through torch and through llama.cpp: the work behind every certificate, in two child processes.

The first has torch and gives hidden states (`torch_states.py`); the second has llama.cpp, and turns them into logits to
hold its own against. So neither a whole model in floats nor torch lies beside llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from edgelora.base.head import Head
from edgelora.base.model import Base, open_base
from edgelora.data.conversation import Conversation
from edgelora.device import compute_threads
from edgelora.errors import EdgeloraError
from edgelora.evaluate.fidelity import Fidelity, Tally
from edgelora.pipeline.check_rows import Speaks
from edgelora.pipeline.evaluate import context_for
from edgelora.pipeline.new_rows import head_rows
from edgelora.pipeline.said import Group, Said
from edgelora.pipeline.tokenize import Tokenized, difference_of_chat, tokenize_chat
from edgelora.pipeline.torch_states import Reference
from edgelora.progress import OnProgress, Pace, Progress

if TYPE_CHECKING:
    from runtime.binding import Model
    from runtime.scorer import ScoringEngine

POSITIONS = 64  # whose logits are there at once on torch's side


@dataclass(frozen=True)
class Compared:
    """What is equal: the ids of `n_texts`; of `n_rows`, the rendered text and the end of the turn. And two numbers."""

    n_texts: int
    equal_ids: int
    n_rows: int
    equal_text: int
    equal_ends: int
    fidelity: Fidelity | None
    """llama.cpp on the file against torch over the file's own blocks; None for a checkpoint, which it cannot read."""
    loss: Fidelity
    """The file (in llama.cpp; a checkpoint in torch) against torch over what it was made from, unquantized."""


def compare(
    draft: Path, reference: Reference, said: Said, states: Sequence[np.ndarray], on_progress: OnProgress
) -> Compared:
    """Hold the model at `draft` (a GGUF or a checkpoint) against `reference` on what is said.

    states: of the draft and of the reference, as `torch_states` gives them.
    """
    (base, adapters), written = reference.open(), open_base(draft)
    heads = Head(written), Head(base, head_rows(base, adapters))
    sides = list(zip(heads, states, strict=True))
    own, loss, step = Tally(), Tally(), stepper(len(said.groups), on_progress)
    with _run(written, said.groups) as run:
        equal_ids = sum(run.same_ids(base, row) for row in [*said.chats, *said.texts])
        equal_ends = sum(same_end(base, run, row) for row in said.chats)
        for there, (here, unquantized) in logits(run.logits, sides, said.groups, step):
            if there is not None:
                own.add(here, there)
            loss.add(unquantized, here if there is None else there)
    equal_text = sum(same_text(written, row, chat) for row, chat in zip(said.rows, said.chats, strict=True))
    return Compared(
        len(said.chats) + len(said.texts), equal_ids, len(said.chats), equal_text, equal_ends,
        own.found() if written.is_gguf else None, loss.found(),
    )  # fmt: skip


Side = tuple[Head, np.ndarray]
"""A model's head and the states (n, d) that it reads."""


def logits(
    run: Callable[[Group], np.ndarray | None],
    sides: Sequence[Side],
    groups: Sequence[Group],
    step: Callable[[int], None],
) -> Iterator[tuple[np.ndarray | None, list[np.ndarray]]]:
    """Of some positions at a time, in order: what `run` gives (None: it computes nothing), and what each side does."""
    begin = 0
    for group in groups:
        n, there = sum(example.n_loss_tokens for example in group), run(group)
        for first in range(0, n, POSITIONS):
            last = min(first + POSITIONS, n)
            here = [head.logits(states[begin + first : begin + last]) for head, states in sides]
            yield None if there is None else there[first:last], here
        begin += n
        step(sum(map(len, group)))


def stepper(n_groups: int, on_progress: OnProgress) -> Callable[[int], None]:
    """What hears of each group that is done, and of how many tokens it had."""
    pace = Pace(n_groups)

    def step(tokens: int) -> None:
        speed, eta = pace.step(tokens)
        on_progress(Progress("check", pace.done, pace.total, tokens_per_s=speed, eta_s=eta))

    return step


class Run(Protocol):
    """The written model where it runs: whether it reads a text alike, where it ends a turn, and what it computes."""

    def same_ids(self, base: Speaks, row: Tokenized) -> bool:
        """Whether it reads the row's text as the same ids."""
        ...

    def ends_generation(self, token: int) -> bool:
        """Whether an answer ends with this token."""
        ...

    def logits(self, group: Group) -> np.ndarray | None:
        """float32 (n, V) of what predicts the learned tokens of the group; None: what torch computes."""
        ...


class Computes(Protocol):
    """llama.cpp over one model, as `ScoringEngine` has it."""

    @property
    def model(self) -> Model: ...

    def logits(self, sequences: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]]) -> np.ndarray:
        """float32 (n, V) at the `wanted` positions of each sequence, one behind another."""
        ...


@dataclass(frozen=True)
class InLlamaCpp:
    """A GGUF in llama.cpp."""

    engine: Computes

    def same_ids(self, base: Speaks, row: Tokenized) -> bool:
        if row.learned is None:
            return self.engine.model.tokenize(row.text, parse_special=False) == row.ids
        return difference_of_chat(base.tokenizer, self.engine.model, row) is None

    def ends_generation(self, token: int) -> bool:
        return self.engine.model.ends_generation(token)

    def logits(self, group: Group) -> np.ndarray:
        wanted = [(e.loss_mask[1:].nonzero()[0]).tolist() for e in group]
        return self.engine.logits([e.input_ids.tolist() for e in group], wanted)


@dataclass(frozen=True)
class InTorch:
    """A checkpoint, as it is read again."""

    written: Base

    def same_ids(self, base: Speaks, row: Tokenized) -> bool:  # noqa: ARG002
        return self.written.tokenizer.sha256 == base.tokenizer.sha256

    def ends_generation(self, token: int) -> bool:
        return token in self.written.tokenizer.eog_ids

    def logits(self, group: Group) -> None:  # noqa: ARG002
        return None


@contextmanager
def _run(written: Base, groups: Sequence[Group]) -> Iterator[Run]:
    if not written.is_gguf:
        yield InTorch(written)
        return
    with in_llama_cpp(written, groups) as engine:
        yield InLlamaCpp(engine)


@contextmanager
def in_llama_cpp(base: Base, groups: Sequence[Group]) -> Iterator[ScoringEngine]:
    """A model open in llama.cpp, with room for each of the groups."""
    from runtime.scorer import ScoringEngine

    room = context_for(base, max(len(example) for group in groups for example in group))
    sequences = max(map(len, groups)) - 1
    # as many threads as torch has: a trial of several costs what these few decodes do
    with ScoringEngine(base, n_ctx=room, n_sequences=sequences, threads=compute_threads()) as engine:
        yield engine


def same_end(base: Speaks, run: Run, row: Tokenized) -> bool:
    """Whether the token that ends the last learned turn ends it where it runs as well."""
    last = max(i for i, learned in enumerate(row.learned or [True]) if learned)
    return run.ends_generation(row.ids[last]) == (row.ids[last] in base.tokenizer.eog_ids)


def same_text(written: Speaks, row: Conversation, wanted: Tokenized) -> bool:
    """Whether the template inside the file renders the same prompt."""
    try:
        return tokenize_chat(written.tokenizer, written.template, row).text == wanted.text
    except EdgeloraError:  # none there, or one that does not parse
        return False
