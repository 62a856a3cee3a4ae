"""Prefix tuning (arXiv:2101.00190): n keys and values before every sequence, of every layer and head.

P (n, layers · 2 · KV · d_head) is trained itself, or as tanh(H W₁ᵀ + b₁) W₂ᵀ + b₂ of H (n, KV · d_head) with h hidden
units (`prefix_projection`). Its keys are not rotated, as PEFT's `past_key_values` are not. P itself begins as keys and
values of real tokens, which the paper found better than a random start (section 7.4).
"""

from __future__ import annotations

import torch
from torch import nn

from edgelora.architectures.config import ModelConfig
from edgelora.nn.virtual import Before, Virtual
from edgelora.peft.defaults import COMPARED, ENCODED, GUIDE, TRIED, Defaults, Sourced, by_size
from edgelora.peft.virtual_settings import VirtualTokens

DEFAULTS = Defaults(
    rate=by_size(GUIDE, Sourced(5e-3, f"{COMPARED}begun as keys and values of a text")),
    rate_of_projection=by_size(Sourced(3e-3, f"{TRIED}5e-4 and 3e-3"), ENCODED),
)


class PrefixEncoder(Before):
    """`embedding`, and the layers of `transform` behind it where there is a projection."""

    def __init__(self, config: ModelConfig, settings: VirtualTokens) -> None:
        super().__init__()
        self.length = settings.num_virtual_tokens
        self.shape = (config.num_hidden_layers, 2, config.num_key_value_heads, config.head_dim)
        made, d = 2 * config.num_hidden_layers, config.num_key_value_heads * config.head_dim
        self.transform: nn.Sequential | None = None
        if settings.prefix_projection:
            h = settings.encoder_hidden_size or d
            self.transform = nn.Sequential(nn.Linear(d, h), nn.Tanh(), nn.Linear(h, made * d))
        self.embedding = nn.Embedding(self.length, d if settings.prefix_projection else made * d)

    def forward(self) -> Virtual:
        flat = self.embedding.weight
        if self.transform is not None:
            flat = self.transform(flat)
        # of a position its layers one after the other, of a layer its key and its value
        layers = flat.view(self.length, *self.shape).unbind(1)  # of each (n, 2, KV, d_head)
        return Virtual(self.length, past=[(layer[:, 0], layer[:, 1]) for layer in layers])

    @torch.no_grad()
    def begin(self, real: Virtual) -> None:
        self.embedding.weight.copy_(flattened(real))


def flattened(virtual: Virtual) -> torch.Tensor:
    """(n, layers · 2 · KV · d_head) of their keys and values, as PEFT saves them."""
    return torch.stack([part for layer in virtual.past for part in layer], 1).flatten(1)
