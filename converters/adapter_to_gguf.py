"""An adapter → a standalone GGUF LoRA that llama.cpp hot-loads over any quantization of its base. Imports no torch.

llama.cpp computes y = Wx + s · (α/r) · B(Ax) with one α for the whole file and r from each tensor, and α = 0 means no
scaling. So every tensor's own scale goes into B, and α is r where all ranks are equal, else 0. The rows of B move as
those of W do (DESIGN section 3).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import gguf
from gguf.constants import GGUFValueType

from converters.metadata import put_contract, write_whole
from converters.pair_types import pair_type, stored
from converters.token_pairs import EMBEDDING, looked_up, require_two_matrices, token_pairs
from edgelora.architectures.names import gguf_row_order
from edgelora.base.model import Base
from edgelora.errors import ExportError
from edgelora.files.adapter_check import INVOCATION_KEY
from edgelora.files.contract import Contract
from edgelora.files.lazy import Lazy
from edgelora.peft.adapter import Adapter, only_in_torch
from edgelora.peft.change import Change, LoraPair


def gguf_changes(adapter: Adapter, base: Base) -> Mapping[str, Change]:
    """What the adapter makes of each linear layer, and of all rows of the embedding and the head, by the GGUF tensor of
    the weight and in GGUF's order of rows.

    Each is made where it is asked for, and not kept. Raises ExportError for what no weight can hold.
    """
    if adapter.kind.of_input:
        raise only_in_torch(adapter, base.path.name)

    def change_of(module: str) -> Change:
        change, order = adapter.change(module), gguf_row_order(base.architecture, base.config, module)
        return change if order is None else change.of(order)

    matrices = [module for module in adapter.vocabularies if module in base.vocabularies]
    return Lazy({base.tensor_of(module): module for module in (*adapter.linears, *matrices)}, change_of)


def write_adapter_gguf(out: Path, adapter: Adapter, base: Base, name: str, dtype: str = "F16") -> None:
    """Write the GGUF to `out` (a staged path), with a reserved place for the certificate.

    Raises ExportError if a value does not fit into `dtype`, or if it is more than B A.
    """
    pairs = token_pairs(base, adapter.token_rows)
    for tensor, change in gguf_changes(adapter, base).items():
        if change.pair is None or not change.is_pair:
            raise _not_a_lora(name, adapter)
        if tensor == EMBEDDING:
            require_two_matrices(base)
        pairs[tensor] = looked_up(change.pair) if tensor == EMBEDDING else change.pair
    if adapter.norms:
        raise _not_a_lora(name, adapter)
    _write(out, pairs, _Header(base.architecture.gguf_name, name, adapter.contract, adapter.invocation), dtype)


def write_pairs(
    out: Path, pairs: Mapping[str, LoraPair], architecture: str, name: str, dtype: str, contract: Contract | None
) -> None:
    """Write LoRA pairs, by GGUF tensor name and in its order of rows, to `out` (a staged path)."""
    _write(out, pairs, _Header(architecture, name, contract), dtype)


@dataclass(frozen=True)
class _Header:
    """What the file says of itself; `invocation`: the tokens from which on it acts (aLoRA)."""

    architecture: str
    name: str
    contract: Contract | None
    invocation: tuple[int, ...] = ()


def _write(out: Path, pairs: Mapping[str, LoraPair], header: _Header, dtype: str) -> None:
    pairs = dict(pairs)
    writer = gguf.GGUFWriter(out, header.architecture)
    writer.add_type("adapter")
    writer.add_name(header.name)
    writer.add_string("adapter.type", "lora")
    ranks = {pair.b.shape[1] for pair in pairs.values()}
    # b is (α/r)·B already: α = r gives llama.cpp the factor 1, and where ranks differ α = 0 means "as it is"
    writer.add_float32("adapter.lora.alpha", float(ranks.pop()) if len(ranks) == 1 else 0.0)
    if header.invocation:
        writer.add_key_value(
            INVOCATION_KEY, list(header.invocation), GGUFValueType.ARRAY, sub_type=GGUFValueType.UINT32
        )
    put_contract(writer, header.contract)
    for tensor, pair in pairs.items():
        for half, values in (("lora_a", pair.a), ("lora_b", pair.b)):
            numbers, kind = stored(values, pair_type(dtype), tensor)
            writer.add_tensor(f"{tensor}.{half}", numbers, raw_dtype=kind)
    write_whole(writer)


def _not_a_lora(name: str, adapter: Adapter) -> ExportError:
    one = adapter.kind.one
    more = "scales every row of the sum as well" if one == "a DoRA" else "changes something else"
    return ExportError(
        what=f"{name}: {one} cannot be an adapter of llama.cpp",
        why=f"llama.cpp adds B A x to W x, and nothing else; {one} {more}",
        fix="merge it into its base: `edgelora merge BASE --adapter FOLDER --to Q4_K_M --out FILE`",
    )
