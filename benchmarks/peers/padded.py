"""A small model made wide enough for real K-quants: zeros at the end of rows and columns, and the grid dithered away.

Weights that were quantized before lie on the grid of their type, and a type with the same grid would seem better.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from gguf.constants import LlamaFileType

from converters.metadata import copy_metadata
from edgelora.base import ggml
from edgelora.base.model import open_base

WIDTH = 768  # SmolLM2-135M has 576 columns, and K-quants divide rows of 256


def write_dithered(source: Path, out: Path, width: int | None) -> None:
    """The GGUF at `source` as F16, matrices dithered, and a llama `width` wide: zeros at the end of rows and columns.

    A norm over zeros too divides by less: its weights grow by sqrt(d / d'), and eps shrinks by d / d'.
    """
    base = open_base(source)
    config, file = base.config, base.file
    writer = gguf.GGUFWriter(out, base.architecture.gguf_name)
    grown, share, own = {}, 1.0, ["general.file_type"]
    if width is not None:
        share, heads = config.hidden_size / width, width // config.head_dim
        kv_heads = heads * config.num_key_value_heads // config.num_attention_heads
        grown = {config.hidden_size: width, config.num_key_value_heads * config.head_dim: kv_heads * config.head_dim}
        names = (
            "embedding_length",
            "attention.head_count",
            "attention.head_count_kv",
            "attention.layer_norm_rms_epsilon",
        )
        own += [f"llama.{name}" for name in names]
        writer.add_embedding_length(width)
        writer.add_head_count(heads)
        writer.add_head_count_kv(kv_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps * share)
    copy_metadata(file, writer, leave_out=own)
    writer.add_file_type(LlamaFileType.MOSTLY_F16)
    draw = np.random.default_rng(0)
    for name, info in file.tensors.items():
        weights = ggml.dequantize(file.rows(name), info.type, info.shape[-1]).reshape(info.shape)
        if len(info.shape) > 1:
            weights = dithered(weights, draw)
        wide = np.zeros([grown.get(n, n) for n in info.shape], np.float32)
        wide[tuple(map(slice, info.shape))] = weights
        writer.add_tensor(name, wide * np.float32(share**0.5) if len(info.shape) == 1 else wide.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def dithered(weights: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """Weights (n_rows, columns) off the grid that a quantization left them on: noise of up to half a step.

    16 weights of any type share a step. The smallest gap between two of them is that, or little more.
    """
    runs = weights.reshape(-1, 16)
    gaps = np.diff(np.sort(runs, 1), axis=1)
    largest = np.abs(runs).max(1, keepdims=True)
    steps = np.where(gaps > 1e-4 * largest, gaps, np.inf).min(1, keepdims=True)
    steps[~np.isfinite(steps)] = 0.0  # all alike
    noise = draw.uniform(-0.5, 0.5, runs.shape).astype(np.float32)
    return np.asarray((runs + steps * noise).reshape(weights.shape))
