"""`export --rank`: a DyLoRA at one of its ranks, as a folder of its own, which leaves by every door."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgelora.base.model import open_base
from edgelora.errors import EdgeloraError
from edgelora.files.contract import contract_in
from edgelora.peft.adapter import write_adapter
from edgelora.peft.first_ranks import first_ranks, not_nested
from edgelora.peft.soft_prompt import is_trained_prompt
from edgelora.pipeline.export import read_checked


@contextmanager
def at_rank(base_path: Path, adapter_path: Path, rank: int, *, allow_unverified: bool = False) -> Iterator[Path]:
    """The folder of the adapter that the DyLoRA at `adapter_path` is at this rank, under its name; then it is gone.

    Whatever is made of it is held against torch over that folder: the model at this rank. Errors raised meanwhile name
    `adapter_path`.
    Raises ExportError for an adapter of another method and a rank beyond its own, and what `read_checked` raises.
    """
    if is_trained_prompt(adapter_path):
        raise not_nested(str(adapter_path), rank, contract_in(adapter_path))
    base = open_base(base_path)
    whole = read_checked(adapter_path, base, allow_unverified=allow_unverified, may_wait=True, with_rows=True)
    with tempfile.TemporaryDirectory(prefix="edgelora-rank-") as room:
        folder = Path(room) / adapter_path.resolve().name
        write_adapter(folder, first_ranks(whole, rank, str(adapter_path)))
        try:
            yield folder
        except EdgeloraError as e:
            what, why, fix = (text.replace(str(folder), str(adapter_path)) for text in (e.what, e.why, e.fix))
            raise type(e)(what, why, fix) from e
