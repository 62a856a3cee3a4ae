"""How adapters of one kind lie in a file, and what they make of a layer: a row of KINDS. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from edgelora.architectures.names import EMBEDDING
from edgelora.peft.change import Change

Parts: TypeAlias = Mapping[str, np.ndarray]
Settings: TypeAlias = Mapping[str, Any]
Make: TypeAlias = Callable[[Parts, Settings, str], Change]

PREFIX = "base_model.model."
NORM, BIAS = "weight", "bias"
WHOLE = NORM  # of a layer that PEFT saves whole
ROWS = "trainable_tokens_delta"
EMBEDDING_A, EMBEDDING_B = "lora_embedding_A", "lora_embedding_B"  # (r, V) and (d, r)


@dataclass(frozen=True)
class Kind:
    """How adapters of one kind lie in a file, and what they make of a linear layer."""

    title: str
    parts: Mapping[str, str]
    """The tensors of an adapted linear layer, with their shapes in words: `r in`, `out r`, `out`, or `out 1|1 in` for
    one or the other. `out` and `in` are the weight's; any other letter is one number for all parts of a layer."""
    change: Make
    """change(parts, settings, module), the parts in float32."""
    optional: Mapping[str, str] = field(default_factory=dict)
    """Parts that a layer may have besides."""
    of_embedding: Mapping[str, str] = field(default_factory=dict)
    """The tensors of an adapted embedding, where these are not a linear layer's: its `out` is V and its `in` d."""
    norms: bool = False
    """Whether norms may have new weights (d,), as the part `weight`: HF's values, before a family's shift."""
    rows: bool = False
    """Whether tokens may have new rows (k, d) in the embedding and the head, those that `row_ids` gives."""
    vocabularies: bool = False
    """Whether the embedding and the head may be changed as linear layers are."""
    saves: bool = False
    """Whether layers may be there whole (PEFT's `modules_to_save`), in the place of the parts, and biases (`bias`)."""
    adds_bias: bool = False
    """Whether a layer may get a bias that it had not."""
    endings: Mapping[str, str] = field(default_factory=dict)
    """What a part is called in the file, where that is not its own name."""
    faults: Callable[[Settings], list[str]] = lambda _: []
    """What is wrong with its adapter_config.json."""
    of_input: str = ""
    """Why no weight can hold it; empty where one can."""

    @property
    def shapes(self) -> Mapping[str, str]:
        """Of all parts that a layer or the embedding may have."""
        return {**self.parts, **self.optional, **self.of_embedding}

    @property
    def one(self) -> str:
        """`a DoRA`, `an IA3`."""
        return f"{'an' if self.title[0] in 'AEI' else 'a'} {self.title}"

    def name(self, module: str, part: str, among: Collection[str] = ()) -> str:
        """What the file calls a tensor, one `among` the parts of its module."""
        if part == BIAS and self.saves and not set(self.parts) & set(among):
            return f"{PREFIX}{module}.{part}"  # of a layer that PEFT has not wrapped
        return f"{PREFIX}{module}.{self.endings.get(part, part)}"

    def place(self, name: str) -> tuple[str, str] | None:
        """The module and the part that a tensor of the file is; None: no part of this kind."""
        inside = name.removeprefix(PREFIX)
        for part in (*self.shapes, *([NORM] if self.norms else []), *([ROWS] if self.rows else [])):
            for ending in (self.endings.get(part, part), part, f"{part}.weight"):
                if name.startswith(PREFIX) and inside.endswith(f".{ending}"):
                    return inside.removesuffix(f".{ending}"), part
        return None

    def sizes(self, part: str, shape: tuple[int, ...]) -> dict[str, int]:
        """What a tensor tells of the numbers in its shape's words: `out`, `in`, `r` …; nothing if it has another."""
        for words in self.shapes[part].split("|"):
            if _fits(shape, expected := shape_of(words, {})):
                return {word: n for word, n in zip(expected, shape, strict=True) if isinstance(word, str)}
        return {}

    def shape_faults(self, parts: Parts, d_out: int, d_in: int) -> Iterator[str]:
        """What is wrong with the shapes of a linear layer's parts."""
        sizes = {"out": d_out, "in": d_in}
        for part, words in self.shapes.items():
            if part not in parts:
                continue
            shape, expected = parts[part].shape, [shape_of(one, sizes) for one in words.split("|")]
            fitting = next((one for one in expected if _fits(shape, one)), None)
            if fitting is None:
                yield f"{part} is {shape}, expected {' or '.join(map(_shown, expected))}"
            else:
                sizes |= {letter: n for letter, n in zip(fitting, shape, strict=True) if isinstance(letter, str)}


def row_ids(settings: Settings, module: str) -> list[int] | None:
    """The tokens that have new rows in the embedding or the head; None: none. PEFT's names: `token_indices` of rows
    alone; beside a LoRA `trainable_token_indices`, a list for the embedding, or a table by the ends of names."""
    given = settings.get("token_indices", settings.get("trainable_token_indices"))
    if isinstance(given, Mapping):
        return next((ids for end, ids in given.items() if f".{module}".endswith(f".{end}")), None)
    return given if module == EMBEDDING or "token_indices" in settings else None


def shape_of(words: str, sizes: Mapping[str, int]) -> tuple[int | str, ...]:
    """`out r` → (256, "r"), or (256, 8) where `sizes` knows r."""
    return tuple(int(word) if word.isdigit() else sizes.get(word, word) for word in words.split())


def _fits(shape: tuple[int, ...], expected: tuple[int | str, ...]) -> bool:
    return len(shape) == len(expected) and all(
        n > 0 and (isinstance(wanted, str) or n == wanted) for n, wanted in zip(shape, expected, strict=True)
    )


def _shown(shape: tuple[int | str, ...]) -> str:
    return f"({', '.join(map(str, shape))}{',' * (len(shape) == 1)})"
