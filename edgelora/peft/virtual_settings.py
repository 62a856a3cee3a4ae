"""PEFT's settings of virtual tokens: how many there are, how they begin and what makes them. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

TOKENS = 20
Start = Literal["sample_vocab", "text", "random"]
Encoder = Literal["MLP", "LSTM"]


@dataclass(frozen=True)
class VirtualTokens:
    """By their names in PEFT.

    prompt_tuning_init: as tokens drawn from the vocabulary, as those of a text, or at random; None: as real tokens
    where the method can. encoder_hidden_size: None for the width of what is made.
    """

    num_virtual_tokens: int = TOKENS
    prompt_tuning_init: Start | None = None
    encoder_reparameterization_type: Encoder = "MLP"
    encoder_hidden_size: int | None = None
    prefix_projection: bool = False
