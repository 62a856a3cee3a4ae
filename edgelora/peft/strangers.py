"""What is said of a tensor that no adapter here can have. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Collection

from edgelora.peft.lora_settings import IS_SET

EXPERTS = "of the experts of a mixture, which stay as they are here"
ROUTER = "of a mixture's router, which stays as it is here"
VOCABULARY = ("of the token embeddings", "of the head")

BEFORE = "stands before prompts, not in weights: `edgelora export` it"
NO_KIND = "is not read here"

ONE_MATRIX = (
    "this base has one matrix for both: `edgelora untie` writes one of it with two, over which this adapter runs"
)
THERE = "merge it where it was trained (PEFT's merge_and_unload), save that and `edgelora convert` it"

# What a tensor is that belongs to no linear layer of the decoder, by a part of its name. The first that fits.
NO_LINEAR = (
    (r"experts|_exps\b|switch_mlp|shared_expert", EXPERTS),
    (r"block_sparse_moe\.gate|mlp\.gate(\.|$)|ffn_gate_inp", ROUTER),
    (r"embed_tokens|embedding|token_embd|\bwte\b", VOCABULARY[0]),
    (r"lm_head|^output\.", VOCABULARY[1]),
    (r"norm", "of a norm"),
    (r"modules_to_save|original_module|base_layer", "a module that was trained as a whole"),
    (r"vision|visual|audio|multi_modal", "of the part of the model that sees or hears"),
    (r"bias", "a bias"),
)


def no_linear(name: str) -> str:
    """What is said of a tensor or module that is no linear layer's."""
    found = next((what for pattern, what in NO_LINEAR if re.search(pattern, name)), None)
    return f"{name} is {found}" if found else f"{name} is no linear layer of this model"


def why_and_fix(faults: Collection[str]) -> tuple[str, str]:
    """Why an adapter with these faults is refused, and what helps."""
    if any(fault.endswith((EXPERTS, ROUTER)) for fault in faults):
        return (
            "of a mixture edgelora adapts the layers around its experts, and without the rest this adapter would "
            "compute something else",
            f"{THERE}; or train the layers of attention alone (--target-modules q_proj --target-modules v_proj)",
        )
    if faults and all(fault.endswith(ONE_MATRIX) for fault in faults):
        return (
            "what it makes of embedding and head is not the same, and one matrix cannot be both",
            "write one with two, `edgelora untie BASE --out FILE`, and pass that as the base",
        )
    if any(fault.endswith(BEFORE) for fault in faults):
        return (
            "this works on the weights of layers, and it changes none",
            "`edgelora export BASE FOLDER --out FILE` writes what chat and generate take",
        )
    if any(fault.endswith(NO_KIND) for fault in faults):
        return (
            "what its tensors do to a layer is not known here",
            f"{THERE}; or `edgelora methods` lists what trains here",
        )
    if any(IS_SET in fault for fault in faults):
        return (
            "under these settings PEFT computes something else than its tensors say",
            f"{THERE}; or train a LoRA here (`edgelora train`)",
        )
    return (
        "the adapter was trained on another base model, by another method, or is damaged",
        "pass the base it was trained on, or train again on this one",
    )
