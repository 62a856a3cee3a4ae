"""The same tokens through torch and through llama.cpp: the work behind every certificate, in a child process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from edgelora.base.model import Base, open_base
from edgelora.data.conversation import Conversation
from edgelora.data.encode import Example
from edgelora.data.pack import IGNORE, pack
from edgelora.device import choose_products, compute_threads, computing
from edgelora.errors import DataError, EdgeloraError
from edgelora.evaluate.fidelity import Fidelity, fidelity
from edgelora.peft.adapter import Adapter, read_adapter
from edgelora.pipeline.check_rows import CHECK_TEXTS, DEFAULT_CHECK, require_template
from edgelora.pipeline.evaluate import context_for
from edgelora.pipeline.tokenize import Tokenized, difference_of_chat, tokenize_chat, tokenize_text
from edgelora.progress import OnProgress, Pace, Progress

if TYPE_CHECKING:
    from edgelora.nn.decoder import Decoder
    from runtime.scorer import ScoringEngine

ROWS_TOGETHER = 8
TOKENS_TOGETHER = 256  # logits are float32 over the whole vocabulary, on both sides: 256 of Gemma's are 270 MB


@dataclass(frozen=True)
class Reference:
    """What a file was made from: a base, the adapter folders merged into it at their scales, a template chosen."""

    base: Path
    adapters: tuple[tuple[Path, float], ...] = ()
    template: str | None = None

    def open(self) -> tuple[Base, list[tuple[Adapter, float]]]:
        base = open_base(self.base)
        adapters = [(read_adapter(path, base.linears), scale) for path, scale in self.adapters]
        for adapter, _ in adapters:
            base = base.as_trained(adapter.contract)
        return (base if self.template is None else base.with_template(self.template)), adapters


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
    draft: Path, reference: Reference, rows: Sequence[Conversation] | None, on_progress: OnProgress
) -> Compared:
    """Hold the model at `draft` (a GGUF or a checkpoint) against `reference` on `rows`.

    Without rows on the built-in ones; on plain texts, if the model's template knows no such conversations or is none.
    """
    import torch

    from edgelora.base.decoder import build_decoder
    from edgelora.peft.blend import blend

    (base, adapters), written = reference.open(), open_base(draft)
    texts = [tokenize_text(base, text) for text in CHECK_TEXTS]
    rows, chats = _chats(base, rows)
    groups = list(_groups(_examples(chats or texts, min(written.context, TOKENS_TOGETHER))))
    pace = Pace((1 + written.is_gguf) * len(groups))

    def step(tokens: int) -> None:
        speed, eta = pace.step(tokens)
        on_progress(Progress("check", pace.done, pace.total, tokens_per_s=speed, eta_s=eta))

    with computing(choose_products(), compute_threads()), _run(written, groups) as run, torch.no_grad():
        equal_ids = sum(run.same_ids(base, row) for row in [*chats, *texts])
        equal_ends = sum(_same_end(base, run, row) for row in chats)
        own = fidelity(pairs(build_decoder(written), run.logits, groups, step)) if written.is_gguf else None
        decoder = build_decoder(base)
        blend(decoder, adapters)
        loss = fidelity(pairs(decoder, run.logits, groups, step))
    equal_text = sum(_same_text(written, row, chat) for row, chat in zip(rows, chats, strict=True))
    return Compared(len(chats) + len(texts), equal_ids, len(chats), equal_text, equal_ends, own, loss)


Group = Sequence[Example]


class Run(Protocol):
    """The written model where it runs: whether it reads a text alike, where it ends a turn, and what it computes."""

    def same_ids(self, base: Base, row: Tokenized) -> bool: ...

    def ends_generation(self, token: int) -> bool: ...

    def logits(self, group: Group) -> np.ndarray: ...


@dataclass(frozen=True)
class InLlamaCpp:
    """A GGUF in llama.cpp."""

    engine: ScoringEngine

    def same_ids(self, base: Base, row: Tokenized) -> bool:
        if row.learned is None:
            return self.engine.model.tokenize(row.text, parse_special=False) == row.ids
        return difference_of_chat(base.tokenizer, self.engine.model, row) is None

    def ends_generation(self, token: int) -> bool:
        return self.engine.model.ends_generation(token)

    def logits(self, group: Group) -> np.ndarray:
        wanted = [(e.loss_mask[1:].nonzero()[0]).tolist() for e in group]  # what predicts the learned tokens
        return self.engine.logits([e.input_ids.tolist() for e in group], wanted)


@dataclass(frozen=True)
class InTorch:
    """A checkpoint, as it is read again."""

    written: Base
    decoder: Decoder

    def same_ids(self, base: Base, row: Tokenized) -> bool:  # noqa: ARG002
        return self.written.tokenizer.sha256 == base.tokenizer.sha256

    def ends_generation(self, token: int) -> bool:
        return token in self.written.tokenizer.eog_ids

    def logits(self, group: Group) -> np.ndarray:
        return torch_logits(self.decoder, group)


@contextmanager
def _run(written: Base, groups: Sequence[Group]) -> Iterator[Run]:
    if not written.is_gguf:
        from edgelora.base.decoder import build_decoder

        yield InTorch(written, build_decoder(written))
        return
    from runtime.scorer import ScoringEngine

    longest = max(len(example) for group in groups for example in group)
    with ScoringEngine(written, n_ctx=context_for(written, longest), n_sequences=ROWS_TOGETHER) as engine:
        yield InLlamaCpp(engine)


def pairs(
    decoder: Decoder, other: Callable[[Group], np.ndarray], groups: Sequence[Group], step: Callable[[int], None]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """torch's logits and the other's, each (n, V), where `groups` learn, group by group."""
    for group in groups:
        yield torch_logits(decoder, group), other(group)
        step(sum(map(len, group)))


def torch_logits(decoder: Decoder, group: Group) -> np.ndarray:
    """float32 (n, V): what predicts each learned token of `group`, in its order."""
    import torch

    batch = pack(group)
    tokens, positions = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.positions)
    hidden = decoder(tokens, positions, list(batch.segment_starts), batch.prefix)
    logits: np.ndarray = decoder.logits_of(hidden[torch.from_numpy(batch.labels != IGNORE)]).numpy()
    return logits


def _chats(base: Base, rows: Sequence[Conversation] | None) -> tuple[Sequence[Conversation], list[Tokenized]]:
    if base.template_source is None:
        if rows is not None:
            require_template(base)
        return (), []
    try:
        asked = DEFAULT_CHECK if rows is None else rows
        return asked, [tokenize_chat(base.tokenizer, base.template, row) for row in asked]
    except DataError:
        if rows is not None:
            raise
        return (), []  # a template that does not parse, or wants other roles, is no fault of the file


def _examples(said: Sequence[Tokenized], room: int) -> list[Example]:
    """Every token is compared, the template's too, but what all rows begin with only once."""
    ids = [np.array(_cut(row, room), np.int64) for row in said]
    shortest = min(map(len, ids))
    differ = np.flatnonzero((np.stack([row[:shortest] for row in ids]) != ids[0][:shortest]).any(0))
    shared = int(differ[0]) if len(differ) else shortest - 1
    return [Example(row, np.arange(len(row)) > (shared if i else 0)) for i, row in enumerate(ids)]


def _cut(row: Tokenized, room: int) -> list[int]:
    """At most `room` ids. Of a longer conversation the first, which may be BOS, and those up to its last answer's end.

    Both sides see the same ids, so a question that is cut costs nothing; an answer that is cut would not be compared.
    """
    if row.learned is None or len(row.ids) <= room:
        return row.ids[:room]
    end = 1 + max((i for i, learned in enumerate(row.learned) if learned), default=room - 1)
    return row.ids[:room] if end <= room else [row.ids[0], *row.ids[end - room + 1 : end]]


def _groups(examples: Sequence[Example]) -> Iterator[list[Example]]:
    group: list[Example] = []
    for example in examples:
        if len(group) == ROWS_TOGETHER or sum(map(len, group)) + len(example) > TOKENS_TOGETHER:
            yield group
            group = []
        group.append(example)
    yield group


def _same_end(base: Base, run: Run, row: Tokenized) -> bool:
    """Whether the token that ends the last learned turn ends it where it runs as well."""
    last = max(i for i, learned in enumerate(row.learned or [True]) if learned)
    return run.ends_generation(row.ids[last]) == (row.ids[last] in base.tokenizer.eog_ids)


def _same_text(written: Base, row: Conversation, wanted: Tokenized) -> bool:
    """Whether the template inside the file renders the same prompt."""
    try:
        return tokenize_chat(written.tokenizer, written.template, row).text == wanted.text
    except EdgeloraError:  # none there, or one that does not parse
        return False
