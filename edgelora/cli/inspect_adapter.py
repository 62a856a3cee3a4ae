"""What `edgelora inspect` shows of an adapter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from edgelora.cli.inspect_words import (
    Rows,
    ability_text,
    bad,
    certificate_text,
    contract_rows,
    layers_text,
    note,
    plain,
    si,
)
from edgelora.words import size

if TYPE_CHECKING:
    from edgelora.pipeline.inspect_adapter import AdapterFacts


def adapter_rows(facts: AdapterFacts) -> Iterator[Rows]:
    """Groups of lines, with an empty line between them."""
    yield _made_of(facts)
    yield _made_by(facts)
    yield ((label, ability_text(getattr(facts, label), facts.faults)) for label in ("export", "merge", "chat"))


def _made_of(facts: AdapterFacts) -> Rows:
    yield "path", plain(facts.path)
    for_family = f" for {facts.architecture}" if facts.architecture else ""
    yield "adapter", plain(f"{facts.kind}{for_family}, {facts.method}")
    for fault in facts.faults:
        yield "fault", bad(fault)
    types = ", ".join(share.type for share in facts.types) or "no tensors"
    yield "size", plain(f"{si(facts.parameters)} parameters in {types}, {size(facts.size_bytes)}")
    if facts.ranks:
        ranks = sorted(facts.ranks)
        span = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        yield "rank", plain(f"{span}{'' if facts.alpha is None else f', alpha {facts.alpha:g}'}")
    if facts.targets:
        yield "targets", plain(layers_text(facts.targets))


def _made_by(facts: AdapterFacts) -> Rows:
    if facts.contract is not None:
        yield from contract_rows(facts.contract)
    else:
        name = f"{facts.base}, by its own word" if facts.base else "it does not say which"
        yield "base", note(f"{name}: it has no contract")
    if facts.certificate is not None:
        yield "certificate", certificate_text(facts.certificate)
