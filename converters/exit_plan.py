"""Which door an adapter leaves by, from what it does and what its base is: no weight is read, and nothing is written.

THE TABLE of doors is DOORS, in the order in which they are taken: the first that is exact, else the first there is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from math import prod
from typing import Any, Literal, TypeAlias

from gguf.constants import GGMLQuantizationType

from converters.exit_facts import AdapterFacts, BaseFacts, Type
from converters.exit_words import (
    CONVERT,
    LAYERED,
    NEAREST,
    OF_Q8_0,
    UNTIE,
    UNTIED,
    beyond_a_pair,
    instead,
    no_weights,
    note_of_ranks,
    notes_of_patched,
    unloaded,
    why_patched,
)  # fmt: skip
from converters.pair_types import stored_as
from converters.scaled_rows import can_scale
from converters.stream import Entry
from edgelora.base import ggml
from edgelora.words import count

Door: TypeAlias = Literal["adapter", "patched", "soft prompt", "merged", "refused"]

# How far a number moves that is rounded to this type, at most, relative to its own size; of blocks it is their scale
# that is rounded, a float16, once more. Q8_0: relative to the largest of its 32 numbers.
ROUNDING = {Type.F32: 2.0**-24, Type.F16: 2.0**-11, Type.BF16: 2.0**-8, Type.Q8_0: 1 / 254}
OF_A_SCALE = 2.0**-11
ONE_MATRIX = (
    "the embedding of this base is its head too, and a LoRA of it would stop llama.cpp: "
    f"export over the untied base that `{UNTIE}` writes"
)


@dataclass(frozen=True)
class Way:
    """A door that is open."""

    door: Door
    exact: bool
    """Whether nothing is lost but the rounding of `expected_error`."""
    expected_error: float | None
    """The most that what is stored moves by rounding, relative to its size: a number, of scaled blocks their scale, of
    Q8_0 the largest of 32 numbers, and where it was measured a tensor (root mean square). None: only measuring tells.
    """
    size_bytes: int
    hot_swappable: bool
    """Whether it comes and goes over a loaded base."""
    why: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ExitPlan:
    """The door that is taken, and of every other one why not, or that it is open too. `refused`: none is open."""

    door: Door
    exact: bool
    expected_error: float | None
    size_bytes: int
    hot_swappable: bool
    why: str
    notes: tuple[str, ...]
    others: Mapping[Door, str]
    open: Mapping[Door, Way]
    """Every way there is, the taken one among them."""

    def as_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "open"}


def plan_exit(adapter: AdapterFacts, base: BaseFacts, dtype: str = "F16") -> ExitPlan:
    """The door for an adapter over a base. `dtype`: of a LoRA's tensors, F32, F16 or Q8_0."""
    found: dict[Door, Way | str] = {
        door: ask(adapter, base, GGMLQuantizationType[dtype]) for door, ask in DOORS.items()
    }
    ways = {door: way for door, way in found.items() if isinstance(way, Way)}
    taken = next((way for way in ways.values() if way.exact), next(iter(ways.values()), None))
    others = {
        door: way if isinstance(way, str) else f"open too: {way.why}"
        for door, way in found.items() if taken is None or door != taken.door
    }  # fmt: skip
    if taken is None:
        why = adapter.of_input or others["soft prompt" if adapter.prompt_numbers else "merged"]
        return ExitPlan("refused", False, None, 0, False, why, instead(adapter), others, ways)
    notes = (UNTIED, *taken.notes) if _could_be_untied(adapter, base) else taken.notes
    if not base.is_gguf and taken.hot_swappable:
        notes = (CONVERT, *notes)
    return ExitPlan(
        taken.door, taken.exact, taken.expected_error, taken.size_bytes, taken.hot_swappable, taken.why, notes,
        others, ways,
    )  # fmt: skip


# -- the doors: a way, or why there is none -----------------------------------------------------------------------


def as_adapter(adapter: AdapterFacts, base: BaseFacts, dtype: Type) -> Way | str:
    """A GGUF LoRA."""
    if other := no_weights(adapter):
        return other
    if more := beyond_a_pair(adapter):
        near = f"; {NEAREST}" if _has_a_nearest(adapter) else ""
        return f"llama.cpp adds B A x to W x and nothing else, and {adapter.one} {more}{near}"
    if adapter.on_embedding and base.tied:
        return ONE_MATRIX
    size = _pair_bytes({**adapter.pairs, **_one_hot(adapter, base)}, dtype)
    narrow = {kind for shape in adapter.pairs.values() for kind in _kinds(shape, dtype)}
    error = max((ROUNDING[kind] for kind in narrow), default=ROUNDING[dtype])
    why = "it is B A and nothing else, which llama.cpp adds over any quantization of this base"
    notes = [note_of_ranks(adapter.pairs)]
    if Type.Q8_0 in narrow:
        notes.append(OF_Q8_0)
    if dtype == Type.Q8_0 and narrow != {Type.Q8_0}:
        notes.append("rows of Q8_0 are multiples of 32 numbers: matrices of another rank or width stay F16")
    return Way("adapter", True, error, size, True, why, tuple(filter(None, notes)))


def as_patched(adapter: AdapterFacts, base: BaseFacts, dtype: Type) -> Way | str:
    """The base with the adapter in its own numbers, and a LoRA over it for what is B A."""
    if other := no_weights(adapter):
        return other
    if not beyond_a_pair(adapter):
        return "nothing of it would go into the base: B A is added over it"
    if adapter.whole:
        return f"{count(len(adapter.whole), 'weight')} changed as a whole would be quantized again, as a merge does"
    if not base.is_gguf:
        return "the base is a checkpoint, and what is patched are the blocks of a GGUF: `edgelora convert` writes one"
    if fault := unloaded(adapter, base):
        return fault
    if adapter.on_embedding and base.tied:
        return ONE_MATRIX
    becomes = _by_type(adapter, base) if adapter.becomes is None else adapter.becomes
    pairs = {**adapter.pairs, **_one_hot(adapter, base)}
    left = {name: shape for name, shape in pairs.items() if name not in adapter.whole}
    grown = sum(_bytes(base.shapes[n], kind) - _bytes(base.shapes[n], base.types[n]) for n, kind in becomes.items())
    roundings = (_rounding(kind, name in adapter.replaced) for name, kind in becomes.items())
    error = max(adapter.moved, *roundings, 0.0)
    narrow = {kind for shape in left.values() for kind in _kinds(shape, dtype)}
    error = max(error, *(ROUNDING[kind] for kind in narrow), 0.0)
    size = base.size_bytes + grown + _pair_bytes(left, dtype)
    why, notes = why_patched(adapter, base, becomes), notes_of_patched(adapter, base, becomes, left)
    if Type.Q8_0 in narrow | {becomes[name] for name in adapter.replaced & becomes.keys()}:
        notes = (*notes, OF_Q8_0)
    return Way("patched", True, error, size, False, why, notes)


def as_soft_prompt(adapter: AdapterFacts, base: BaseFacts, _: Type) -> Way | str:
    """What edgelora's engine puts before every prompt."""
    if not adapter.prompt_numbers:
        return LAYERED
    if adapter.prefix and base.windowed:
        return "llama.cpp keeps the keys and values of layers with a window in a way that a prefix cannot be put into"
    why = "it stands before every prompt, where edgelora's engine puts it; nothing of it is a weight"
    return Way("soft prompt", True, 0.0, 4 * adapter.prompt_numbers, True, why)


def as_merged(adapter: AdapterFacts, base: BaseFacts, _: Type) -> Way | str:
    """A model of its own."""
    if other := no_weights(adapter):
        return other
    if adapter.waits:
        return "it acts from its invocation on, and a weight is the same for every token"
    if fault := unloaded(adapter, base):
        return fault
    if base.floats:
        own = set(base.types.values()) or {Type.F16}
        why = "it becomes part of the weights, whose floats are rounded once"
        return Way("merged", True, max(ROUNDING[kind] for kind in own), base.size_bytes, False, why)
    why = "its weights are quantized again: what that costs, the certificate measures. Merge into the 16-bit original"
    return Way("merged", False, None, base.size_bytes, False, f"{why}, if you have it")


DOORS: dict[Door, Callable[[AdapterFacts, BaseFacts, Type], Way | str]] = {
    "adapter": as_adapter, "patched": as_patched, "soft prompt": as_soft_prompt, "merged": as_merged,
}  # fmt: skip


# -- what they ask ------------------------------------------------------------------------------------------------


def _could_be_untied(adapter: AdapterFacts, base: BaseFacts) -> bool:
    """Whether a head of its own is all that this GGUF lacks for rows of tokens to leave as an adapter."""
    return adapter.on_embedding and base.tied and base.is_gguf and not beyond_a_pair(adapter)


def _by_type(adapter: AdapterFacts, base: BaseFacts) -> dict[str, Type]:
    """As what a patched base stores the weights that change, as far as their types tell."""
    scaled = {name: base.types[name] if can_scale(base.types[name]) else Type.F16 for name in adapter.scaled}
    return scaled | {name: type_of_trained(base.types[name]) for name in adapter.replaced}


def _one_hot(adapter: AdapterFacts, base: BaseFacts) -> dict[str, tuple[int, int, int]]:
    """(V, d, k) of the pairs that make rows of tokens."""
    return {name: (base.shapes[name][0], base.shapes[name][1], k) for name, k in adapter.token_rows.items()}


def type_of_trained(kind: Type) -> Type:
    """As what a weight that was trained whole is stored in the place of one of this type: as that, where it loses less
    than what would be seen (a Q8_0 some 5e-3 of it, measured), else as F16."""
    return kind if kind in ggml.FLOATS or kind == Type.Q8_0 else Type.F16


def _rounding(kind: Type, replaced: bool) -> float:
    """How far a number moves at most in a weight of this type, whose rows are scaled or which is another."""
    return ROUNDING[kind] if replaced or kind in ggml.FLOATS else OF_A_SCALE


def _has_a_nearest(adapter: AdapterFacts) -> bool:
    """Whether a LoRA can come near it: what else it changes are weights."""
    return bool(adapter.scaled or adapter.whole) and not adapter.replaced and not adapter.biases and not adapter.norms


def _pair_bytes(pairs: Mapping[str, tuple[int, int, int]], dtype: Type) -> int:
    """Of the matrices in a file, without its header."""
    return sum(
        _bytes((r, d_in), stored_as(d_in, dtype)) + _bytes((d_out, r), stored_as(r, dtype))
        for d_out, d_in, r in pairs.values()
    )


def _kinds(shape: tuple[int, int, int], dtype: Type) -> tuple[Type, Type]:
    _, d_in, r = shape
    return stored_as(d_in, dtype), stored_as(r, dtype)


def _bytes(shape: tuple[int, ...], kind: Type) -> int:
    return Entry((prod(shape[:-1]), shape[-1]), kind).size_bytes
