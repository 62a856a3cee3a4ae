"""Prompt tuning (arXiv:2104.08691): the embeddings E (n, d) of n virtual tokens, and nothing else, are trained.

They begin as the embeddings of real tokens. In PEFT's comparison on Llama-3.2-3B (MetaMathQA, method_comparison) that
answers 39 % of GSM8K, and a random start 25 %.
"""

from __future__ import annotations

import torch
from torch import nn

from edgelora.architectures.config import ModelConfig
from edgelora.nn.virtual import Before, Virtual
from edgelora.peft.defaults import COMPARED, GUIDE, Defaults, Sourced, by_size
from edgelora.peft.virtual_settings import VirtualTokens

DEFAULTS = Defaults(rate=by_size(GUIDE, Sourced(1e-3, f"{COMPARED}begun as tokens of the vocabulary")))


class PromptEmbedding(Before):
    """`embedding` (n, d)."""

    def __init__(self, config: ModelConfig, settings: VirtualTokens) -> None:
        super().__init__()
        self.length = settings.num_virtual_tokens
        self.embedding = nn.Embedding(self.length, config.hidden_size)

    def forward(self) -> Virtual:
        return Virtual(self.length, self.embedding.weight)

    @torch.no_grad()
    def begin(self, real: Virtual) -> None:
        assert real.embeddings is not None
        self.embedding.weight.copy_(real.embeddings)
