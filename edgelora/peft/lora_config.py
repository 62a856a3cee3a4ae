"""What PEFT's adapter_config.json says of LoRAs whose ranks and α may differ from layer to layer. Imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgelora.peft.adapter import MAGNITUDE, Adapter
from edgelora.peft.targets import target_modules


@dataclass(frozen=True)
class StoredPair:
    """A LoRA of one linear layer as a file has it: `a` (r, d_in) and `b` (d_out, r), which α/r has yet to scale.

    A DoRA has a `magnitude` (d_out,) too.
    """

    a: np.ndarray
    b: np.ndarray
    alpha: float
    magnitude: np.ndarray | None = None

    @property
    def rank(self) -> int:
        return len(self.a)

    def tensors(self) -> dict[str, np.ndarray]:
        """By PEFT's names."""
        lengths = {} if self.magnitude is None else {MAGNITUDE: self.magnitude}
        return {"lora_A": self.a, "lora_B": self.b, **lengths}


def adapter_of(
    pairs: Mapping[str, StoredPair], linears: Collection[str], base: str, *, rslora: bool = False
) -> Adapter:
    """A LoRA or DoRA of these pairs, by full module name, over a base whose linear layers are `linears`.

    The commonest rank and α are `r` and `lora_alpha`; the others stand in `rank_pattern` and `alpha_pattern`, by the
    full name of their layer. `rslora`: α/√r is the scale. Raises ValueError if there are no pairs.
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
    return Adapter(config, {module: pair.tensors() for module, pair in pairs.items()})


def _commonest(values: Mapping[str, Any]) -> Any:
    if not values:
        raise ValueError("an adapter without layers")
    return Counter(values.values()).most_common(1)[0][0]
