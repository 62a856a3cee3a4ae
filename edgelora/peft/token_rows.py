"""Trained token rows (PEFT's TrainableTokens): the rows (k, d) of k tokens in the embedding, and in the head, alone.

e(t) = R_i for the i-th of these tokens, E_t for all others; the logit of the i-th is x · R'_i. Where a base has one
matrix for both (tied), R' is R. What is saved are the rows themselves, in float32. For tokens that a base was not
trained on, or that are to mean something new.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from edgelora.errors import ConfigError
from edgelora.nn.decoder import Decoder
from edgelora.nn.linear import Weight
from edgelora.peft.defaults import COMPARED, GUIDE, Defaults, always
from edgelora.peft.kind import ROWS

DEFAULTS = Defaults(
    rate=always(
        GUIDE.value,
        f"as for embeddings before a prompt: {GUIDE.why}; 160 steps over SmolLM2-135M learned no more with 0.08, nor "
        f"with the 0.2 of {COMPARED}tokens that begin and end a text",
    )
)


class TokenRows(nn.Module):
    """`trainable_tokens_delta` (k, d) float32, in the place of the rows `ids` (k,)."""

    ids: Tensor

    def __init__(self, ids: Tensor, rows: Tensor) -> None:
        super().__init__()
        self.register_buffer("ids", ids, persistent=False)
        self.trainable_tokens_delta = nn.Parameter(rows)

    @property
    def rows(self) -> Tensor:
        return self.trainable_tokens_delta

    def tensors(self) -> dict[str, Tensor]:
        return {ROWS: self.trainable_tokens_delta.detach()}


def put_rows(decoder: Decoder, tokens: Sequence[int]) -> None:
    """Let the rows of these tokens be trained, from the base's own on. Raises ConfigError if there are none, or if one
    is no token."""
    require_tokens(tokens, decoder.config.vocab_size)
    ids = torch.tensor(sorted(set(tokens)), device=decoder.model.norm.weight.device)
    for one in decoder.vocabularies.values():
        one.delta = TokenRows(ids, one.weight.gather(ids).clone())


def require_tokens(tokens: Sequence[int], vocabulary: int) -> None:
    """Raise ConfigError unless these are ids of a vocabulary of this size."""
    strange = [one for one in tokens if not 0 <= one < vocabulary]
    if strange or not tokens:
        raise ConfigError(
            what=f"train_tokens: {f'the id {strange[0]} is no token' if strange else 'no token is named'}",
            why=f"rows of the embedding are trained, and this base has {vocabulary}",
            fix="name tokens of the base: --train-tokens '<|reserved_1|>', or their ids",
        )


def given(ids: np.ndarray, rows: np.ndarray, device: torch.device) -> TokenRows:
    """Rows from a file."""
    return TokenRows(torch.from_numpy(ids).to(device), torch.from_numpy(rows.copy()).to(device))


def blended(parts: Sequence[tuple[np.ndarray, np.ndarray, float]], weight: Weight) -> TokenRows:
    """Of several files, their ids, rows and scales: the base's rows, and at the scales what theirs are more."""
    ids = torch.from_numpy(np.unique(np.concatenate([own for own, _, _ in parts])))
    start = weight.gather(ids)
    rows = start.clone()
    for own, values, scale in parts:
        at = torch.searchsorted(ids, torch.from_numpy(own))
        rows[at] += scale * (torch.from_numpy(values) - start[at])
    return TokenRows(ids, rows)
