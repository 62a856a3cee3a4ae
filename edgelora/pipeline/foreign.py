"""Models of families that edgelora does not compute and llama.cpp does: opened, and held against their source there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgelora.base.model import Base, open_base, quant_of
from edgelora.data.folder import read_template
from edgelora.data.template import ChatTemplate, chatml
from edgelora.data.tokenizer import Tokenizer
from edgelora.data.vocabulary import vocabulary_from_gguf
from edgelora.device import compute_threads
from edgelora.errors import BaseModelError
from edgelora.evaluate.fidelity import Tally
from edgelora.files.gguf import GGUFFile
from edgelora.files.split import open_gguf
from edgelora.pipeline.compare import Compared, InLlamaCpp, same_end, same_text, stepper
from edgelora.pipeline.said import Group, Said
from edgelora.progress import OnProgress

if TYPE_CHECKING:
    from runtime.binding import Context, Model

SHORTEST_CONTEXT = 512  # of a model that does not say how long its own is


@dataclass(frozen=True)
class Foreign:
    """A GGUF of a family that edgelora does not compute: llama.cpp does, and it says itself how it is spoken to."""

    file: GGUFFile
    tokenizer: Tokenizer
    why: str
    chosen_template: str | None = None

    @property
    def path(self) -> Path:
        return self.file.path

    @property
    def quant(self) -> str:
        return quant_of(self.file)

    @property
    def context(self) -> int:
        stated: int = self.file.get(f"{self.file.architecture}.context_length", int, SHORTEST_CONTEXT)
        return stated

    @property
    def template_source(self) -> str | None:
        return self.file.get("tokenizer.chat_template", str) or self.chosen_template

    @property
    def template(self) -> ChatTemplate:
        """Raises BaseModelError if there is none."""
        source, t = self.template_source, self.tokenizer
        if not source:
            raise BaseModelError(
                what=f"{self.file.path}: it has no chat template",
                why="without one nobody knows how a conversation looks to this model",
                fix="pass --chat-template chatml, or the path of a Jinja file",
            )
        return ChatTemplate(source, bos=t.text_of(t.bos_id), eos=t.text_of(t.eos_id))

    def with_template(self, choice: str) -> Foreign:
        """The same speaking by `chatml` or a Jinja file, where it has no template of its own."""
        text = chatml(self.tokenizer) if choice == "chatml" else read_template(Path(choice))
        return replace(self, chosen_template=text)


def open_model(path: Path) -> Base | Foreign:
    """A base, or a GGUF that llama.cpp alone computes. Raises what `open_base` raises for anything else."""
    try:
        return open_base(path)
    except BaseModelError as e:
        if path.suffix != ".gguf":
            raise
        file = open_gguf(path)
        if file.get("general.type", str, "model") != "model":
            raise
        return Foreign(file, Tokenizer(vocabulary_from_gguf(file)), e.what)


@dataclass(frozen=True)
class _Plain:
    """A model and a context in llama.cpp: what a comparison asks of an engine."""

    model: Model
    context: Context

    def logits(self, sequences: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]]) -> np.ndarray:
        from runtime.binding import Entry

        self.context.clear()
        entries = [
            Entry(token, i, number, i in chosen)
            for number, (ids, chosen) in enumerate(zip(sequences, map(set, wanted), strict=True))
            for i, token in enumerate(ids)
        ]
        return self.context.decode(entries).copy()


@contextmanager
def _opened(path: Path, groups: Sequence[Group]) -> Iterator[_Plain]:
    from runtime.binding import Context, Model

    model = Model(path)
    try:
        longest, most = max(len(e) for group in groups for e in group), max(map(len, groups))
        n_batch = max(sum(map(len, group)) for group in groups)
        context = Context(model, n_ctx=longest, n_sequences=most, threads=compute_threads(), n_batch=n_batch)
        try:
            yield _Plain(model, context)
        finally:
            context.close()
    finally:
        model.close()


def compare_foreign(draft: Path, source: Path, said: Said, on_progress: OnProgress) -> Compared:
    """Hold the GGUF at `draft` against the one it was made from, both in llama.cpp: torch does not know the family."""
    written, base = open_model(draft), open_model(source)
    loss, step = Tally(), stepper(len(said.groups), on_progress)
    with _opened(draft, said.groups) as there, _opened(source, said.groups) as here:
        run, unquantized = InLlamaCpp(there), InLlamaCpp(here)
        equal_ids = sum(run.same_ids(base, row) for row in [*said.chats, *said.texts])
        equal_ends = sum(same_end(base, run, row) for row in said.chats)
        for group in said.groups:
            loss.add(unquantized.logits(group), run.logits(group))
            step(sum(map(len, group)))
    equal_text = sum(same_text(written, row, chat) for row, chat in zip(said.rows, said.chats, strict=True))
    return Compared(
        len(said.chats) + len(said.texts), equal_ids, len(said.chats), equal_text, equal_ends, None, loss.found()
    )
