"""THE TABLE of what PEFT's LoraConfig can set, and what becomes of each here: a test holds it to PEFT's own fields.

Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

from edgelora.architectures.names import EMBEDDING, HEAD
from edgelora.peft.kind import PREFIX, WHOLE
from edgelora.peft.targets import fits

Fate: TypeAlias = Literal["read", "no matter", "refused"]


class Setting(NamedTuple):
    """What becomes of a setting, and why. `read`: the adapter is another function with it, and is read so. `no matter`:
    with these tensors it is the same function. `refused`: what the tensors say is not all that the adapter computes."""

    fate: Fate
    why: str


SETTINGS: dict[str, Setting] = {
    "peft_type": Setting("read", "which kind of adapter it is"),
    "r": Setting("read", "A must have it"),
    "lora_alpha": Setting("read", "the scale is α/r"),
    "use_rslora": Setting("read", "the scale is α/√r"),
    "rank_pattern": Setting("read", "A of some layers must have another rank"),
    "alpha_pattern": Setting("read", "some layers have another α"),
    "use_dora": Setting("read", "rows are brought to lengths"),
    "bias": Setting("read", "biases stand beside A and B"),
    "lora_bias": Setting("read", "B has a bias, which is scaled with it"),
    "modules_to_save": Setting("read", "whole tensors stand beside A and B"),
    "trainable_token_indices": Setting("read", "rows of some tokens stand beside A and B"),
    "alora_invocation_tokens": Setting("read", "it acts from there on"),
    "target_modules": Setting("read", "whether embedding or head are among them; else the tensors say where it is"),
    "init_lora_weights": Setting("read", "some starts were taken from the base's weights"),
    # -- said by the tensors, or of the way to them ----------------------------------------------------------------
    "exclude_modules": Setting("no matter", "the tensors say where it is"),
    "layers_to_transform": Setting("no matter", "the tensors say where it is"),
    "layers_pattern": Setting("no matter", "the tensors say where it is"),
    "ensure_weight_tying": Setting("no matter", "the tensors say whether embedding and head changed alike"),
    "fan_in_fan_out": Setting("no matter", "it says how the base keeps W; A and B are the same"),
    "lora_dropout": Setting("no matter", "nothing is dropped outside of training"),
    "eva_config": Setting("no matter", "how A began; the base keeps its weights"),
    "corda_config": Setting("no matter", "how A and B began; init_lora_weights says whether the base changed"),
    "lora_ga_config": Setting("no matter", "how A and B began; init_lora_weights says whether the base changed"),
    "loftq_config": Setting("no matter", "how A and B began; init_lora_weights says whether the base changed"),
    "velora_config": Setting("no matter", "what is kept for the gradient; outside of training it is a LoRA"),
    "monteclora_config": Setting("no matter", "what is drawn around A in training; outside of that it is a LoRA"),
    "megatron_core": Setting("no matter", "a name of a package, of use beside megatron_config alone"),
    "qalora_group_size": Setting("no matter", "of use beside use_qalora alone"),
    "runtime_config": Setting("no matter", "where it is computed; PEFT does not save it"),
    "task_type": Setting("no matter", "which class of PEFT's holds it"),
    "auto_mapping": Setting("no matter", "which class of transformers' holds it"),
    "peft_version": Setting("no matter", "who wrote it"),
    "base_model_name_or_path": Setting("no matter", "where its base was"),
    "revision": Setting("no matter", "which of its base's versions that was"),
    "inference_mode": Setting("no matter", "whether it goes on being trained"),
    # -- more than B A ---------------------------------------------------------------------------------------------
    "target_parameters": Setting("refused", "A and B are of the stacked experts of a mixture"),
    "layer_replication": Setting("refused", "layers of the base are there more than once"),
    "megatron_config": Setting("refused", "A and B are of layers that are split over machines"),
    "use_qalora": Setting("refused", "A looks at means of groups of x"),
    "use_bdlora": Setting("refused", "A or B are the blocks of a larger matrix"),
    "arrow_config": Setting("refused", "a router chooses among adapters for every token"),
    "kasa_config": Setting("refused", "it began by taking singular values from the base's weights"),
}

BEYOND_LORA = {name: setting.why for name, setting in SETTINGS.items() if setting.fate == "refused"}
IS_SET = " is set: "
OF_TRAINING = (".lora_velora_", ".lora_monteclora_sampler.")
"""In the names of tensors of which nothing is seen outside of training."""


def beyond_lora(settings: Mapping[str, Any]) -> list[str]:
    """What is said of the settings of an adapter_config.json under which A and B are not all of the adapter."""
    faults = [f"{name}{IS_SET}{why}" for name, why in BEYOND_LORA.items() if settings.get(name)]
    if settings.get("use_dora") and reaches_vocabulary(settings.get("target_modules")):
        faults.append(f"use_dora{IS_SET}lengths of the embedding's or the head's rows are not read here")
    return faults


def reaches_vocabulary(targets: object) -> bool:
    """Whether PEFT's target_modules, a list or one regular expression for whole names, has the embedding or the head
    among them."""
    names = (targets,) if isinstance(targets, str) else targets
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        return False
    try:
        return any(fits(names, module) for module in (EMBEDDING, HEAD))
    except re.error:
        return False


def with_whole_vocabulary(settings: Any, tensors: Collection[str]) -> Any:
    """The settings of an adapter_config.json; where the embedding or the head are whole in its file and nothing says
    that modules are, they say so: PEFT saves them without a word (`save_embedding_layers`), and computes with them."""
    if not isinstance(settings, dict) or settings.get("peft_type") != "LORA" or settings.get("modules_to_save"):
        return settings
    whole = [one.rpartition(".")[2] for one in (EMBEDDING, HEAD) if f"{PREFIX}{one}.{WHOLE}" in tensors]
    return {**settings, "modules_to_save": whole} if whole else settings
