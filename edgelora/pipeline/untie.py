"""A base with a tied head → one with its own, checked: for adapters of the embedding or the head alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from converters.untie import require_tied, write_untied
from edgelora.base.model import open_base
from edgelora.files.atomic import refuse_existing, require_space
from edgelora.pipeline.certificate import ModelCertificate, Output, Reference, certify_model, stamp, write_certified
from edgelora.progress import OnProgress, silent


@dataclass(frozen=True)
class Untied:
    """The file that was written, and what its check came to."""

    path: Path
    size_bytes: int
    certificate: ModelCertificate


def untie(base_path: Path, out: Path, *, overwrite: bool = False, on_progress: OnProgress = silent) -> Untied:
    """Write the base at `base_path`, a GGUF with a tied head, to `out` with a head of its own.

    Raises ExportError for a base that has one, or whose family llama.cpp reads none of; CertificateError as `convert`.
    """
    refuse_existing(out, overwrite)
    made_from, base = stamp(base_path), open_base(base_path)
    require_tied(base)
    size = sum(path.stat().st_size for path in base.source.files)
    require_space(out.parent, size + base.file.tensors["token_embd.weight"].size_bytes, "the untied base")
    certificate = write_certified(
        Output(out, overwrite),
        made_from,
        lambda draft: write_untied(draft, base, on_progress),
        lambda draft: certify_model(draft, Reference(base_path), None, on_progress),
    )
    return Untied(out, out.stat().st_size, certificate)
