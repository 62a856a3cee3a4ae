"""The export of a soft prompt or a prefix: torch computes behind it, and llama.cpp over the written file likewise."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgelora.base.head import Head
from edgelora.base.model import Base, open_base
from edgelora.child import run_in_child
from edgelora.data.conversation import Conversation
from edgelora.device import compute_threads
from edgelora.evaluate.fidelity import Fidelity, fidelity
from edgelora.files.gguf import GGUFFile
from edgelora.files.soft_prompt import MAX_REFERENCE_TOKENS, N_REFERENCES, read_soft
from edgelora.pipeline.check_rows import DEFAULT_CHECK
from edgelora.pipeline.compare import logits, stepper
from edgelora.pipeline.evaluate import context_for
from edgelora.pipeline.said import Group, answered
from edgelora.pipeline.soft_states import SoftStates, soft_states
from edgelora.pipeline.tokenize import difference_of_chat, tokenize_chat
from edgelora.progress import OnProgress

if TYPE_CHECKING:
    from runtime.binding import Context
    from runtime.soft_prompt import Head as Before


@dataclass(frozen=True)
class SoftCheck:
    """A folder of PEFT's over a base, and what both sides must say. `base`: with the template it was trained with.

    n_before: positions that stand before every row.
    """

    base: Base
    folder: Path
    n_before: int
    rows: Sequence[Conversation]

    @property
    def groups(self) -> list[Group]:
        """The rows as token ids, a few at a time."""
        return answered(self.base, self.rows, self.base.context - self.n_before)

    def states(self, on_progress: OnProgress) -> SoftStates:
        """What torch computes, in a child."""
        examples = [example for group in self.groups for example in group]
        return run_in_child(
            soft_states, self.base.path, self.folder, examples, self._prompts(), with_torch=True,
            on_progress=on_progress,
        )  # fmt: skip

    def compare(self, gguf: Path, states: SoftStates, on_progress: OnProgress) -> tuple[int, Fidelity, Fidelity]:
        """How many rows have the same ids in llama.cpp, how far it is from torch without the file and with it."""
        both = (states.bare, states.behind)
        return run_in_child(
            _compare, self.base.path, self.base.chosen_template, gguf, self.rows, self.groups, both,
            on_progress=on_progress,
        )  # fmt: skip

    def _prompts(self) -> np.ndarray:
        """int32 (8, T): how the built-in conversations begin, without a template, in which all begin alike."""
        texts = [" ".join(turn.content or "" for turn in row.messages) for row in DEFAULT_CHECK[:N_REFERENCES]]
        ids = [self.base.tokenizer.encode(text).ids for text in texts]
        shortest = min(MAX_REFERENCE_TOKENS, *map(len, ids))
        return np.array([row[:shortest] for row in ids], np.int32)


def _compare(
    base_path: Path, template: str | None, gguf: Path, rows: Sequence[Conversation], groups: Sequence[Group],
    states: Sequence[np.ndarray], on_progress: OnProgress,
) -> tuple[int, Fidelity, Fidelity]:  # fmt: skip
    from runtime.binding import Context, Model
    from runtime.prefix import prepare

    base = open_base(base_path)
    content = read_soft(GGUFFile(gguf), base.architecture.gguf_name, base.config, base.context)
    longest = max(MAX_REFERENCE_TOKENS, *(len(example) for group in groups for example in group))
    room = context_for(base, content.length + longest)
    spoken = replace(base, chosen_template=template)
    side, step, found = Head(base), stepper(2 * len(groups), on_progress), []
    with (
        closing(Model(base.path)) as model,
        closing(Context(model, n_ctx=room, n_sequences=1, threads=compute_threads(), n_batch=room)) as context,
    ):
        texts = (tokenize_chat(spoken.tokenizer, spoken.template, row) for row in rows)
        equal = sum(difference_of_chat(spoken.tokenizer, model, text) is None for text in texts)
        head = prepare(content, context, str(gguf))
        for own, before in zip(states, (None, head), strict=True):
            sides = logits(partial(_predicting, context, before), [(side, own)], groups, step)
            found.append(fidelity((here, there) for there, (here,) in sides if there is not None))
    return equal, found[0], found[1]


def _predicting(context: Context, head: Before | None, group: Group) -> np.ndarray:
    """float32 (n, V) of what predicts the learned tokens of the group, one sequence at a time."""
    from runtime.prefix import logits_behind

    wanted = [example.loss_mask[1:].nonzero()[0].tolist() for example in group]
    return np.concatenate(
        [logits_behind(head, context, e.input_ids.tolist(), places) for e, places in zip(group, wanted, strict=True)]
    )
