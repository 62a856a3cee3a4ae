"""A GGUF in llama.cpp, without a LoRA and with it, against torch on the same rows: behind an adapter's certificate.

In two child processes, as `compare.py` has them: torch's gives hidden states, and llama.cpp's holds its own against.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgelora.base.head import Head
from edgelora.child import run_in_child
from edgelora.data.conversation import Conversation
from edgelora.evaluate.fidelity import Fidelity, Tally
from edgelora.pipeline.compare import InLlamaCpp, in_llama_cpp, logits, stepper
from edgelora.pipeline.new_rows import head_rows
from edgelora.pipeline.said import Group, answered
from edgelora.pipeline.tokenize import difference_of_chat, tokenize_chat
from edgelora.pipeline.torch_states import Reference, torch_states
from edgelora.progress import OnProgress

LORA = "candidate"


@dataclass(frozen=True)
class SideBySide:
    """What is held together. llama.cpp has `bare`, a GGUF, and then `lora` over it (None: nothing belongs there)."""

    bare: Path
    lora: Path | None
    wholes: tuple[Reference, ...]
    """What llama.cpp is held against with the LoRA; the last says what the rows are encoded with."""
    rows: Sequence[Conversation]

    @property
    def models(self) -> tuple[Reference, ...]:
        """What torch computes: first what stands for `bare`, then each of `wholes`."""
        return Reference(self.bare), *self.wholes


def side_by_side(work: SideBySide, on_progress: OnProgress) -> tuple[int, list[Fidelity]]:
    """How many rows have the same ids, and how far llama.cpp is from torch: bare, and from each whole with the LoRA."""
    base, _ = work.wholes[-1].open()
    groups = answered(base, work.rows, base.context)
    examples = [example for group in groups for example in group]
    states = run_in_child(torch_states, work.models, examples, with_torch=True, on_progress=on_progress)
    return run_in_child(_compare, work, groups, states, on_progress=on_progress)


def _compare(
    work: SideBySide, groups: Sequence[Group], states: Sequence[np.ndarray], on_progress: OnProgress
) -> tuple[int, list[Fidelity]]:
    opened = [model.open() for model in work.models]
    (written, _), (base, _) = opened[0], opened[-1]
    sides = [(Head(model, head_rows(model, own)), found) for (model, own), found in zip(opened, states, strict=True)]
    step, tallies = stepper(2 * len(groups), on_progress), [Tally() for _ in sides]
    with in_llama_cpp(written, groups) as engine:
        texts = (tokenize_chat(base.tokenizer, base.template, row) for row in work.rows)
        equal = sum(difference_of_chat(base.tokenizer, engine.model, text) is None for text in texts)
        if work.lora is not None:
            engine.load_own(LORA, work.lora)
        for part, active in ((slice(0, 1), {}), (slice(1, None), {} if work.lora is None else {LORA: 1.0})):
            engine.use(active)
            for there, here in logits(InLlamaCpp(engine).logits, sides[part], groups, step):
                assert there is not None
                for tally, own in zip(tallies[part], here, strict=True):
                    tally.add(own, there)
    return equal, [tally.found() for tally in tallies]
