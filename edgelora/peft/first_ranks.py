"""The first b ranks of a DyLoRA (arXiv:2210.07558), which it learned to be an adapter with. Imports no torch.

Of y = x Wᵀ + α/r (x Aᵀ) Bᵀ, A (r, d_in) and B (d_out, r), they are y = x Wᵀ + α/b (x A₁..bᵀ) B₁..bᵀ: a LoRA of the rank
b and the same α, for any b from 1 to r. What is trained whole beside A and B is the same at every b.
"""

from __future__ import annotations

from edgelora.errors import ExportError
from edgelora.files.contract import Contract
from edgelora.files.lazy import Lazy
from edgelora.peft.adapter import Adapter
from edgelora.peft.kind import Parts

DYLORA = "dylora"


def is_nested(contract: Contract | None) -> bool:
    """Whether an adapter with this contract was trained so that its first ranks are one too."""
    return contract is not None and contract.method == DYLORA


def first_ranks(adapter: Adapter, rank: int, name: str) -> Adapter:
    """What the DyLoRA `adapter` is at this rank; its tensors are read where they are asked for.

    It may be cut again. What its contract says of scores is left out: they were those of all ranks.
    name: of the adapter, for errors. Raises ExportError for one of another method, and for a rank beyond its own.
    """
    contract = adapter.contract
    if contract is None or not is_nested(contract):
        raise not_nested(name, rank, contract)
    most = ranks_of(adapter)
    if not 1 <= rank <= most:
        raise ExportError(
            what=f"{name}: it has no first {rank} ranks",
            why=f"it was trained to be an adapter with each number of them from 1 to {most}",
            fix="pass a --rank of these",
        )
    config = {key: value for key, value in adapter.config.items() if key != "rank_pattern"} | {"r": rank}
    cut = Lazy({module: module for module in adapter.tensors}, lambda module: _cut(adapter.tensors[module], rank))
    return Adapter(config, cut, contract.model_copy(update={"evaluation": {}, "certificate": None}))


def ranks_of(adapter: Adapter) -> int:
    """How many ranks every layer of a LoRA has; 0: there is none."""
    parts = (adapter.tensors[module] for module in adapter.linears)
    return min((len(own["lora_A"]) for own in parts if "lora_A" in own), default=0)


def not_nested(name: str, rank: int, contract: Contract | None) -> ExportError:
    """The error for an adapter that only all ranks together are."""
    how = "does not say how it was trained" if contract is None else f"was trained by {contract.method}"
    return ExportError(
        what=f"{name}: its first {rank} ranks are no adapter",
        why=f"only a DyLoRA learns with its first ranks alone, and this one {how}: all of its ranks belong together",
        fix="leave --rank out; --svd-rank R writes the nearest LoRA of what changes weights alone, and its loss",
    )


def _cut(parts: Parts, rank: int) -> Parts:
    """A (rank, d_in) and B (d_out, rank); the others as they are."""
    if "lora_A" not in parts:
        return parts
    return {**parts, "lora_A": parts["lora_A"][:rank], "lora_B": parts["lora_B"][:, :rank]}
