"""LoRAs whose ranks and α may differ from layer to layer, as PEFT's adapter_config.json has them. Imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from edgelora.architectures.names import EMBEDDING, HEAD
from edgelora.errors import AdapterError, some
from edgelora.peft.adapter import IN_TORCH, INVOCATION, MAGNITUDE, Adapter
from edgelora.peft.change import Change
from edgelora.peft.kind import EMBEDDING_A, EMBEDDING_B
from edgelora.peft.targets import target_modules


@dataclass(frozen=True)
class StoredPair:
    """A LoRA of one matrix as a file has it: `a` (r, d_in) and `b` (d_out, r), which α/r has yet to scale.

    A DoRA has a `magnitude` (d_out,) too. Of an embedding d_out is V and d_in d.
    """

    a: np.ndarray
    b: np.ndarray
    alpha: float
    magnitude: np.ndarray | None = None

    @property
    def rank(self) -> int:
        return len(self.a)

    def tensors(self, *, of_embedding: bool = False) -> dict[str, np.ndarray]:
        """By PEFT's names; an embedding's are turned there: A (r, V), B (d, r)."""
        if of_embedding:
            return {EMBEDDING_A: self.b.T, EMBEDDING_B: self.a.T}
        lengths = {} if self.magnitude is None else {MAGNITUDE: self.magnitude}
        return {"lora_A": self.a, "lora_B": self.b, **lengths}


def adapter_of(
    pairs: Mapping[str, StoredPair],
    linears: Collection[str],
    base: str,
    *,
    rslora: bool = False,
    invocation: Sequence[int] = (),
) -> Adapter:
    """A LoRA or DoRA of these pairs, by full module name, over a base whose linear layers are `linears`.

    The commonest rank and α are `r` and `lora_alpha`; the others stand in `rank_pattern` and `alpha_pattern`, by the
    full name of their layer. `rslora`: α/√r is the scale; `invocation`: the tokens from which on it acts (aLoRA).
    Raises ValueError if there are no pairs.
    """
    ranks = {module: pair.rank for module, pair in pairs.items()}
    alphas = {module: pair.alpha for module, pair in pairs.items()}
    rank, alpha = _commonest(ranks), _commonest(alphas)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "use_rslora": rslora,
        "use_dora": any(pair.magnitude is not None for pair in pairs.values()),
        "target_modules": target_modules(pairs, linears),
        "bias": "none",
        "inference_mode": True,
        "rank_pattern": {module: r for module, r in ranks.items() if r != rank},
        "alpha_pattern": {module: a for module, a in alphas.items() if a != alpha},
    }
    if invocation:
        config[INVOCATION] = list(invocation)
    return Adapter(config, {module: pair.tensors(of_embedding=module == EMBEDDING) for module, pair in pairs.items()})


def as_lora(adapter: Adapter, linears: Collection[str], base: str) -> Adapter:
    """The same function as a plain LoRA of PEFT's, where it is one: every scale goes into B, and α is r.

    Raises AdapterError that names all that is no B A: norms, and layers whose rows, columns or biases change.
    """
    others = (*adapter.norms, *adapter.token_rows)
    faults, pairs = [f"{module} has another weight" for module in others], dict[str, StoredPair]()
    for module in (*adapter.linears, *adapter.vocabularies):
        change = adapter.change(module)
        if change.is_pair and change.pair is not None:
            pairs[module] = StoredPair(change.pair.a, change.pair.b, change.pair.rank)
        else:
            faults.append(f"{module} {_beyond_a_pair(change)}")
    if faults:
        raise AdapterError(
            what=f"this {adapter.kind.title} is no plain LoRA: {some(faults, 3)}",
            why="two small matrices cannot say it, and a part of it would be lost",
            fix=IN_TORCH if adapter.kind.of_input else _other_ways(adapter),
        )
    return replace(adapter_of(pairs, linears, base), contract=adapter.contract)


def _other_ways(adapter: Adapter) -> str:
    """Where else it can go; norms and biases have no singular values."""
    weights_alone = (
        not adapter.norms
        and not {EMBEDDING, HEAD} & set(adapter.tensors)
        and all(adapter.change(module).bias is None for module in adapter.linears)
    )
    nearest = ", or --svd-rank R writes the nearest LoRA of a rank" if weights_alone else ""
    return f"leave --as-lora out: `edgelora export` takes it by its own door{nearest}"


def _beyond_a_pair(change: Change) -> str:
    """What it does to a layer beside adding B A, in words."""
    lengths = change.pair is not None and change.pair.magnitude is not None
    found = {
        "multiplies rows": lengths or change.rows is not None, "multiplies columns": change.columns is not None,
        "changes the bias": change.bias is not None, "changes as a whole": change.whole is not None,
        "answers by more than a weight": change.of_input is not None,
    }  # fmt: skip
    return " and ".join(words for words, there in found.items() if there)


def _commonest(values: Mapping[str, Any]) -> Any:
    if not values:
        raise ValueError("an adapter without layers")
    return Counter(values.values()).most_common(1)[0][0]
