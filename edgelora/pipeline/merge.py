"""Base + adapters → one GGUF at any quantization: merge into F16, let llama.cpp quantize, name it when whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from converters.merge import Part, write_merged
from converters.quantize import parse_type, write_quantized
from edgelora.base.model import Base, open_base
from edgelora.device import physical_cores
from edgelora.errors import ConfigError, OutputError
from edgelora.files.atomic import refuse_existing, staged
from edgelora.files.contract import sha256_file
from edgelora.peft.adapter import TENSORS, Adapter
from edgelora.pipeline.export import FLOAT_QUANTS, read_checked
from edgelora.progress import OnProgress, silent


@dataclass(frozen=True)
class Merged:
    """The file that was written, and what its user should know about it."""

    path: Path
    size_bytes: int
    notes: list[str]


def merge(
    base_path: Path,
    adapters: Sequence[tuple[Path, float]],
    out: Path,
    *,
    quant: str = "F16",
    allow_unverified: bool = False,
    overwrite: bool = False,
    on_progress: OnProgress = silent,
) -> Merged:
    """Merge adapter folders at their scales into the base's weights and write `out` as `quant`."""
    parse_type(quant)
    refuse_existing(out, overwrite)
    if not adapters:
        raise ConfigError("nothing to merge", "no adapter was named", "pass --adapter FOLDER[:SCALE]")
    base = open_base(base_path)
    parts = [
        Part(read_checked(path, base, allow_unverified=allow_unverified), scale, sha256_file(path / TENSORS))
        for path, scale in adapters
    ]
    for part in parts:
        base = base.as_trained(part.adapter.contract)
    with staged(out, overwrite=overwrite) as draft:
        half = draft if quant.upper() == "F16" else draft.with_name(f"{draft.name}.F16")
        write_merged(half, base, parts, on_progress)
        if half is not draft:
            write_quantized(half, draft, quant, physical_cores(), on_progress)
    return Merged(out, out.stat().st_size, _notes(base, [p.adapter for p in parts], quant.upper()))


def quantize(
    source: Path, out: Path, quant: str, *, overwrite: bool = False, on_progress: OnProgress = silent
) -> Merged:
    """Quantize a whole GGUF model to `quant` with llama.cpp's own choice of types."""
    parse_type(quant)
    refuse_existing(out, overwrite)
    base = open_base(source)  # checks the file before llama.cpp sees it
    if base.quant not in FLOAT_QUANTS:
        raise OutputError(
            what=f"{source} is {base.quant} already",
            why="quantizing twice adds the errors of both",
            fix="start from the F16 file: `edgelora merge … --to F16` writes one",
        )
    with staged(out, overwrite=overwrite) as draft:
        write_quantized(source, draft, quant, physical_cores(), on_progress)
    return Merged(out, out.stat().st_size, [])


def _notes(base: Base, adapters: Sequence[Adapter], quant: str) -> list[str]:
    trained = {a.contract.base_file.quant for a in adapters if a.contract is not None} - set(FLOAT_QUANTS)
    if not trained or base.quant in FLOAT_QUANTS or quant in (*FLOAT_QUANTS, "Q8_0"):
        return []
    return [
        f"the adapter was trained over {', '.join(sorted(trained))} weights, which are merged and quantized again "
        f"here: below 8 bits this can undo what it learned. Compare with the live adapter (`edgelora eval`), or merge "
        f"into the 16-bit original."
    ]
