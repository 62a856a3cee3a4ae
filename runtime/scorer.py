"""Answers and scores of many questions side by side, for evaluation and certificates: one base, a set of adapters.

Each call evaluates all it needs and leaves nothing behind, so adapters may change between calls. Conversations go to
`engine.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np

from edgelora.base.model import Base
from edgelora.device import Choice
from edgelora.errors import AdapterError, EngineError
from edgelora.evaluate.protocols import Alternative, Answer, Question, Rates
from edgelora.files.adapter_check import contract_of, require_fit
from edgelora.files.contract import require_its_base
from edgelora.files.gguf import GGUFFile
from edgelora.progress import OnProgress, Pace, Progress, silent
from runtime.adapters import last_place
from runtime.alternatives import log_p
from runtime.bench import prompt_and_generation_speed, rates
from runtime.binding import Context, Entry, Lora, Model
from runtime.names import require_scale, unknown_adapter
from runtime.preflight import Checked, preflight
from runtime.slot import Slot
from runtime.threads import choose_threads


def _require_plain(checked: Checked) -> None:
    """Raise AdapterError for an adapter that is more than factors on weights from the first token on."""
    if not checked.invocation and checked.soft is None:
        return
    kind = "it waits for an invocation (aLoRA)" if checked.soft is None else "it stands before a prompt"
    raise AdapterError(
        what=f"{checked.path}: {kind}, which is not scored",
        why="questions are answered side by side here, each from its first token on with the same weights",
        fix="ask it through `edgelora generate` or `chat`, which run it",
    )


class ScoringEngine:
    """A base model open in llama.cpp. Not safe to call from several threads at once.

    `n_ctx` is the room of one question and its answer in tokens, `n_sequences` how many are answered side by side
    (0: none, for logits and speeds alone).
    """

    def __init__(self, base: Base, *, n_ctx: int = 2048, n_sequences: int = 0, threads: int | None = None) -> None:
        self.base = base
        self.model = Model(base.path)
        if n_ctx > self.model.n_ctx_train:
            self.model.close()
            raise EngineError(
                what=f"a context of {n_ctx} tokens",
                why=f"{base.path.name} was trained on {self.model.n_ctx_train} and answers noise beyond",
                fix=f"ask for at most {self.model.n_ctx_train}",
            )
        n_batch = max(n_ctx, min(2048, n_ctx * n_sequences))  # any one prompt fits
        # one sequence more: 0 keeps what is shared
        try:
            self._context = Context(
                self.model, n_ctx=n_ctx, n_sequences=n_sequences + 1, threads=threads or 1, n_batch=n_batch
            )
        except EngineError:
            self.model.close()
            raise
        self._loaded: dict[str, Lora] = {}
        self._invocations: dict[str, tuple[int, ...]] = {}
        self._active: dict[str, float] = {}
        self.threads = Choice(str(threads), "asked for") if threads else choose_threads(self._context)

    def __enter__(self) -> ScoringEngine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._context.close()
        self.model.close()
        self._loaded.clear()

    # -- adapters -------------------------------------------------------------------------------------------------

    @property
    def active(self) -> dict[str, float]:
        return dict(self._active)

    def load(self, name: str, path: Path, *, allow_unverified: bool = False) -> None:
        """Load the GGUF adapter at `path` as `name`, in place of an older one of that name.

        Checked and tried as the live engine does it (`preflight`). Raises AdapterError if it is damaged, or was trained
        on another base, or (unless allowed) does not say on which, and for what only that engine can run.
        """
        checked = preflight(path, self.base, allow_unverified=allow_unverified)
        _require_plain(checked)
        self._take(name, Lora(self.model, path, checked.content), checked.base)

    def load_own(self, name: str, path: Path) -> None:
        """The same with an adapter that this program has just written: checked, and not tried in another process.

        It may wait for an invocation (aLoRA), which `logits` sees and nothing else here.
        """
        shapes = {tensor: info.shape for tensor, info in self.base.file.tensors.items()}
        file = GGUFFile(path)
        invocation = require_fit(file, self.base.architecture.gguf_name, shapes, self.base.config.vocab_size)
        contract = contract_of(file)
        base = self.base.as_trained(contract)
        require_its_base(contract, base.identity, path, base.path, allow_unverified=True)
        self._take(name, Lora(self.model, path), base)
        self._invocations[name] = invocation

    def _take(self, name: str, fresh: Lora, base: Base) -> None:
        if name in self._loaded:
            self.unload(name)
        self._loaded[name] = fresh
        self._invocations[name] = ()
        self.base = base

    def unload(self, name: str) -> None:
        """Free the adapter `name`; if it is active, the others stay active."""
        lora = self._find(name)
        if name in self._active:
            self.use({k: v for k, v in self._active.items() if k != name})
        del self._loaded[name]
        lora.close()

    def use(self, adapters: Mapping[str, float]) -> None:
        """Answer with these adapters at these scales from now on ({} is the base; scale 0 is not attached)."""
        for name, scale in adapters.items():
            self._find(name)
            require_scale(scale, name)
        wanted = {name: scale for name, scale in adapters.items() if scale}
        self._attach(wanted)
        self._active = wanted

    def _attach(self, adapters: Mapping[str, float]) -> None:
        self._context.set_adapters([(self._loaded[name], scale) for name, scale in adapters.items()])

    def _find(self, name: str) -> Lora:
        if name not in self._loaded:
            raise unknown_adapter(name, self._loaded)
        return self._loaded[name]

    def speed(self) -> tuple[float, float]:
        """Prompt and generation tokens/s with the active adapters."""
        self._context.clear()
        return prompt_and_generation_speed(self._context, self.model.n_vocab)

    def rates(self) -> Rates:
        """Each repeat of the same, and how long the warm-up's first token took."""
        self._context.clear()
        return rates(self._context, self.model.n_vocab)

    # -- evaluation -----------------------------------------------------------------------------------------------

    def logits(self, sequences: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]]) -> np.ndarray:
        """float32 (all wanted, V): what follows the positions `wanted` of each sequence, evaluated cold and together.

        At most `n_sequences` + 1 sequences.
        """
        self._context.clear()
        entries = [
            Entry(token, i, number, i in chosen)
            for number, (ids, chosen) in enumerate(zip(sequences, map(set, wanted), strict=True))
            for i, token in enumerate(ids)
        ]
        rows, order = [], list[tuple[int, int]]()
        for active, own in self._phases(sequences, entries):
            self._attach(active)
            rows += [self._context.decode(part).copy() for part in self._cut(own)]
            order += [(entry.sequence, entry.position) for entry in own if entry.wanted]
        self._attach(self._active)
        self._context.clear()
        return np.concatenate(rows)[sorted(range(len(order)), key=order.__getitem__)]

    def _phases(
        self, sequences: Sequence[Sequence[int]], entries: Sequence[Entry]
    ) -> Iterator[tuple[dict[str, float], Sequence[Entry]]]:
        """What is evaluated under which adapters: first, under all others, what is before the invocation of an aLoRA.

        Those that wait must wait for the same.
        """
        waiting = {self._invocations[name] for name in self._active} - {()}
        if not waiting:
            yield self._active, entries
            return
        (invocation,) = waiting
        begins = [last_place(invocation, ids) for ids in sequences]
        asleep = [e for e in entries if (begin := begins[e.sequence]) is None or e.position < begin]
        yield {name: scale for name, scale in self._active.items() if not self._invocations[name]}, asleep
        yield self._active, [e for e in entries if (begin := begins[e.sequence]) is not None and e.position >= begin]

    def log_p(self, alternatives: Sequence[Alternative]) -> list[np.ndarray]:
        """Of each alternative the log-probabilities (nats) of its scored ids, side by side."""
        self._require_room(max(len(one.ids) for one in alternatives))
        self._context.clear()
        return log_p(self._context, alternatives)

    def _cut(self, entries: Sequence[Entry]) -> Iterator[Sequence[Entry]]:
        for first in range(0, len(entries), self._context.n_batch):
            yield entries[first : first + self._context.n_batch]

    # -- generation -----------------------------------------------------------------------------------------------

    def answer(self, questions: Sequence[Question], max_tokens: int, on_progress: OnProgress = silent) -> list[Answer]:
        """Answer each question greedily, and score its reference; up to `n_sequences` are in work at once.

        A prompt is evaluated once: after the answer its KV serves the reference. The tokens that all prompts begin
        with are evaluated once for all.
        """
        if not questions:
            return []
        self._require_room(max(len(q.prompt) + max(1, len(q.reference)) for q in questions))
        self._context.clear()
        shared = self._share_prefix([q.prompt for q in questions])
        done: dict[int, Answer] = {}
        pace = Pace(len(questions))
        waiting = list(enumerate(questions))[::-1]
        slots: dict[int, Slot] = {}
        while waiting or slots:
            for seq in range(1, self._context.n_sequences):
                if seq not in slots and waiting:
                    number, question = waiting.pop()
                    self._require_room(len(question.prompt) + max(max_tokens, len(question.reference)))
                    self._context.copy(0, seq)
                    slots[seq] = Slot(number, question, shared)
            # what does not fit into this decode waits for the next; the oldest go first, so none waits for ever
            room, now = self._context.n_batch, {}
            for seq, slot in slots.items():
                if len(slot.due) <= room:
                    now[seq] = slot
                    room -= len(slot.due)
            rows = iter(self._context.decode([entry for seq, slot in now.items() for entry in slot.entries(seq)]))
            for seq, slot in now.items():
                slot.advance([next(rows) for _ in range(slot.n_wanted)], max_tokens, self.model.ends_generation)
                if slot.rewind:
                    self._context.forget(seq, len(slot.question.prompt))
                if slot.finished:
                    self._context.forget(seq, 0)
                    done[slot.number] = Answer(slot.tokens, np.array(slot.nll))
                    del slots[seq]
                    speed, eta = pace.step(len(slot.tokens))
                    on_progress(Progress("score", pace.done, pace.total, tokens_per_s=speed, eta_s=eta))
        self._context.clear()
        return [done[i] for i in range(len(questions))]

    def _share_prefix(self, prompts: Sequence[Sequence[int]]) -> int:
        """Evaluate in sequence 0 what all prompts begin with (always leaving each a token of its own)."""
        shared = 0
        while all(len(p) > shared + 1 and p[shared] == prompts[0][shared] for p in prompts):
            shared += 1
        for part in self._cut([Entry(token, i, 0, False) for i, token in enumerate(prompts[0][:shared])]):
            self._context.decode(part)
        return shared

    def _require_room(self, tokens: int) -> None:
        if tokens > self._context.n_ctx:
            raise EngineError(
                what=f"a prompt that needs {tokens} tokens",
                why=f"this engine was opened with room for {self._context.n_ctx}",
                fix=f"open it with --context {tokens}, or shorten the conversation",
            )
