"""The earlier adapters that a new one starts orthogonal to: found, and held to the base."""

from __future__ import annotations

import hashlib

from edgelora.base.model import Base
from edgelora.config import TrainConfig
from edgelora.device import Choice
from edgelora.errors import AdapterError
from edgelora.files.contract import require_same_base, sha256_file
from edgelora.peft.adapter import TENSORS, Adapter, read_adapter


def avoided(config: TrainConfig, base: Base) -> list[Adapter]:
    """The adapters at config.orthogonal_to. Raises AdapterError for one that is none, or another base's.

    One made elsewhere that does not say its base is taken for this one's: it lends its directions alone. So does one
    that has biases, norms or the embedding beside them.
    """
    adapters = []
    for path in config.orthogonal_to:
        adapter = read_adapter(path, base.layers, may_have_rows=False)
        if not adapter.linears:
            raise AdapterError(
                what=f"{path}: {adapter.kind.one} adapts no linear layer",
                why="a start is orthogonal to what earlier adapters look at in those",
                fix="name LoRAs in --orthogonal-to",
            )
        if adapter.contract is not None:
            identity = base.as_trained(adapter.contract).identity
            require_same_base(adapter.contract, identity, str(path), str(base.path))
        adapters.append(adapter)
    return adapters


def avoided_sha256(config: TrainConfig) -> str:
    """Of the tensors of all of them, in their order."""
    return hashlib.sha256("".join(sha256_file(path / TENSORS) for path in config.orthogonal_to).encode()).hexdigest()


def why_avoided(config: TrainConfig) -> Choice:
    """What the start is orthogonal to, for whoever reads of the run."""
    names = ", ".join(path.resolve().name for path in config.orthogonal_to)
    return Choice(f"orthogonal to {names}", "A sees nothing of what they look at (O-LoRA)")
