"""The same tokens through torch and through llama.cpp: the work behind every certificate, in a child process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgelora.base.model import Base, open_base
from edgelora.data.conversation import Conversation
from edgelora.data.encode import Example
from edgelora.data.pack import IGNORE, pack
from edgelora.device import choose_products, compute_threads, computing
from edgelora.errors import DataError, EdgeloraError
from edgelora.evaluate.fidelity import Fidelity, fidelity
from edgelora.peft.adapter import Adapter, read_adapter
from edgelora.pipeline.check_rows import CHECK_TEXTS, DEFAULT_CHECK
from edgelora.pipeline.evaluate import context_for
from edgelora.pipeline.tokenize import Tokenized, difference_of_chat, tokenize_chat, tokenize_text
from edgelora.progress import OnProgress, Pace, Progress

if TYPE_CHECKING:
    from edgelora.nn.decoder import Decoder
    from runtime.engine import Engine

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
    fidelity: Fidelity
    """llama.cpp on the file against torch over the file's own blocks."""
    loss: Fidelity
    """llama.cpp on the file against torch over what it was made from, unquantized."""


def compare(
    draft: Path, reference: Reference, rows: Sequence[Conversation] | None, on_progress: OnProgress
) -> Compared:
    """Hold the GGUF model at `draft` against `reference` on `rows`.

    Without rows on the built-in ones; on plain texts, if the model's template knows no such conversations or is none.
    """
    import torch

    from edgelora.base.decoder import build_decoder
    from edgelora.peft.blend import blend
    from runtime.engine import Engine

    (base, adapters), written = reference.open(), open_base(draft)
    texts = [tokenize_text(base, text) for text in CHECK_TEXTS]
    rows, chats = _chats(base, rows)
    groups = list(_groups(_examples(chats or texts, min(written.context, TOKENS_TOGETHER))))
    longest = max(len(example) for group in groups for example in group)
    pace = Pace(2 * len(groups))

    def step(tokens: int) -> None:
        speed, eta = pace.step(tokens)
        on_progress(Progress("check", pace.done, pace.total, tokens_per_s=speed, eta_s=eta))

    with (
        computing(choose_products(), compute_threads()),
        Engine(written, n_ctx=context_for(written, longest), n_sequences=ROWS_TOGETHER) as engine,
        torch.no_grad(),
    ):
        equal_ids = sum(_same_ids(base, engine, row) for row in [*chats, *texts])
        equal_ends = sum(_same_end(base, engine, row) for row in chats)
        own = fidelity(pairs(build_decoder(written), engine, groups, step))
        decoder = build_decoder(base)
        blend(decoder, adapters)
        loss = fidelity(pairs(decoder, engine, groups, step))
    equal_text = sum(_same_text(written, row, chat) for row, chat in zip(rows, chats, strict=True))
    return Compared(len(chats) + len(texts), equal_ids, len(chats), equal_text, equal_ends, own, loss)


def pairs(
    decoder: Decoder, engine: Engine, groups: Sequence[Sequence[Example]], step: Callable[[int], None]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """torch's and llama.cpp's logits, each (n, V), where `groups` learn, group by group."""
    import torch

    for group in groups:
        batch = pack(group)
        tokens, positions = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.positions)
        hidden = decoder(tokens, positions, list(batch.segment_starts), batch.prefix)
        ours = decoder.logits_of(hidden[torch.from_numpy(batch.labels != IGNORE)]).numpy()
        wanted = [(e.loss_mask[1:].nonzero()[0]).tolist() for e in group]  # what predicts the learned tokens
        yield ours, engine.logits([e.input_ids.tolist() for e in group], wanted)
        step(batch.n_tokens)


def _chats(base: Base, rows: Sequence[Conversation] | None) -> tuple[Sequence[Conversation], list[Tokenized]]:
    if base.template_source is None:
        return (), []
    try:
        asked = DEFAULT_CHECK if rows is None else rows
        return asked, [tokenize_chat(base.tokenizer, base.template, row) for row in asked]
    except DataError:
        if rows is not None:
            raise
        return (), []  # a template that does not parse, or wants other roles, is no fault of the file


def _examples(said: Sequence[Tokenized], room: int) -> list[Example]:
    """Every token is compared, the template's too, but what all rows begin with only once. A row is cut at `room`."""
    ids = [np.array(row.ids[:room], np.int64) for row in said]
    shortest = min(map(len, ids))
    differ = np.flatnonzero((np.stack([row[:shortest] for row in ids]) != ids[0][:shortest]).any(0))
    shared = int(differ[0]) if len(differ) else shortest - 1
    return [Example(row, np.arange(len(row)) > (shared if i else 0)) for i, row in enumerate(ids)]


def _groups(examples: Sequence[Example]) -> Iterator[list[Example]]:
    group: list[Example] = []
    for example in examples:
        if len(group) == ROWS_TOGETHER or sum(map(len, group)) + len(example) > TOKENS_TOGETHER:
            yield group
            group = []
        group.append(example)
    yield group


def _same_ids(base: Base, engine: Engine, row: Tokenized) -> bool:
    if row.learned is None:
        return engine.model.tokenize(row.text, parse_special=False) == row.ids
    return difference_of_chat(base.tokenizer, engine.model, row) is None


def _same_end(base: Base, engine: Engine, row: Tokenized) -> bool:
    """Whether the token that ends the last learned turn ends it in llama.cpp as well."""
    last = max(i for i, learned in enumerate(row.learned or [True]) if learned)
    return engine.model.ends_generation(row.ids[last]) == (row.ids[last] in base.tokenizer.eog_ids)


def _same_text(written: Base, row: Conversation, wanted: Tokenized) -> bool:
    """Whether the template inside the file renders the same prompt."""
    try:
        return tokenize_chat(written.tokenizer, written.template, row).text == wanted.text
    except EdgeloraError:  # none there, or one that does not parse
        return False
