"""What is written is held against what it was made from before it gets its name: write → check → sign → name.

The same tokens go through torch and through llama.cpp over the draft. Two numbers are kept apart: the *fidelity* (torch
over the file's own blocks: a fault of ours or of llama.cpp's, with a limit by type) and the *loss* (torch over what
the file was made from, unquantized: the price of its bits, reported and never a reason to reject).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from gguf.constants import GGMLQuantizationType

from edgelora.base.ggml import FLOATS
from edgelora.child import run_in_child
from edgelora.data.conversation import Conversation
from edgelora.errors import CertificateError
from edgelora.evaluate.thresholds import Limits, limits_of
from edgelora.files.atomic import refuse_existing, set_aside, staged, write_text
from edgelora.files.contract import CERTIFICATE_KEY, sha256_file
from edgelora.files.gguf import GGUFFile, fill_reserved
from edgelora.pipeline.check_rows import rows_to_check
from edgelora.pipeline.compare import Compared, Reference, compare
from edgelora.progress import OnProgress, silent

__all__ = ["Checked", "ModelCertificate", "Reference", "beside", "certify_model", "rows_to_check", "write_certified"]


class Checked(Protocol):
    """What a check comes to: `faults` says in words what is wrong; none, and the file may have its name."""

    @property
    def faults(self) -> list[str]: ...

    def as_dict(self) -> dict[str, Any]: ...


C = TypeVar("C", bound=Checked)


@dataclass(frozen=True)
class ModelCertificate:
    """What was compared of a model and what came out. `floats`: no matrix of it is quantized."""

    types: dict[str, int]
    """How many matrices the file has of each type."""
    compared: Compared
    limits: Limits

    @property
    def floats(self) -> bool:
        return set(self.types) <= {kind.name for kind in FLOATS}

    @property
    def faults(self) -> list[str]:
        found = self.compared
        counts = {
            "have other token ids": found.equal_ids,
            "are rendered otherwise by its template": found.equal_text,
            "end their turn otherwise": found.equal_ends,
        }
        faults = [f"{found.n_rows - n} of {found.n_rows} rows {what}" for what, n in counts.items() if n < found.n_rows]
        faults += [f"llama.cpp against torch: {fault}" for fault in self.limits.faults(found.fidelity)]
        if self.floats:  # no bits to pay for: a row out of place, which the file itself cannot show, shows here
            faults += [f"against what it was made from: {fault}" for fault in self.limits.faults(found.loss)]
        return faults

    def as_dict(self) -> dict[str, Any]:
        found = self.compared
        return {
            "passed": not self.faults, "n_rows": found.n_rows, "equal_ids": found.equal_ids,
            "equal_text": found.equal_text, "equal_ends": found.equal_ends, "types": self.types,
            "fidelity": found.fidelity.as_dict(), "loss": found.loss.as_dict(),
            "kl_limit": self.limits.kl_mean, "same_top_limit": self.limits.same_top,
            "flip_limit_nats": self.limits.flip_nats,
        }  # fmt: skip


def certify_model(
    draft: Path, reference: Reference, rows: Sequence[Conversation], on_progress: OnProgress = silent
) -> ModelCertificate:
    """Compare the GGUF model at `draft` with what it was made from, in a child process."""
    types: dict[GGMLQuantizationType, int] = {}
    for info in GGUFFile(draft).tensors.values():
        if len(info.shape) > 1:
            types[info.type] = types.get(info.type, 0) + 1
    compared = run_in_child(compare, draft, reference, rows, on_progress=on_progress)
    return ModelCertificate({kind.name: n for kind, n in types.items()}, compared, limits_of(types))


def write_certified(
    out: Path, write: Callable[[Path], None], check: Callable[[Path], C], *, overwrite: bool = False, sign: bool = True
) -> C:
    """`write(draft)`, `check(draft)`, and only then give it the name `out`; returns the certificate.

    It stands in the file too, where a place is reserved for it (`sign`), and as JSON beside it. Raises CertificateError
    if the check found faults: the file is kept aside as `out` + `.rejected`, and what stood at `out` is untouched.
    """
    refuse_existing(out, overwrite)
    with staged(out, overwrite=overwrite) as draft:
        write(draft)
        certificate = check(draft)
        if sign and CERTIFICATE_KEY in GGUFFile(draft).metadata:
            fill_reserved(draft, CERTIFICATE_KEY, json.dumps(certificate.as_dict()))
        if certificate.faults:
            aside = set_aside(draft, out)
            raise CertificateError(
                what=f"{out}: llama.cpp does not compute with it what torch does ({'; '.join(certificate.faults)})",
                why="the export or this build of llama.cpp is wrong for this model",
                fix=f"please report it with the output of `edgelora doctor`; what was written is kept as {aside.name}",
            )
        digest, size_bytes = sha256_file(draft), draft.stat().st_size
    statement = {"file": out.name, "size_bytes": size_bytes, "sha256": digest, **certificate.as_dict()}
    write_text(beside(out), json.dumps(statement, indent=2) + "\n", overwrite=True)
    return certificate


def beside(out: Path) -> Path:
    """Where the certificate of `out` stands."""
    return out.with_name(f"{out.stem}.certificate.json")
