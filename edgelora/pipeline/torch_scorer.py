"""Answers and scores in torch, as `runtime/scorer.py` has them in llama.cpp: for what llama.cpp cannot run or read.

An adapter's folder over its base (a soft prompt's too), or a Hugging Face checkpoint. float32 on the CPU; nothing is
exported or rounded.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from edgelora.base.decoder import build_decoder
from edgelora.base.model import Base
from edgelora.device import choose_products, compute_threads
from edgelora.errors import ConfigError, EngineError
from edgelora.evaluate.protocols import Alternative, Answer, Question, Rates
from edgelora.nn.generate import Until, generate
from edgelora.peft.adapter import Adapter
from edgelora.peft.blend import blend
from edgelora.peft.inject import attach
from edgelora.peft.soft_prompt import TrainedPrompt, is_trained_prompt
from edgelora.peft.virtual_tokens import given
from edgelora.pipeline.export import read_checked, read_checked_prompt
from edgelora.progress import OnProgress, Pace, Progress, silent

TOGETHER = 8  # questions that are answered at once
PROMPT, GENERATE, REPEATS = 256, 8, 3  # of `rates`; the first two as far as the context goes


class TorchScorer:
    """A base in torch with adapters at their scales on it, behind virtual tokens. Keeps nothing between calls."""

    def __init__(
        self, base: Base, adapters: Sequence[tuple[Adapter, float]] = (), prompt: TrainedPrompt | None = None
    ) -> None:
        self.base, self.decoder = base, build_decoder(base)
        if [scale for _, scale in adapters] == [1.0]:
            attach(self.decoder, adapters[0][0])  # one whole adapter costs no second product with the weights
        else:
            blend(self.decoder, adapters)
        self.decoder.before = None if prompt is None else given(prompt)

    def answer(self, questions: Sequence[Question], max_tokens: int, on_progress: OnProgress = silent) -> list[Answer]:
        """Answer each question greedily, and score its reference."""
        ends = frozenset(self.base.tokenizer.eog_ids)
        pace, found = Pace(len(questions)), list[Answer]()
        for first in range(0, len(questions), TOGETHER):
            some = questions[first : first + TOGETHER]
            self._require_room(max(len(q.prompt) + max(max_tokens, len(q.reference)) for q in some))
            answers = generate(self.decoder, [q.prompt for q in some], Until(max_tokens, ends))
            scores = self.log_p([Alternative((*q.prompt, *q.reference), len(q.prompt)) for q in some])
            for tokens, log_p in zip(answers, scores, strict=True):
                found.append(Answer(tokens[:-1] if tokens and tokens[-1] in ends else tokens, -log_p))
                speed, eta = pace.step(len(tokens))
                on_progress(Progress("score", pace.done, pace.total, tokens_per_s=speed, eta_s=eta))
        return found

    @torch.no_grad()
    def log_p(self, alternatives: Sequence[Alternative]) -> list[np.ndarray]:
        """Of each alternative the log-probabilities (nats) of its scored ids."""
        self._require_room(max(len(one.ids) for one in alternatives))
        wanted = [range(one.first - 1, len(one.ids) - 1) for one in alternatives]
        labels = torch.tensor([token for one in alternatives for token in one.ids[one.first :]])
        hidden = self._hidden([one.ids for one in alternatives], wanted)
        log_p = -self.decoder.nll(hidden, labels).numpy().astype(np.float64)
        return np.split(log_p, list(itertools.accumulate(map(len, wanted)))[:-1])

    @torch.no_grad()
    def logits(self, sequences: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]]) -> np.ndarray:
        """float32 (all wanted, V): what follows the positions `wanted` of each sequence."""
        self._require_room(max(map(len, sequences)))
        return self.decoder.logits_of(self._hidden(sequences, wanted)).numpy()

    def _hidden(self, sequences: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]]) -> Tensor:
        """(all wanted, d): the final states at the positions `wanted` of each sequence."""
        borders = [0, *itertools.accumulate(map(len, sequences))]
        ids = torch.tensor([token for ids in sequences for token in ids])
        positions = torch.cat([torch.arange(len(ids)) for ids in sequences])
        rows = [border + i for border, chosen in zip(borders, wanted, strict=False) for i in sorted(set(chosen))]
        hidden: Tensor = self.decoder(ids, positions, borders)[rows]
        return hidden

    def rates(self) -> Rates:
        """Tokens/s of REPEATS prompts, and of as many answers, after a warm-up; the ids are random."""
        length = min(PROMPT, self.base.context - GENERATE - self.decoder.n_before)
        prompt = np.random.default_rng(0).integers(self.base.config.vocab_size, size=length).tolist()
        read = [length / _seconds(lambda: self.logits([prompt], [[length - 1]])) for _ in range(REPEATS + 1)]
        written = [
            GENERATE / _seconds(lambda: generate(self.decoder, [prompt[:1]], Until(GENERATE)))
            for _ in range(REPEATS + 1)
        ]
        return Rates(tuple(read[1:]), tuple(written[1:]), length / read[0])

    def _require_room(self, tokens: int) -> None:
        tokens += self.decoder.n_before
        if tokens > self.base.context:
            raise EngineError(
                what=f"a prompt that needs {tokens} tokens",
                why=f"{self.base.path.name} sees {self.base.context} at most, prompt and answer together",
                fix="shorten the conversation",
            )


def open_scorer(
    base: Base, adapter: tuple[Path, float] | None, threads: int | None = None, *, allow_unverified: bool = False
) -> TorchScorer:
    """A base and the adapter folder over it, in a process that does nothing else: torch's settings stay changed.

    Raises AdapterError as `export` does: it is held to its contract with the base; ConfigError for a part of a prompt.
    """
    torch.set_float32_matmul_precision(choose_products().value)
    torch.set_num_threads(threads or compute_threads())
    if adapter is None:
        return TorchScorer(base, [])
    folder, scale = adapter
    if is_trained_prompt(folder):
        return TorchScorer(base, prompt=_prompt(base, folder, scale, allow_unverified=allow_unverified))
    read = read_checked(folder, base, allow_unverified=allow_unverified, may_wait=True, with_rows=True)
    return TorchScorer(base, [(read, scale)])


def _prompt(base: Base, folder: Path, scale: float, *, allow_unverified: bool) -> TrainedPrompt:
    if scale != 1.0:
        raise ConfigError(
            what=f"{folder}:{scale:g}: what stands before a prompt has no scale",
            why="its tokens are there or they are not",
            fix="leave the scale out",
        )
    return read_checked_prompt(folder, base, allow_unverified=allow_unverified)


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
