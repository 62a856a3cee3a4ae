"""What adapters make of some rows of a base's head: its own, and at their scales what theirs are more. No torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgelora.base import ggml
from edgelora.base.head import NewRows
from edgelora.base.model import Base
from edgelora.peft.adapter import Adapter


def head_rows(base: Base, adapters: Sequence[tuple[Adapter, float]]) -> NewRows | None:
    """The ids (k,) of tokens with new rows in the head, and these, float32 (k, d); None: none."""
    name = list(base.vocabularies)[-1]
    if any(name in adapter.vocabularies for adapter, _ in adapters):
        return _all_rows(base, name, adapters)
    changed = [(*adapter.token_rows[name], scale) for adapter, scale in adapters if name in adapter.token_rows]
    if not changed:
        return None
    ids = np.unique(np.concatenate([own for own, _, _ in changed]))
    stored, kind, columns = base.tensors.matrix(f"{name}.weight")
    start = ggml.dequantize(stored[ids], kind, columns)
    rows = start.copy()
    for own, values, scale in changed:
        at = np.searchsorted(ids, own)
        rows[at] += np.float32(scale) * (values - start[at])
    return ids, rows


def _all_rows(base: Base, name: str, adapters: Sequence[tuple[Adapter, float]]) -> NewRows:
    """All ids and rows, where one of the adapters changes the head as a whole."""
    stored, kind, columns = base.tensors.matrix(f"{name}.weight")
    start = ggml.dequantize(stored, kind, columns)
    rows = start.copy()
    for adapter, scale in adapters:
        if name in adapter.token_rows:
            ids, own = adapter.token_rows[name]
            rows[ids] += np.float32(scale) * (own - start[ids])
        elif name in adapter.vocabularies:
            rows += np.float32(scale) * adapter.change(name).change(start)
    return np.arange(len(rows)), rows
