"""Base + adapters → one merged GGUF in F16, one tensor in memory at a time. Imports no torch.

Each weight is dequantized, W + Σ s · ΔW is computed in float32 (every ΔW over the base's own W) and rounded once to
F16. Norms stay F32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from gguf.constants import LlamaFileType

from converters.adapter_to_gguf import gguf_pairs
from converters.metadata import copy_metadata
from edgelora.base import ggml
from edgelora.base.model import Base
from edgelora.errors import ExportError
from edgelora.files.contract import CERTIFICATE_KEY, CONTRACT_KEY, LINEAGE_KEY, lineage_text
from edgelora.peft.adapter import Adapter, LoraPair
from edgelora.progress import OnProgress, Pace, Progress, silent


@dataclass(frozen=True)
class Part:
    """An adapter to merge: how strongly, and the digest that names it in the result's lineage."""

    adapter: Adapter
    scale: float
    digest: str


def write_merged(out: Path, base: Base, parts: Sequence[Part], on_progress: OnProgress = silent) -> None:
    """Write the merged model to `out` (a staged path) as F16.

    Raises ExportError, naming the tensor, if a merged weight does not fit into F16.
    """
    writer = gguf.GGUFWriter(out, base.architecture.gguf_name)
    own = {"general.file_type", CONTRACT_KEY, CERTIFICATE_KEY, LINEAGE_KEY}
    copy_metadata(base.file, writer, leave_out=own)
    if base.chosen_template is not None:
        writer.add_chat_template(base.chosen_template)
    writer.add_uint32("general.file_type", LlamaFileType.MOSTLY_F16)
    lineage = [*base.lineage, *(f"{part.digest}:{part.scale:g}" for part in parts)]
    writer.add_string(LINEAGE_KEY, lineage_text(lineage))
    contract = next((p.adapter.contract for p in parts if p.adapter.contract is not None), None)
    if contract is not None:
        writer.add_string(CONTRACT_KEY, contract.model_copy(update={"certificate": None}).model_dump_json())
    for name, info in base.file.tensors.items():
        dtype = np.dtype(np.float16 if len(info.shape) > 1 else np.float32)
        writer.add_tensor_info(name, info.shape, dtype, info.elements * dtype.itemsize)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        pace = Pace(len(base.file.tensors))
        for tensor in _merged_tensors(base, parts):
            writer.write_tensor_data(tensor)
            _, eta = pace.step(0)
            on_progress(Progress("merge", pace.done, pace.total, eta_s=eta))
    finally:
        writer.close()


def _merged_tensors(base: Base, parts: Sequence[Part]) -> Iterator[np.ndarray]:
    pairs = [(gguf_pairs(part.adapter, base), part.scale) for part in parts]
    for name, info in base.file.tensors.items():
        weight = ggml.dequantize(base.file.rows(name), info.type, info.shape[-1])
        if len(info.shape) == 1:
            yield weight.reshape(-1)
        else:
            yield _add(name, weight, [(p[name], s) for p, s in pairs if name in p]).reshape(info.shape)


def _add(name: str, weight: np.ndarray, deltas: Sequence[tuple[LoraPair, float]]) -> np.ndarray:
    merged = weight.copy() if deltas else weight
    for pair, scale in deltas:
        change = pair.change(weight)
        change *= scale
        merged += change
    with np.errstate(over="ignore"):
        half = merged.astype(np.float16)
    if not np.isfinite(half).all():
        raise ExportError(
            what=f"{name}: a merged weight does not fit into F16 (largest {np.abs(merged).max():.3g})",
            why="F16 ends at 65504; the adapter or its scale is too strong",
            fix="merge at a smaller scale (--adapter FOLDER:0.5), or run the adapter live instead",
        )
    return half
