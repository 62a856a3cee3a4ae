"""The tokens that most comparisons are made on, and the loss of a decoder on them."""

from __future__ import annotations

import torch
from torch import Tensor

from edgelora.nn.decoder import Decoder

IDS = torch.randint(3, 512, (24,), generator=torch.Generator().manual_seed(5))  # (T,)
NEARLY_TIED = 1e-2  # nats: the two likeliest tokens change places at a mean KL of a millionth where they are this close


def loss_of(decoder: Decoder, ids: Tensor = IDS) -> Tensor:
    """Its mean over all tokens but the first, as transformers' with `labels=ids`."""
    hidden = decoder(ids, torch.arange(len(ids)), [0, len(ids)])
    return decoder.nll(hidden[:-1], ids[1:]).mean()
