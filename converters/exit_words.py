"""What is said of the doors of `exit_plan.py`: why one is shut, what stands behind one, and what to do instead."""

from __future__ import annotations

from collections.abc import Mapping

from converters.exit_facts import AdapterFacts, BaseFacts, Type
from edgelora.base import ggml
from edgelora.words import count

UNTIE = "edgelora untie BASE --out FILE"
UNTIED = f"`{UNTIE}` gives this base a head of its own, over which it leaves as an adapter"
CONVERT = "`edgelora convert` writes this checkpoint as the GGUF that it runs over: pass that as the base to export it"
NEAREST = "--svd-rank R writes the nearest LoRA of a rank"
OF_Q8_0 = "of Q8_0 that is a share of the largest of 32 numbers"
LAYERED = "it changes layers, and puts nothing before a prompt"


def no_weights(adapter: AdapterFacts) -> str:
    """Why nothing of it can be in a weight, if so."""
    return adapter.of_input or ("what stands before a prompt is no weight" if adapter.prompt_numbers else "")


def beyond_a_pair(adapter: AdapterFacts) -> str:
    """What it does beside adding B A; empty for a LoRA."""
    found = {
        "multiplies whole rows": adapter.scaled, "changes weights as a whole": adapter.whole,
        "puts other weights in the place of the base's": adapter.replaced,
        "changes biases": adapter.biases, "changes norms": adapter.norms,
    }  # fmt: skip
    return " and ".join(words for words, there in found.items() if there)


def why_patched(adapter: AdapterFacts, base: BaseFacts, becomes: Mapping[str, Type]) -> str:
    """Where in the base's own numbers this adapter goes; `becomes`: as what its tensors are stored."""
    goes = [f"factors of rows go into {'the weights' if base.floats else 'the scales of blocks'}"]
    floats = [words for words, there in (("biases", adapter.biases), ("norms", adapter.norms)) if there]
    found = [*(goes if adapter.scaled else []), *([f"{' and '.join(floats)} are floats"] if floats else [])]
    if adapter.replaced:
        found.append("what was trained whole stands in the place of the base's own")
    quantized = any(becomes[name] not in ggml.FLOATS for name in adapter.replaced)
    return f"{', '.join(found)}, and nothing {'else ' * quantized}is quantized again"


def notes_of_patched(
    adapter: AdapterFacts, base: BaseFacts, becomes: Mapping[str, Type], left: Mapping[str, object]
) -> tuple[str, ...]:
    """What whoever takes a patched base should know. What was measured, `PatchPlan.notes` says with its reasons."""
    by_type = becomes if adapter.becomes is None else {}
    widened = {name for name, kind in by_type.items() if kind != base.types[name]}
    notes = [
        f"stored as F16: {count(len(names), 'tensor')}, {why}"
        for names, why in (
            (widened - adapter.replaced, "whose type of blocks has no float16 scale"),
            (widened & adapter.replaced, "trained whole, of which blocks of that type would lose too much"),
        )
        if names
    ]
    if left:
        notes.append(
            "what is B A of it lies over the patched base as a LoRA, which comes and goes with that base alone"
        )
    return tuple(notes)


def note_of_ranks(pairs: Mapping[str, tuple[int, int, int]]) -> str:
    """What is said of a LoRA that has more ranks than matrices have directions: it is exact, and a waste. Empty: it has
    not. pairs: (d_out, d_in, r) of each B A."""
    beyond = {name: r / min(d_out, d_in) for name, (d_out, d_in, r) in pairs.items() if r > min(d_out, d_in)}
    if not beyond:
        return ""
    name = max(beyond, key=beyond.__getitem__)
    *shape, rank = pairs[name]
    others = f", and so with {len(beyond) - 1} more" if len(beyond) > 1 else ""
    return (
        f"rank {rank} is more than the {min(shape)} that {name} can hold{others}: it computes the same as with fewer, "
        f"which `edgelora export --svd-rank {max(map(min, pairs.values()))}` writes"
    )


def unloaded(adapter: AdapterFacts, base: BaseFacts) -> str:
    """Why llama.cpp would not load what becomes of the base, if so."""
    other = adapter.biases - base.own_biases - base.loaded_biases
    return f"llama.cpp loads no bias for {', '.join(sorted(other))} of this family" if other else ""


def instead(adapter: AdapterFacts) -> tuple[str, ...]:
    """What to do where no door is open."""
    if adapter.of_input:
        return ("score it in torch (`edgelora eval --in torch`), or train a LoRA (--method lora)",)
    if adapter.prefix:
        return ("train --method prompt_tuning, whose embeddings every family takes",)
    return ("train with --target-modules, so that only layers with biases that llama.cpp loads are changed",)
