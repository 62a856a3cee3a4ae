"""How the adapter of a report is live: in llama.cpp, patched into each base, or computed in torch. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from converters.exit_facts import AdapterFacts, BaseFacts, Type, facts_of_adapter, facts_of_base, facts_of_prompt
from converters.exit_plan import plan_exit
from converters.exit_words import NEAREST
from edgelora.base.model import Base
from edgelora.errors import EdgeloraError
from edgelora.peft.soft_prompt import is_trained_prompt, read_trained_prompt
from edgelora.pipeline.export import read_checked

# llama.cpp can run these, conversation by conversation; scores come of many side by side (runtime/scorer.py)
ASLEEP = "it acts from its invocation on, and answers are scored side by side in llama.cpp with the same weights"
BEFORE = "it stands before a prompt, where edgelora's engine puts it one conversation at a time; it is not scored there"


@dataclass(frozen=True)
class Live:
    """`way`: the one that `--ways live` means for this adapter. `why`: it is no LoRA that llama.cpp is scored with."""

    way: Literal["live", "patched", "torch"] = "live"
    why: str = ""
    leaves_lora: bool = False
    """Whether something of it lies over a patched base."""
    mergeable: bool = True
    facts: AdapterFacts | None = None
    """What it does; None of what was not read."""


def how_live(base: Base, adapter: Path, scale: float) -> Live:
    """Of an adapter folder over any GGUF of `base`; a GGUF adapter is llama.cpp's already.

    Raises nothing: what cannot be read is taken for a LoRA, and its cells say why it fails.
    """
    if adapter.is_file():
        return Live()
    try:
        facts = _facts(base, adapter)
    except EdgeloraError:
        return Live()
    found = plan_exit(facts, _as_gguf(facts_of_base(base)))
    mergeable, lora = "merged" in found.open, bool(facts.pairs)
    if facts.prompt_numbers or facts.waits:
        return Live("torch", BEFORE if facts.prompt_numbers else ASLEEP, mergeable=False, facts=facts)
    if "adapter" in found.open:
        return Live(mergeable=mergeable, facts=facts)
    why, _, _ = found.others["adapter"].partition(f"; {NEAREST}")
    if "patched" not in found.open:
        return Live("torch", why, mergeable=mergeable, facts=facts)
    if scale != 1.0:
        why = f"a base is patched with the whole adapter, and it was asked for at the scale {scale:g}"
        return Live("torch", why, lora, mergeable, facts)
    return Live("patched", why, lora, mergeable, facts)


def _facts(base: Base, adapter: Path) -> AdapterFacts:
    if is_trained_prompt(adapter):
        return facts_of_prompt(read_trained_prompt(adapter, base.config))
    read = read_checked(adapter, base, allow_unverified=True, may_wait=True, with_rows=True)
    return facts_of_adapter(read, base)


def _as_gguf(base: BaseFacts) -> BaseFacts:
    """Every cell is a GGUF, also where the base is a checkpoint: which doors are open rests on no other type."""
    return base if base.is_gguf else replace(base, types=dict.fromkeys(base.shapes, Type.F16))
