"""Generation in torch: several prompts at once, a token of each at a time, over cached keys and values.

For looking at a model while it trains; answers for use come from llama.cpp (`runtime/`).
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from edgelora.nn.awake import last_place
from edgelora.nn.cache import KeyValues
from edgelora.nn.decoder import Decoder
from edgelora.nn.layer import Attention
from edgelora.nn.rotary import inverse_frequencies


@dataclass(frozen=True)
class Until:
    """Where an answer ends: behind one of the ids `stop`, or when it, or the whole sequence, has no more room."""

    max_tokens: int
    stop: Collection[int] = ()
    max_length: int | None = None


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn: the likeliest one at temperature 0, else one of the likeliest that together have
    the probability `top_p` (nucleus sampling, arXiv:1904.09751)."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


GREEDY = Sampling()


@torch.no_grad()
def generate(
    decoder: Decoder, prompts: Sequence[Sequence[int]], until: Until, sampling: Sampling = GREEDY
) -> list[list[int]]:
    """The ids that follow each prompt (at least one id long), the one that stopped it included.

    Whatever adapter is on the decoder speaks. A prompt's answer does not depend on the others, and torch's own random
    numbers are left alone, so a training goes on as if nobody had looked.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    draws = [torch.Generator().manual_seed(sampling.seed) for _ in prompts]

    def goes_on(i: int) -> bool:
        answer, length = answers[i], decoder.n_before + len(prompts[i]) + len(answers[i])
        room = len(answer) < until.max_tokens and (until.max_length is None or length < until.max_length)
        return room and not (answer and answer[-1] in until.stop)

    going = [i for i in range(len(prompts)) if goes_on(i)]
    with growing(decoder, [prompts[i] for i in going]) as sequences:
        while going:
            rows = sequences.next_logits().cpu()
            for i, row in zip(going, rows, strict=True):
                answers[i].append(_drawn(row, sampling, draws[i]))
            kept = [place for place, i in enumerate(going) if goes_on(i)]
            going = [going[place] for place in kept]
            sequences.grow(kept, [answers[i][-1] for i in going])
    return answers


def _drawn(logits: Tensor, sampling: Sampling, draw: torch.Generator) -> int:
    """An id, by logits (V,)."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    p, order = (logits / sampling.temperature).softmax(-1).sort(descending=True, stable=True)
    nucleus = p.cumsum(-1) - p < sampling.top_p  # the likeliest one is always in it
    return int(order[torch.multinomial(p * nucleus, 1, generator=draw)])


@contextmanager
def growing(decoder: Decoder, sequences: Sequence[Sequence[int]]) -> Iterator[Growing]:
    """The sequences inside the decoder. Until the block ends it computes nothing else."""
    layers = [module for module in decoder.modules() if isinstance(module, Attention)]
    try:
        yield Growing(decoder, layers, sequences)
    finally:
        for layer in layers:
            layer.cache = None
        if decoder.awake is not None:
            decoder.awake.begins = None


class Growing:
    """Sequences of ids of which the decoder has seen all but the newest."""

    def __init__(self, decoder: Decoder, layers: list[Attention], sequences: Sequence[Sequence[int]]) -> None:
        self._decoder, self._layers = decoder, layers
        self._sequences = [list(ids) for ids in sequences]
        self._seen: list[int] = []
        if decoder.awake is not None:
            places = [last_place(decoder.awake.invocation, np.array(ids)) for ids in self._sequences]
            decoder.awake.begins = places
        self._forget()

    def next_logits(self) -> Tensor:
        """float32 (n, V): what follows each sequence."""
        if any(self._turns(seen, len(ids)) for seen, ids in zip(self._seen, self._sequences, strict=True)):
            self._forget()
        new = [ids[seen:] for seen, ids in zip(self._seen, self._sequences, strict=True)]
        positions = [range(seen, len(ids)) for seen, ids in zip(self._seen, self._sequences, strict=True)]
        borders = [0, *itertools.accumulate(len(part) for part in new)]
        device = self._decoder.model.norm.weight.device
        row, at = (torch.tensor([i for part in parts for i in part], device=device) for parts in (new, positions))
        hidden = self._decoder(row, at, borders)
        self._seen = [len(ids) for ids in self._sequences]
        return self._decoder.logits_of(hidden[[border - 1 for border in borders[1:]]])

    def grow(self, places: list[int], tokens: Sequence[int]) -> None:
        """Go on with the sequences at these places, each with one more token; the others have ended."""
        self._sequences = [[*self._sequences[i], token] for i, token in zip(places, tokens, strict=True)]
        self._seen = [self._seen[i] for i in places]
        if (awake := self._decoder.awake) is not None and awake.begins is not None:
            awake.begins = [awake.begins[i] for i in places]
        for layer in self._layers:
            if layer.cache is not None:
                layer.cache.keep(places)

    def _turns(self, seen: int, length: int) -> bool:
        """Whether a sequence of this length rotates by other angles than those of the keys that were kept: dynamic
        scaling turns with every token beyond the original context, LongRoPE once."""
        ropes, n = (self._decoder.config.rope, self._decoder.config.rope_local), self._decoder.n_before
        by_length = [rope for rope in ropes if rope is not None and rope.scaling in ("dynamic", "longrope")]
        return not all(
            torch.equal(inverse_frequencies(rope, n + seen), inverse_frequencies(rope, n + length))
            for rope in by_length
        )

    def _forget(self) -> None:
        self._seen = [0] * len(self._sequences)
        for layer in self._layers:
            layer.cache = KeyValues()
