"""The earlier adapters that a new one starts orthogonal to: found, and held to the base."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path

from edgelora.base.model import Base
from edgelora.config import TrainConfig
from edgelora.device import Choice
from edgelora.errors import AdapterError
from edgelora.files.contract import Contract, contract_in, fault_and_contract, require_same_base, sha256_file
from edgelora.peft.adapter import TENSORS, Adapter, read_adapter


def avoided(config: TrainConfig, base: Base) -> list[Adapter]:
    """The adapters at config.orthogonal_to. Raises AdapterError for one that is none, or another base's.

    One made elsewhere that does not say its base is taken for this one's: it lends its directions alone. So does one
    that has biases, norms or the embedding beside them.
    """
    adapters = []
    for path in config.orthogonal_to:
        require = partial(_require_its_base, path=path, base=base)
        try:
            adapter = read_adapter(path, base.layers, may_have_rows=False)
        except AdapterError as fault:
            raise fault_and_contract(fault, path, partial(contract_in, path), require) from None
        if not adapter.linears:
            raise AdapterError(
                what=f"{path}: {adapter.kind.one} adapts no linear layer",
                why="a start is orthogonal to what earlier adapters look at in those",
                fix="name LoRAs in --orthogonal-to",
            )
        require(adapter.contract)
        adapters.append(adapter)
    return adapters


def _require_its_base(contract: Contract | None, path: Path, base: Base) -> None:
    if contract is not None:
        require_same_base(contract, base.as_trained(contract).identity, str(path), str(base.path))


def avoided_sha256(config: TrainConfig) -> str:
    """Of the tensors of all of them, in their order."""
    return hashlib.sha256("".join(sha256_file(path / TENSORS) for path in config.orthogonal_to).encode()).hexdigest()


def why_avoided(config: TrainConfig) -> Choice:
    """What the start is orthogonal to, for whoever reads of the run."""
    names = ", ".join(path.resolve().name for path in config.orthogonal_to)
    return Choice(f"orthogonal to {names}", "A sees nothing of what they look at (O-LoRA)")
