"""What stands between a file and llama.cpp: an adapter is read once, checked, tried, and loaded from that very memory.

The file is read into memory through one descriptor, and everything after looks at those bytes alone: what another
process does to the file meanwhile (cut short, it would kill whoever has it mapped) changes nothing of what is loaded.
What was found is kept by the file's digest, so the second load of a file costs reading it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from edgelora.base.model import Base
from edgelora.errors import AdapterError
from edgelora.files.adapter_check import contract_of, require_adapter, require_fit
from edgelora.files.contract import CONTRACT_KEY, Contract, fault_and_contract, read_contract, require_its_base
from edgelora.files.gguf import GGUFFile
from edgelora.files.soft_prompt import Prefix, SoftPrompt, is_soft, read_soft
from edgelora.files.whole import read_whole
from edgelora.home import cache_folder
from runtime.trial import try_adapter
from runtime.verdicts import Verdict, Verdicts, place_of

MOST_BYTES = 1 << 30  # of an adapter whose base is smaller than that


@dataclass(frozen=True)
class Checked:
    """An adapter that may be loaded: `Lora(model, checked.path, checked.content)`. Let go of it afterwards: it holds
    the file's bytes."""

    path: Path
    digest: str
    """sha256 of the content, hexadecimal."""
    content: bytes = field(repr=False)
    base: Base
    """The base as the adapter was trained over it: with its chat template, where the base has none of its own."""
    contract: Contract | None = None
    """None in an adapter that was made elsewhere."""
    invocation: tuple[int, ...] = ()
    """aLoRA: active only after these tokens."""
    soft: SoftPrompt | Prefix | None = field(default=None, repr=False)
    """What stands before prompts, if it is such a file; then llama.cpp never sees the file itself."""

    @property
    def size_bytes(self) -> int:
        return len(self.content)

    @property
    def system(self) -> str | None:
        """The system message it was trained with."""
        return None if self.contract is None else self.contract.system

    @property
    def single_turn(self) -> bool:
        """It has only seen questions that stand alone."""
        return self.contract is not None and self.contract.single_turn


def preflight(path: Path, base: Base, *, allow_unverified: bool = False, cache: Path | None = None) -> Checked:
    """Check the GGUF adapter at `path` for the GGUF `base`, as far as it was not checked before.

    Frame, types, shapes, ranks, finite values and targets; the base it was trained on, which an adapter made elsewhere
    does not name (`allow_unverified`); and once in a throw-away process that it loads and computes.
    `cache`: where verdicts are kept, by default in the user's home.
    Raises AdapterError, one for all that is wrong with the file and its base, or FileFormatError; the process is never
    at risk.
    """
    held = partial(_held, path=path, base=base, allow_unverified=allow_unverified)
    verdicts = Verdicts(cache or cache_folder())
    content, digest = _read(path, base, verdicts)
    place = place_of(base.file.files)
    verdict, soft = verdicts.find(digest, place), None
    known = verdict is not None
    if verdict is None:
        file = GGUFFile(path, content)
        require_adapter(file)  # of what is none nothing more is said
        try:
            verdict, soft = _look(file, base)
        except AdapterError as fault:
            raise fault_and_contract(fault, path, lambda: contract_of(file), held) from None
    contract = None if verdict.contract is None else read_contract(verdict.contract, str(path))
    fitting = held(contract)
    if not known and soft is None:  # a soft prompt is floats alone; whoever loads it tries it
        try_adapter(path, content, base.path)
        verdicts.keep(digest, place, verdict)
    return Checked(path, digest, content, fitting, contract, verdict.invocation, soft)


def _read(path: Path, base: Base, verdicts: Verdicts) -> tuple[bytes, str]:
    """All bytes of a file as they were at one moment, and their sha256."""
    whole = read_whole(path, max(MOST_BYTES, 2 * base.file.size_bytes))
    digest = verdicts.digest(path, whole.state)
    if digest is None:
        digest = hashlib.sha256(whole.content).hexdigest()
        verdicts.keep_digest(path, whole.state, digest)
    return whole.content, digest


def _held(contract: Contract | None, path: Path, base: Base, *, allow_unverified: bool) -> Base:
    """`base` as the adapter at `path` was trained over it. Raises AdapterError if it was not."""
    fitting = base.as_trained(contract)
    require_its_base(contract, fitting.identity, path, base.path, allow_unverified=allow_unverified)
    return fitting


def _look(file: GGUFFile, base: Base) -> tuple[Verdict, SoftPrompt | Prefix | None]:
    """Everything that can be known of a file without llama.cpp."""
    if is_soft(file):
        soft = read_soft(file, base.architecture.gguf_name, base.config, base.context)
        return Verdict(file.get(CONTRACT_KEY, str), ()), soft
    shapes = {name: info.shape for name, info in base.file.tensors.items()}
    invocation = require_fit(file, base.architecture.gguf_name, shapes, base.config.vocab_size)
    return Verdict(file.get(CONTRACT_KEY, str), invocation), None
