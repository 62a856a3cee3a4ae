"""Make the fingerprint of a base from its weights: the same from a file at any quantization. Imports no torch."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import asdict

import numpy as np

from edgelora.architectures import Architecture, ModelConfig
from edgelora.architectures.names import gguf_module, hf_row_order
from edgelora.base import ggml
from edgelora.errors import BaseModelError
from edgelora.files.contract import LINEAGE_KEY, Fingerprint
from edgelora.files.gguf import GGUFFile

ROWS_PER_LAYER = 64


def fingerprint(file: GGUFFile, architecture: Architecture, config: ModelConfig) -> Fingerprint:
    """Reads 64 rows of each layer and all norms; dequantizes nothing else."""
    vocabulary = hashlib.sha256()
    for token in file.get("tokenizer.ggml.tokens", list, ()):
        vocabulary.update(str(token).encode() + b"\0")
    norms = hashlib.sha256()
    for name in sorted(n for n in file.tensors if n.endswith("_norm.weight")):
        norms.update(file.rows(name).tobytes())
    # a derived file may spell out a tied head: the function is the same, so the fingerprint is too
    dims = {k: v for k, v in asdict(config).items() if k not in ("tie_word_embeddings", "max_position_embeddings")}
    dims["rms_norm_eps"] = float(np.float32(dims["rms_norm_eps"]))  # GGUF keeps it in 32 bits
    return Fingerprint(
        config=dims,
        vocabulary_sha256=vocabulary.hexdigest(),
        norms_sha256=norms.hexdigest(),
        sketch=base64.b64encode(_row_norms(file, architecture, config).astype(np.float16).tobytes()).decode(),
        lineage=_lineage(file),
    )


def _lineage(file: GGUFFile) -> tuple[str, ...]:
    """What was merged into this file, in order. Raises BaseModelError if the statement was tampered with."""
    try:
        found = json.loads(file.get(LINEAGE_KEY, str, "[]"))
    except ValueError:
        found = None
    if not isinstance(found, list) or not all(isinstance(entry, str) for entry in found):
        raise BaseModelError(
            what=f"{file.path}: {LINEAGE_KEY} is no list of texts",
            why="edgelora writes one into every merged model; this one was edited or damaged",
            fix="merge the model again",
        )
    return tuple(found)


def _row_norms(file: GGUFFile, architecture: Architecture, config: ModelConfig) -> np.ndarray:
    """Norms of ROWS_PER_LAYER rows of each layer, drawn with a fixed seed over its linears, in HF's row order."""
    draw = np.random.default_rng(0)
    norms: list[float] = []
    shapes = list(config.linears.items())
    for layer in range(config.num_hidden_layers):
        for pick in range(ROWS_PER_LAYER):
            name, (d_out, d_in) = shapes[pick % len(shapes)]
            row = int(draw.integers(d_out))
            module = f"model.layers.{layer}.{name}"
            order = hf_row_order(architecture, config, module)
            stored = row if order is None else int(order[row])
            tensor = f"{gguf_module(architecture, config, module)}.weight"
            blocks = file.rows(tensor)[stored : stored + 1]
            norms.append(float(np.linalg.norm(ggml.dequantize(blocks, file.tensors[tensor].type, d_in))))
    return np.array(norms, np.float32)
