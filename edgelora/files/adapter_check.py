"""What must be true of a GGUF adapter before llama.cpp sees it: llama.cpp aborts or reads wild memory otherwise.

Takes the base's tensors as plain shapes, so it knows nothing of how a base is opened.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from gguf.constants import GGMLQuantizationType, GGUFValueType

from edgelora.errors import AdapterError, some
from edgelora.files.contract import CONTRACT_KEY, Contract, read_contract
from edgelora.files.gguf import GGUFFile

Type = GGMLQuantizationType
ALLOWED = {Type.F32: np.float32, Type.F16: np.float16, Type.BF16: None, Type.Q8_0: None}
INVOCATION_KEY = "adapter.alora.invocation_tokens"
MAX_INVOCATION = 256
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
EXPERTS = "_exps.weight"  # the matrices of a mixture's experts, one upon the other


def check_adapter(path: Path, architecture: str, shapes: Mapping[str, tuple[int, ...]]) -> GGUFFile:
    """Open the adapter at `path` and check it against a base: its architecture and tensor shapes (rows, columns), or
    (experts, rows, columns) where those of a mixture are stacked.

    Raises AdapterError with all its faults at once, FileFormatError if it is no GGUF file. One that waits for an
    invocation (aLoRA) is a fault here: it would answer from the first token on.
    """
    file = GGUFFile(path)
    require_fit(file, architecture, shapes, n_vocab=None)
    return file


def require_fit(
    file: GGUFFile, architecture: str, shapes: Mapping[str, tuple[int, ...]], n_vocab: int | None
) -> tuple[int, ...]:
    """Raise AdapterError, with all its faults, unless `file` is an adapter that llama.cpp can run over a base.

    Returns its invocation tokens: none for an adapter that is active from the first token on, which all must be where
    `n_vocab`, the base's number of tokens, is None.
    """
    require_adapter(file)
    faults = _key_faults(file, architecture) + _tensor_faults(file, shapes)
    tokens = _invocation(file, n_vocab, faults)
    if faults:
        raise AdapterError(
            what=f"{file.path}: {some(faults)}",
            why="llama.cpp would crash on it or answer wrongly: it belongs to another base, or is no LoRA adapter",
            fix="use an adapter that `edgelora export` made for this base",
        )
    return tokens


def require_adapter(file: GGUFFile) -> None:
    """Raise AdapterError for a file that says it is something else, none of whose tensors would fit."""
    kind = file.metadata.get("general.type")
    if kind is not None and kind.type == GGUFValueType.STRING and kind.data != "adapter":
        raise AdapterError(
            what=f"{file.path}: general.type is {kind.data!r}, expected 'adapter'",
            why=f"it is no adapter, but {'a whole model' if kind.data == 'model' else 'another kind of file'}",
            fix="pass a model as the base; an adapter for it is what `edgelora export` writes",
        )


def own_shapes(file: GGUFFile) -> dict[str, tuple[int, ...]]:
    """The shapes that a base must have for this adapter, by its pairs, to check it without one: (rows, columns), the
    number of experts before them where there are several."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, a in file.tensors.items():
        target, _, half = name.rpartition(".")
        b = file.tensors.get(f"{target}.lora_b")
        if half == "lora_a" and b is not None:
            turned = target == EMBEDDING  # whose rows are looked up in a
            shapes[target] = (*a.shape[:-1], *b.shape[:-1]) if turned else (*b.shape[:-1], a.shape[-1])
    return shapes


def contract_of(file: GGUFFile) -> Contract | None:
    """The contract inside a GGUF we wrote; None for one made elsewhere."""
    text = file.get(CONTRACT_KEY, str)
    return None if text is None else read_contract(text, str(file.path))


def _key_faults(file: GGUFFile, architecture: str) -> list[str]:
    wanted = {"general.type": "adapter", "general.architecture": architecture, "adapter.type": "lora"}
    faults = []
    for key, value in wanted.items():
        found = file.metadata.get(key)
        if found is None or found.type != GGUFValueType.STRING or found.data != value:
            faults.append(f"{key} is {'missing' if found is None else repr(found.data)}, expected {value!r}")
    alpha = file.metadata.get("adapter.lora.alpha")
    if alpha is None or alpha.type != GGUFValueType.FLOAT32 or not np.isfinite(alpha.data):
        faults.append(f"adapter.lora.alpha is {'missing' if alpha is None else alpha.data}, expected a finite float32")
    return faults


def _invocation(file: GGUFFile, n_vocab: int | None, faults: list[str]) -> tuple[int, ...]:
    """The tokens after which the adapter is active; what is wrong with them goes to `faults`."""
    found = file.metadata.get(INVOCATION_KEY)
    if found is None:
        return ()
    if n_vocab is None:
        faults.append(f"{INVOCATION_KEY} is set: it waits for an invocation, which this engine does not see")
    elif found.item != GGUFValueType.UINT32 or not 0 < len(found.data) <= MAX_INVOCATION:
        faults.append(f"{INVOCATION_KEY} is no list of 1 to {MAX_INVOCATION} uint32")
    elif int(found.data.max()) >= n_vocab:
        faults.append(f"{INVOCATION_KEY} holds {found.data.max()}, and the base has {n_vocab} tokens")
    else:
        return tuple(int(token) for token in found.data)
    return ()


def _tensor_faults(file: GGUFFile, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    faults = [] if file.tensors else ["it holds no tensors"]
    for name, info in file.tensors.items():
        target, _, half = name.rpartition(".")
        other = f"{target}.{'lora_b' if half == 'lora_a' else 'lora_a'}"
        base = shapes.get(target)
        if half not in ("lora_a", "lora_b") or base is None:
            faults.append(f"{name} has no counterpart in the base")
        elif target == EMBEDDING and HEAD not in shapes:
            faults.append(f"{name}: the embedding is this base's head too, which llama.cpp cannot adapt")
        elif len(base) != (3 if target.endswith(EXPERTS) else 2):
            faults.append(f"{name}: llama.cpp cannot adapt this tensor of the base")
        elif other not in file.tensors:
            faults.append(f"{name} stands without its other half")
        elif {len(info.shape), len(file.tensors[other].shape)} != {len(base)}:
            faults.append(f"{name} has {len(info.shape)} dimensions, expected {len(base)}")
        elif info.type not in ALLOWED:
            faults.append(f"{name} is stored as {info.type.name}, expected F32, F16, BF16 or Q8_0")
        elif info.shape[:-2] != base[:-2]:  # llama.cpp does not compare them, and would read beyond the end
            faults.append(f"{name} is for {info.shape[0]} experts, and the base has {base[0]}")
        elif target == EMBEDDING:
            faults += _embedding_faults(file, name, info.shape, base)
        elif half == "lora_a" and (info.shape[-1] != base[-1] or info.shape[-2] != file.tensors[other].shape[-1]):
            rank = file.tensors[other].shape[-1]
            faults.append(f"{name} is {info.shape}, expected (r, {base[-1]}) with B's r {rank}")
        elif half == "lora_b" and info.shape[-2] != base[-2]:
            faults.append(f"{name} is {info.shape}, expected ({base[-2]}, r)")
        elif not _finite(file, name, info.type):
            faults.append(f"{name} holds NaN or infinite values")
    return faults


def _embedding_faults(file: GGUFFile, name: str, shape: tuple[int, ...], base: tuple[int, ...]) -> list[str]:
    """Of a matrix of the embedding's pair: `lora_a` (V, r), in which rows are looked up, or `lora_b` (d, r)."""
    target, _, half = name.rpartition(".")
    rank, n = file.tensors[f"{target}.lora_b"].shape[-1], base[0] if half == "lora_a" else base[1]
    if shape != (n, rank):
        return [f"{name} is {shape}, expected ({n}, {rank})"]
    return [] if _finite(file, name, file.tensors[name].type) else [f"{name} holds NaN or infinite values"]


def _finite(file: GGUFFile, name: str, kind: Type) -> bool:
    rows = file.rows(name)
    if kind == Type.BF16:
        return bool(np.all((rows.view(np.uint16) & 0x7F80) != 0x7F80))
    if kind == Type.Q8_0:
        scales = rows.reshape(-1, 34)[:, :2].copy().view(np.float16)
        return bool(np.isfinite(scales).all())
    dtype = ALLOWED[kind]
    return dtype is not None and bool(np.isfinite(rows.view(dtype)).all())
