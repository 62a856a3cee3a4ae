"""What is written is held against what it was made from before it gets its name: write → check → sign → name.

The same tokens go through torch and through llama.cpp over the draft. Two numbers are kept apart: the *fidelity* (torch
over the file's own blocks: a fault of ours or of llama.cpp's, with a limit by type) and the *loss* (torch over what
the file was made from, unquantized: the price of its bits, reported and never a reason to reject).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from gguf.constants import GGMLQuantizationType

from edgelora.base.ggml import FLOATS
from edgelora.base.model import open_base
from edgelora.child import expect_torch, run_in_child
from edgelora.data.conversation import Conversation
from edgelora.errors import CertificateError
from edgelora.evaluate.thresholds import Limits, limits_of
from edgelora.files.atomic import refuse_existing, rejected, set_aside, staged, write_text
from edgelora.files.certificate_keys import fill
from edgelora.files.contract import sha256_file
from edgelora.files.gguf import GGUFFile
from edgelora.files.split import open_gguf
from edgelora.files.unchanged import Stamps, stamp
from edgelora.pipeline.check_rows import rows_to_check
from edgelora.pipeline.compare import Compared, compare
from edgelora.pipeline.foreign import compare_foreign, open_model
from edgelora.pipeline.said import Said
from edgelora.pipeline.torch_states import Reference, torch_states
from edgelora.progress import OnProgress, silent

__all__ = [
    "Checked", "ModelCertificate", "Output", "Reference", "beside", "certify_model", "rows_to_check", "stamp",
    "write_certified",
]  # fmt: skip


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
        counts = (
            ("texts have other token ids", found.equal_ids, found.n_texts),
            ("rows are rendered otherwise by its template", found.equal_text, found.n_rows),
            ("rows end their turn otherwise", found.equal_ends, found.n_rows),
        )
        faults = [f"{total - equal} of {total} {what}" for what, equal, total in counts if equal < total]
        if found.fidelity is not None:
            faults += [f"llama.cpp against torch: {fault}" for fault in self.limits.faults(found.fidelity)]
        if self.floats:  # no bits to pay for: a row out of place, which the file itself cannot show, shows here
            faults += [f"against what it was made from: {fault}" for fault in self.limits.faults(found.loss)]
        return faults

    @property
    def sentence(self) -> str:
        """Both numbers, for who waits for the file."""
        own, loss = self.compared.fidelity, self.compared.loss
        checked = f"checked on {loss.n_tokens} tokens: "
        if own is not None:
            checked += (
                f"llama.cpp computes what torch does over these weights (mean KL {own.kl_mean:.2g}, limit "
                f"{self.limits.kl_mean:.2g}); "
            )
        return (
            f"{checked}it is {loss.kl_mean:.2g} away from what it was made from, same top {loss.same_top:.1%} ± "
            f"{loss.same_top_error:.1%}"
        )

    def as_dict(self) -> dict[str, Any]:
        found = self.compared
        return {
            "passed": not self.faults, "n_texts": found.n_texts, "equal_ids": found.equal_ids, "n_rows": found.n_rows,
            "equal_text": found.equal_text, "equal_ends": found.equal_ends, "types": self.types,
            "fidelity": found.fidelity.as_dict() if found.fidelity else None, "loss": found.loss.as_dict(),
            "kl_limit": self.limits.kl_mean, "same_top_limit": self.limits.same_top,
            "flip_limit_nats": self.limits.flip_nats,
        }  # fmt: skip


def certify_model(
    draft: Path, reference: Reference, rows: Sequence[Conversation] | None, on_progress: OnProgress = silent
) -> ModelCertificate:
    """Compare the model at `draft` (a GGUF or a checkpoint) with what it was made from, in child processes.

    On a few built-in conversations without `rows`.
    """
    types = types_of(draft)
    said = Said.read(reference.open()[0], open_base(draft).context, rows)
    models = (Reference(draft), reference)
    states = run_in_child(torch_states, models, said.examples, with_torch=True, on_progress=on_progress)
    compared = run_in_child(compare, draft, reference, said, states, on_progress=on_progress)
    return ModelCertificate({kind.name: n for kind, n in types.items()}, compared, limits_of(types))


def certify_foreign(
    draft: Path, source: Path, rows: Sequence[Conversation] | None, on_progress: OnProgress = silent
) -> ModelCertificate:
    """Compare the GGUF at `draft` with the one it was made from, of a family that only llama.cpp computes."""
    types, base = types_in(open_gguf(draft)), open_model(source)
    said = Said.read(base, base.context, rows)
    compared = run_in_child(compare_foreign, draft, source, said, on_progress=on_progress)
    return ModelCertificate({kind.name: n for kind, n in types.items()}, compared, limits_of(types))


def types_in(file: GGUFFile) -> dict[GGMLQuantizationType, int]:
    """How many matrices a file has of each type."""
    return dict(Counter(info.type for info in file.tensors.values() if len(info.shape) > 1))


def types_of(model: Path) -> dict[GGMLQuantizationType, int]:
    """How many matrices a model has of each type."""
    base = open_base(model)
    if base.is_gguf:
        return types_in(base.file)
    return dict(Counter(base.tensors.kind(name) for name, shape in base.tensors.shapes().items() if len(shape) > 1))


@dataclass(frozen=True)
class Output:
    """Where a result goes. `sign`: its certificate stands in the file too, where a place is reserved for it."""

    path: Path
    overwrite: bool = False
    folder: bool = False
    sign: bool = True


def write_certified(out: Output, made_from: Stamps, write: Callable[[Path], object], check: Callable[[Path], C]) -> C:
    """`write(draft)`, `check(draft)`, and only then give it its name; returns the certificate, which stands beside it.

    Raises CertificateError if the check found faults: what was written is kept aside as `.rejected`, its certificate
    beside it. Raises BaseModelError if what it is made from changed meanwhile, OutputError if the result would take its
    place or another's certificate. What stood at `out` is then untouched.
    """
    card = beside(out.path)
    made_from.require_apart(out.path, card, rejected(out.path))
    refuse_existing(out.path, out.overwrite, folder=out.folder)
    if not out.overwrite and _is_of_another(card, out):
        refuse_existing(card)
    with (
        staged(card, overwrite=True) as new_card,  # its name comes last, and the old one is gone by then
        staged(out.path, overwrite=out.overwrite, folder=out.folder, stale=card) as draft,
    ):
        expect_torch()  # imported while this writes
        write(draft)
        certificate = check(draft)
        made_from.require_unchanged()  # before its faults: they may be nothing else
        if out.sign and not out.folder:
            fill(draft, certificate.as_dict())
        if certificate.faults:
            aside = set_aside(draft, out.path)
            write_text(beside(aside), _text(aside, certificate), overwrite=True)
            raise _rejected(out.path, certificate.faults, aside)
        new_card.write_text(_text(draft, certificate), encoding="utf-8", newline="\n")
    return certificate


def _text(written: Path, certificate: Checked) -> str:
    """The certificate as it stands beside what was written, with the digest of each file."""
    files = sorted(written.iterdir()) if written.is_dir() else [written]
    return json.dumps({"files": {f.name: sha256_file(f) for f in files}, **certificate.as_dict()}, indent=2) + "\n"


def _is_of_another(card: Path, out: Output) -> bool:
    """Whether what stands at `card` is something else than an earlier certificate of `out`."""
    if not card.exists():
        return False
    try:
        files = json.loads(card.read_text(encoding="utf-8"))["files"]
        own = f"{out.path.name}.gguf" not in files if out.folder else out.path.name in files
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return True
    return not own


def _rejected(out: Path, faults: Sequence[str], aside: Path) -> CertificateError:
    return CertificateError(
        what=f"{out}: llama.cpp does not compute with it what torch does ({'; '.join(faults)})",
        why="the export or this build of llama.cpp is wrong for this model",
        fix=f"please report it with the output of `edgelora doctor`; what was written is kept as {aside.name}",
    )


def beside(out: Path) -> Path:
    """Where the certificate of `out` stands."""
    return out.with_name(f"{out.name.removesuffix('.gguf')}.certificate.json")
