"""A base → a GGUF in floats that llama.cpp runs: converted, compared with the torch decoder, and only then named."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from converters.base_to_gguf import shortened_context, write_base_gguf
from edgelora.base.model import FLOAT_QUANTS, open_base
from edgelora.evaluate.fidelity import Fidelity
from edgelora.files.atomic import refuse_existing
from edgelora.pipeline.certificate import ModelCertificate, Output, Reference, certify_model, stamp, write_certified
from edgelora.progress import OnProgress, silent


@dataclass(frozen=True)
class Converted:
    """The file that was written, what its check came to, and what its user should know about it."""

    path: Path
    size_bytes: int
    certificate: ModelCertificate
    notes: list[str]

    @property
    def fidelity(self) -> Fidelity:
        """How far llama.cpp is with the file from torch with the original: nothing is lost but the rounding."""
        return self.certificate.compared.loss


def convert(
    base_path: Path,
    out: Path,
    *,
    dtype: str = "F16",
    template: str | None = None,
    overwrite: bool = False,
    on_progress: OnProgress = silent,
) -> Converted:
    """Write the base at `base_path` to `out` as `dtype`, with a chosen chat template if it has none.

    Raises CertificateError, and keeps the file aside as `out`.rejected, if llama.cpp does not compute what torch
    computes, or gives a text other token ids; ExportError and BaseModelError for what is known to differ.
    """
    refuse_existing(out, overwrite)
    made_from = stamp(base_path)
    base = open_base(base_path, template)
    certificate = write_certified(
        Output(out, overwrite),
        made_from,
        lambda draft: write_base_gguf(draft, base, dtype, on_progress),
        lambda draft: certify_model(draft, Reference(base_path, template=template), None, on_progress),
    )
    notes = []
    if base.quant not in FLOAT_QUANTS:
        notes.append(
            f"these weights were {base.quant}: as {dtype} they take more room and are no better, and quantizing them "
            f"again adds a second error to the first"
        )
    if (shorter := shortened_context(base)) is not None:
        notes.append(
            f"its context ends at {shorter[0]} tokens instead of {shorter[1]}: llama.cpp computes something else beyond"
        )
    if base.template_source is None:
        notes.append("it has no chat template; --chat-template chatml gives it one")
    return Converted(out, out.stat().st_size, certificate, notes)
