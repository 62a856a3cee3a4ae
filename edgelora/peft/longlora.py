"""LongLoRA (arXiv:2309.12307): a LoRA, the norms and the embedding, trained while attention is cut into shifted groups.

y = x Wᵀ + α/r (x Aᵀ) Bᵀ for each linear layer, w (d,) for each norm, E (V, d) for the embedding (section 3.3), which is
the head too where a base has one matrix for both; attention in groups is `nn/shifted.py`'s, while something is learned
and only then: what comes out attends to everything. The file is that of PEFT's LoRA with norms and embedding in
modules_to_save.
"""

from __future__ import annotations

from edgelora.nn.decoder import Decoder
from edgelora.nn.layer import Attention
from edgelora.peft.lora import fresh

__all__ = ["attend_in_groups", "fresh"]

SHARE = 4  # the authors' groups are a quarter of the context


def attend_in_groups(decoder: Decoder, size: int | None) -> None:
    """Let tokens attend to their groups of this size alone from now on; None: to all before them."""
    decoder.group = size
    for module in decoder.modules():
        if isinstance(module, Attention):
            module.group = size
