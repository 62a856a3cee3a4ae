"""A prefix: keys and values that nobody computed here, as a state of a sequence that llama.cpp takes.

Its layout is nowhere promised and depends on the context. So a state of as many tokens is saved from a context of the
same settings, read strictly, and its numbers replaced; anything unknown in it is an error. What comes out is put to the
test before use: prompts behind it must be followed by what torch computed.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from gguf.constants import GGMLQuantizationType

from edgelora.errors import AdapterError, EngineError
from edgelora.evaluate.fidelity import fidelity
from edgelora.files.soft_prompt import Prefix, Reference, SoftPrompt
from runtime.binding import Context, Entry
from runtime.soft_prompt import Embedded, Head

MAGIC = 0xAF143CD8
# What is allowed: a multiple of what this quantization of the base does to the bare prompts, and a share of what the
# prefix does to them, which amplifies that noise. SmolLM2-135M, random prefix: over F16 3e-5 of it, over Q4_1 1.3 %;
# keys in the wrong order, places or layers 20 to 120 %.
NOISE_RATIO, NOISE_FLOOR, EFFECT_SHARE = 3.0, 2e-3, 0.05
FLOATS = {GGMLQuantizationType.F32: "<f4", GGMLQuantizationType.F16: "<f2"}


class Past:
    """A prefix as a state of a context with these very settings."""

    def __init__(self, length: int, state: np.ndarray) -> None:
        self.length, self._state = length, state

    def put(self, context: Context, sequence: int, first: int, last: int) -> None:  # noqa: ARG002
        context.forget(sequence, 0)
        context.restore(sequence, self._state)
        if last < self.length:
            context.forget(sequence, last)


def prepare(content: SoftPrompt | Prefix, context: Context, name: str) -> Head:
    """Make of a checked file what can be put before prompts, in a context that nobody else uses; and try it.

    The context has the settings of those it is for. Raises AdapterError if the model's answers behind it are no
    numbers, or not those that they must be; EngineError where llama.cpp keeps keys and values in a way unknown here.
    """
    head: Head = Embedded(content.embeddings) if isinstance(content, SoftPrompt) else _past(content, context)
    if isinstance(content, Prefix):
        _require_reference(content.reference, head, context, name)
    elif not np.isfinite(logits_behind(head, context, [0], [0])).all():
        raise AdapterError(
            what=f"{name}: the model's answers behind it are not finite numbers",
            why="its numbers are finite, and too large to compute with",
            fix="train it with a smaller learning rate",
        )
    context.clear()
    return head


def logits_behind(head: Head | None, context: Context, tokens: Sequence[int], wanted: Collection[int]) -> np.ndarray:
    """float32 (n wanted, V), a copy: what follows these places of `tokens`, with `head` before them or nothing.

    In sequence 0; whatever the context held is forgotten.
    """
    context.clear()
    first = 0
    if head is not None:
        head.put(context, 0, 0, head.length)
        first = head.length
    entries = [Entry(token, first + i, 0, i in wanted) for i, token in enumerate(tokens)]
    parts = range(0, len(entries), context.n_batch)
    return np.concatenate([context.decode(entries[i : i + context.n_batch]).copy() for i in parts])


def _require_reference(reference: Reference, head: Head, context: Context, name: str) -> None:
    """Raise AdapterError unless what follows the reference prompts behind `head` is what torch computed."""
    last = [reference.tokens.shape[1] - 1]

    def distance(before: Head | None, expected: np.ndarray) -> float:
        rows = (logits_behind(before, context, tokens, last) for tokens in reference.tokens.tolist())
        return fidelity((row[None], found) for row, found in zip(expected, rows, strict=True)).kl_mean

    effect = fidelity([(reference.logits, reference.base_logits)]).kl_mean
    limit, found = max(NOISE_FLOOR, EFFECT_SHARE * effect), distance(head, reference.logits)
    if not found <= limit:  # or is it this quantization of the base? That costs the prompts a second time
        limit = max(limit, NOISE_RATIO * distance(None, reference.base_logits))
    if not found <= limit:
        raise AdapterError(
            what=f"{name}: the prefix does not do here what it was trained to do (mean KL {found:.2g}, at most "
            f"{limit:.2g})",
            why="llama.cpp keeps keys and values in another way than the one known, or the file was damaged",
            fix="export it again for this base; if that does not help, report it with the output of `edgelora doctor`",
        )


# -- llama.cpp's state of a sequence ----------------------------------------------------------------------------------


def _past(prefix: Prefix, context: Context) -> Past:
    """The state of a sequence of as many tokens, with the prefix's keys and values in it."""
    n = prefix.length
    context.clear()
    for first in range(0, n, context.n_batch):
        last = min(first + context.n_batch, n)
        context.decode([Entry(0, position, 0, False) for position in range(first, last)])
    state = context.save(0)
    for part in _Reader(state).parts(prefix):
        with np.errstate(over="ignore"):
            numbers = part.numbers.astype(part.dtype)
        if not np.isfinite(numbers).all():
            raise AdapterError(
                what="a prefix with numbers too large for the cache of keys and values",
                why=f"the largest is {np.abs(part.numbers).max():.3g}, and they are kept as float16",
                fix="open the base with keys and values in float32",
            )
        raw = np.ascontiguousarray(numbers).view(np.uint8).reshape(-1)
        state[part.at : part.at + len(raw)] = raw
    return Past(n, state)


@dataclass(frozen=True)
class _Part:
    """Where numbers of a layer begin in a state, and what belongs there."""

    at: int
    dtype: str
    numbers: np.ndarray


class _Reader:
    """Goes through a state field by field: magic, sequence, streams; of each its cells, then keys, then values."""

    def __init__(self, state: np.ndarray) -> None:
        self._state, self._at = state, 0

    def parts(self, prefix: Prefix) -> list[_Part]:
        """Where each layer's keys and values go. Raises EngineError if the state is not as it is known."""
        n, rows = prefix.length, [x.reshape(*x.shape[:2], -1) for x in (prefix.keys, prefix.values)]
        self._expect("<I", MAGIC)
        self._take("<i")  # its sequence
        counts, found = self._take("<I"), list[_Part]()
        for _ in range(counts):
            if (cells := self._take("<I")) == 0:
                continue  # a sequence that is not this one
            if cells != n or found:
                raise self._unknown()
            found = self._stream(n, *rows)
        if self._at != len(self._state) or not found:
            raise self._unknown()
        return found

    def _stream(self, n: int, keys: np.ndarray, values: np.ndarray) -> list[_Part]:
        """keys and values (layers, n, KV · d_head)."""
        for position in range(n):
            self._expect("<i", position)
            self._expect("<I", 1)  # one sequence has it
            self._take("<i")
        transposed = self._take("<I")
        self._expect("<I", len(keys))
        found = [self._layer(layer, "<Q") for layer in keys]
        if not transposed:
            return found + [self._layer(layer, "<Q") for layer in values]
        return found + [self._layer(layer.T, "<I", transposed=True) for layer in values]

    def _layer(self, numbers: np.ndarray, size: str, *, transposed: bool = False) -> _Part:
        kind = self._take("<i")
        if kind not in FLOATS:
            raise EngineError(
                what="a prefix over quantized keys and values",
                why="llama.cpp rotates what it quantizes, and a prefix is put there as it is",
                fix="open the base with keys and values in f16 or f32",
            )
        dtype = np.dtype(FLOATS[GGMLQuantizationType(kind)])
        # rows of positions and their bytes; or rows of channels, the bytes of one number and how many rows there are
        self._expect(size, dtype.itemsize * (1 if transposed else numbers.shape[1]))
        if transposed:
            self._expect("<I", len(numbers))
        at, self._at = self._at, self._at + numbers.size * dtype.itemsize
        return _Part(at, dtype.str, numbers)

    def _take(self, form: str) -> int:
        end = self._at + struct.calcsize(form)
        if end > len(self._state):
            raise self._unknown()
        (value,) = struct.unpack(form, self._state[self._at : end].tobytes())
        self._at = end
        return int(value)

    def _expect(self, form: str, value: int) -> None:
        if self._take(form) != value:
            raise self._unknown()

    def _unknown(self) -> EngineError:
        return EngineError(
            what="a prefix cannot be put before prompts of this base",
            why=f"llama.cpp keeps its keys and values in a way that is not known here (byte {self._at} of a state)",
            fix="use the llama-cpp-python that edgelora pins, and a base without a sliding window",
        )
