"""A GGUF LoRA, as `edgelora export` or llama.cpp's converter writes it → PEFT's. Imports neither torch nor llama.cpp.

llama.cpp scales by α/r, r of each tensor, and not at all where α is 0: PEFT's rule but for the zero, for which α is r
here. So A and B come out as they stand in the file. Rows of B go back to where they are in HF's W.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from converters.from_elsewhere import fitting, require_none
from edgelora.architectures.names import EMBEDDING, hf_row_order
from edgelora.base import ggml
from edgelora.base.model import Base
from edgelora.errors import AdapterError, some
from edgelora.files.adapter_check import contract_of, own_shapes, require_fit
from edgelora.files.contract import Contract
from edgelora.files.gguf import GGUFFile
from edgelora.peft.adapter import Adapter
from edgelora.peft.lora_config import StoredPair, adapter_of
from edgelora.peft.strangers import VOCABULARY, no_linear

ALPHA = "adapter.lora.alpha"


def read_gguf(path: Path, base: Base) -> tuple[Adapter, Contract | None]:
    """The adapter in a GGUF of F32, F16, BF16 or Q8_0 tensors, and the contract that ours carry.

    Raises AdapterError with all its faults, FileFormatError if it is no GGUF.
    """
    file = GGUFFile(path)
    matrices = () if base.layers.tied else base.vocabularies  # llama.cpp has no LoRA of a matrix that is both
    modules = {base.tensor_of(module): module for module in (*base.linears, *matrices)}
    targets = {name.rpartition(".")[0] for name in file.tensors}
    invocation = _fitting_invocation(file, targets - set(modules), base)
    alpha = file.get(ALPHA, float)
    pairs = {modules[target]: _pair(file, target, alpha, modules[target], base) for target in targets}
    found = fitting(path, pairs, base)
    return adapter_of(found, base.linears, str(base.path), invocation=invocation), contract_of(file)


def _fitting_invocation(file: GGUFFile, foreign: set[str], base: Base) -> tuple[int, ...]:
    """The tokens from which on it acts. Raises AdapterError with all its faults; foreign: targets that `base` lacks."""
    adapter = file.get("general.type", str) == "adapter"  # else `require_fit` says what it is
    strangers = [no_linear(target) for target in sorted(foreign)] if adapter else []
    # those are named above, and here held to their own shapes
    own = {**base.linears, **base.vocabularies}
    shapes = own_shapes(file) | {base.tensor_of(module): shape for module, shape in own.items()}
    try:
        invocation = require_fit(file, base.architecture.gguf_name, shapes, base.config.vocab_size)
    except AdapterError as e:
        if not strangers:
            raise
        strangers.insert(0, e.what.removeprefix(f"{file.path}: "))
    if strangers and base.layers.tied and all(stranger.endswith(VOCABULARY) for stranger in strangers):
        raise AdapterError(
            what=f"{file.path}: {some(strangers)}",
            why=f"{base.path.name} has one matrix for both, which llama.cpp cannot adapt",
            fix="pass the base with two that it was made over, which `edgelora untie BASE --out FILE` writes",
        )
    require_none(file.path, strangers, base)
    return invocation


def _pair(file: GGUFFile, target: str, alpha: float, module: str, base: Base) -> StoredPair:
    a, b = (_floats(file, f"{target}.{half}") for half in ("lora_a", "lora_b"))
    if module == EMBEDDING:  # whose rows are looked up in lora_a
        a, b = b.T, a
    order = hf_row_order(base.architecture, base.config, module)
    return StoredPair(a, b if order is None else b[order], alpha or len(a))


def _floats(file: GGUFFile, name: str) -> np.ndarray:
    info = file.tensors[name]
    return np.array(ggml.dequantize(file.rows(name), info.type, info.shape[-1]), np.float32)
