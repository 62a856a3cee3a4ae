"""The contract of an adapter that no training run of ours has signed: what is known of it is the base it belongs to."""

from __future__ import annotations

from typing import Any

from edgelora.base.model import Base
from edgelora.files.contract import Contract
from edgelora.versions import versions


def contract_over(base: Base, method: str, **more: Any) -> Contract:
    """An adapter of this kind belongs to the file at hand; `more`: other fields of the contract."""
    held_to = base.identity
    return Contract(
        version=versions()["edgelora"],
        base=held_to.fingerprint,
        base_file=base.base_file,
        tokenizer_sha256=held_to.tokenizer_sha256,
        chat_template_sha256=held_to.chat_template_sha256,
        eog_ids=held_to.eog_ids,
        method=method,
        versions=versions(),
        **more,
    )
