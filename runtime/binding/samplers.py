"""llama.cpp's samplers and grammars, and the row of logits that they work on."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from runtime.binding.handle import C, InC, last_words, refused

if TYPE_CHECKING:
    from runtime.binding.model import Model


class Candidates:
    """Room for one row of logits as samplers take it: they sort, cut and overwrite it. One serves all of a model."""

    def __init__(self, n_vocab: int) -> None:
        self._table = np.zeros(n_vocab, [("id", np.int32), ("logit", np.float32), ("p", np.float32)])
        assert self._table.itemsize == ctypes.sizeof(C.llama_token_data)
        self._data = self._table.ctypes.data_as(C.llama_token_data_p)
        self._ids = np.arange(n_vocab, dtype=np.int32)
        self.array = C.llama_token_data_array()

    def fill(self, row: np.ndarray, ids: np.ndarray | None = None) -> Candidates:
        """Hold the logits `row`, of every token or of `ids`."""
        table = self._table[: len(row)]
        table["id"] = self._ids if ids is None else ids
        table["logit"] = row
        self.array.data, self.array.size = self._data, len(row)
        self.array.selected, self.array.sorted = -1, False
        return self

    def forbid(self, tokens: Sequence[int]) -> None:
        """Leave no chance to `tokens`, before any sampler has sorted and while all tokens are there."""
        self._table["logit"][list(tokens)] = -np.inf

    def keep_possible(self) -> int:
        """Drop what has no chance left (-inf), before any sampler has sorted; returns how many stay."""
        table = self._table[: self.array.size]
        possible = table[np.isfinite(table["logit"])]
        self._table[: len(possible)] = possible
        self.array.size = len(possible)
        return len(possible)

    def possible(self) -> list[int]:
        """The tokens that have a chance, in the order they are held in."""
        table = self._table[: self.array.size]
        ids: list[int] = table["id"][np.isfinite(table["logit"])].tolist()
        return ids

    def likeliest(self) -> int:
        """The token of the largest logit."""
        table = self._table[: self.array.size]
        return int(table["id"][table["logit"].argmax()])


class _Sampler(InC):
    """What all of llama.cpp's samplers can do."""

    def accept(self, token: int) -> None:
        """Go on behind `token`; a grammar must allow it, or C would abort the process."""
        C.llama_sampler_accept(self.handle, token)

    def close(self) -> None:
        """Free the sampler, and in a chain all that it owns."""
        if self._handle is not None:
            C.llama_sampler_free(self._handle)
            self._handle = None


class SamplerChain(_Sampler):
    """llama.cpp's samplers in a row, the last of which picks a token. It holds what it needs of the past."""

    _kind, _fix = "sampler", "make a new one"

    def __init__(self, model: Model) -> None:
        last_words.clear()
        self._model = model
        params = C.llama_sampler_chain_default_params()
        params.no_perf = True
        self._handle = C.llama_sampler_chain_init(params)
        if not self._handle:
            raise refused("llama.cpp cannot make a chain of samplers", "close something: memory may be full")

    def add(self, name: str, *arguments: float) -> None:
        """Append `llama_sampler_init_<name>(*arguments)`. Nothing is checked in C: that is `sampling.py`."""
        self._append(name, getattr(C, f"llama_sampler_init_{name}")(*arguments))

    def add_bias(self, bias: Mapping[int, float]) -> None:
        """Add so much to the logits of these tokens."""
        entries = (C.llama_logit_bias * len(bias))(*[C.llama_logit_bias(*item) for item in bias.items()])
        self._append("logit_bias", C.llama_sampler_init_logit_bias(self._model.n_vocab, len(bias), entries))

    def add_dry(self, *arguments: float, breakers: Sequence[bytes]) -> None:
        """arguments: multiplier, base, allowed length, how many tokens back."""
        texts = (ctypes.c_char_p * len(breakers))(*breakers)
        sampler = C.llama_sampler_init_dry(self._model.vocabulary, *arguments, texts, len(breakers))
        self._append("dry", sampler)

    def _append(self, name: str, sampler: object) -> None:
        if not sampler:
            raise refused(f"llama.cpp cannot make the sampler {name}", "check its settings")
        C.llama_sampler_chain_add(self.handle, sampler)  # which owns it from now on

    def pick(self, candidates: Candidates) -> int:
        """One of the candidates; not taken note of until `accept`."""
        array = candidates.array
        C.llama_sampler_apply(self.handle, ctypes.byref(array))
        if not 0 <= array.selected < array.size:
            raise refused("llama.cpp picked no token", "check the settings of sampling")
        return int(array.data[array.selected].id)


class GrammarSampler(_Sampler):
    """llama.cpp's state of a grammar (GBNF, rule `root`). The text must have passed `grammar.py`: C dies of some."""

    _kind, _fix = "grammar", "make a new one"

    def __init__(self, model: Model, gbnf: str) -> None:
        last_words.clear()
        self._one = Candidates(1)
        self._handle = C.llama_sampler_init_grammar(model.vocabulary, gbnf.encode(), b"root")
        if not self._handle:
            raise refused("llama.cpp cannot read the grammar", "check it against llama.cpp's grammars/README.md")

    def restrict(self, candidates: Candidates) -> None:
        """Leave no chance (-inf) to tokens that the grammar does not allow next."""
        C.llama_sampler_apply(self.handle, ctypes.byref(candidates.array))

    def allows(self, token: int) -> bool:
        """Whether the text may go on with this token."""
        self._one.fill(np.zeros(1, np.float32), np.array([token], np.int32))
        self.restrict(self._one)
        return self._one.keep_possible() == 1
