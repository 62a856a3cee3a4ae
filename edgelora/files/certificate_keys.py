"""What a GGUF says of its certificate: `edgelora.certificate.*`, of a fixed size, filled in place once it was checked.

The whole certificate is a text; what a person asks for first stands beside it as numbers that any viewer shows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgelora.files.contract import CERTIFICATE_BYTES, CERTIFICATE_KEY
from edgelora.files.gguf import GGUFFile
from edgelora.files.reserved import fill_reserved, reserve

PREFIX = "edgelora.certificate."
PASSED, KL_MEAN, KL_LIMIT, SAME_TOP = (
    f"{PREFIX}{name}" for name in ("passed", "fidelity.kl_mean", "fidelity.kl_limit", "fidelity.same_top")
)
LOSS = f"{PREFIX}loss.kl_mean"
UNKNOWN = float("nan")


def reserved(*, model: bool = True) -> dict[str, str | float]:
    """The keys of a file that was not checked yet. An adapter has no loss: it is no smaller form of anything."""
    numbers = dict.fromkeys((KL_MEAN, KL_LIMIT, SAME_TOP, *((LOSS,) if model else ())), UNKNOWN)
    return {CERTIFICATE_KEY: reserve(CERTIFICATE_BYTES), PASSED: False, **numbers}


def withdrawn(file: GGUFFile) -> dict[str, str | float]:
    """The certificate of `file`, as a file made from it must not say it: emptied."""
    empty = {**reserved(), CERTIFICATE_KEY: ""}
    return {key: value for key, value in empty.items() if key in file.metadata}


def fill(path: Path, certificate: Mapping[str, Any]) -> None:
    """Fill what is reserved in the GGUF at `path`; it keeps its size."""
    found, loss = certificate.get("fidelity") or certificate.get("adapter") or {}, certificate.get("loss") or {}
    values = {
        CERTIFICATE_KEY: json.dumps(certificate), PASSED: certificate["passed"], KL_MEAN: found.get("kl_mean", UNKNOWN),
        KL_LIMIT: certificate.get("kl_limit", UNKNOWN), SAME_TOP: found.get("same_top", UNKNOWN),
        LOSS: loss.get("kl_mean", UNKNOWN),
    }  # fmt: skip
    there = GGUFFile(path).metadata.keys() & values.keys()
    for key, value in values.items():
        if key in there:
            fill_reserved(path, key, value)
