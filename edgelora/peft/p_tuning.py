"""P-tuning (arXiv:2103.10385): embeddings H (n, d) of n virtual tokens, made by an encoder that is trained with them.

MLP: E = relu(relu(H W₁ᵀ + b₁) W₂ᵀ + b₂) W₃ᵀ + b₃, of h hidden units. LSTM, the paper's: E = relu(L W₁ᵀ + b₁) W₂ᵀ + b₂
of L (n, 2h), two layers of a bidirectional LSTM over H. Both are PEFT's. What is saved is E: the encoder runs no more.
"""

from __future__ import annotations

from torch import nn

from edgelora.architectures.config import ModelConfig
from edgelora.nn.virtual import Before, Virtual
from edgelora.peft.defaults import ENCODED, TRIED, Defaults, Sourced, by_size
from edgelora.peft.virtual_settings import VirtualTokens

LAYERS = 2
DEFAULTS = Defaults(rate=by_size(Sourced(1e-2, f"{TRIED}3e-4 to 1e-2"), ENCODED))


class PromptEncoder(Before):
    """`embedding` (n, d), and the encoder's layers by PEFT's names."""

    def __init__(self, config: ModelConfig, settings: VirtualTokens) -> None:
        super().__init__()
        d, self.length = config.hidden_size, settings.num_virtual_tokens
        h = settings.encoder_hidden_size or d
        self.embedding = nn.Embedding(self.length, d)
        self.lstm_head: nn.LSTM | None = None
        if settings.encoder_reparameterization_type == "LSTM":
            self.lstm_head = nn.LSTM(d, h, LAYERS, bidirectional=True, batch_first=True)
            self.mlp_head = nn.Sequential(nn.Linear(2 * h, 2 * h), nn.ReLU(), nn.Linear(2 * h, d))
        else:
            self.mlp_head = nn.Sequential(
                nn.Linear(d, h), nn.ReLU(), nn.Linear(h, h), nn.ReLU(), nn.Linear(h, d)
            )  # fmt: skip

    def forward(self) -> Virtual:
        x = self.embedding.weight
        if self.lstm_head is not None:
            x, _ = self.lstm_head(x)
        return Virtual(self.length, self.mlp_head(x))
