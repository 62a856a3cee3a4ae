"""THE TABLE of what adapters a folder may hold: their tensors, with shapes, and what these make of a layer. No torch.

PEFT's kinds are read and written exactly as PEFT does. Methods that PEFT lacks are of the type EDGELORA and say in
adapter_config.json which `method` they are; their tensors are called `base_model.model.MODULE.PART`.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

from edgelora.errors import AdapterError
from edgelora.peft import vera_file
from edgelora.peft.change import Change, LoraPair
from edgelora.peft.kind import BIAS, EMBEDDING_A, EMBEDDING_B, NORM, ROWS, WHOLE, Kind, Parts, Settings
from edgelora.peft.lora_settings import reaches_vocabulary
from edgelora.peft.of_input import Bottleneck, Mixture
from edgelora.peft.of_weight import InPlaceOf, TimesAndPlus, WhereNotZero
from edgelora.peft.targets import by_pattern

NATIVE_TYPE = "EDGELORA"
MAGNITUDE, SINGULAR = "lora_magnitude_vector", "lora_E"
LORA_BIAS = "lora_B.bias"
SAVED_BIASES = ("all", "lora_only")
LARGEST_NUMBER = 1e30  # beyond any α that float32 could still multiply by
# Starts that leave the base's weights alone; PiSSA, OLoRA, CorDA and LoftQ subtract from them.
STARTS_AT_THE_BASE = ("gaussian", "eva", "orthogonal", "mica")


# -- LoRA and what PEFT makes of it -------------------------------------------------------------------------------


def _lora(parts: Parts, settings: Settings, module: str) -> Change:
    """α/r (α/√r for rsLoRA), patterns included, goes into B. What is saved whole stands in the place of the base's."""
    whole, own = (parts.get(part) for part in (WHOLE, BIAS))
    pair, bias = None, None if own is None else InPlaceOf(own)
    if EMBEDDING_A in parts:  # ΔE = (B A)ᵀ
        parts = {"lora_A": parts[EMBEDDING_B].T, "lora_B": parts[EMBEDDING_A].T}
    if "lora_A" in parts:
        rank = len(parts["lora_A"])
        alpha = by_pattern(settings.get("alpha_pattern") or {}, module, settings["lora_alpha"])
        scale = np.float32(alpha / (rank**0.5 if settings.get("use_rslora") else rank))
        pair = LoraPair(parts["lora_A"], _times(scale, parts["lora_B"]), parts.get(MAGNITUDE))
        if LORA_BIAS in parts:
            added = _times(scale, parts[LORA_BIAS])
            return Change(pair, bias=added if own is None else InPlaceOf(own + added))
    return Change(pair, whole=None if whole is None else InPlaceOf(whole), bias=bias)


def _times(scale: np.float32, values: np.ndarray) -> np.ndarray:
    return values if scale == 1.0 else values * scale


def _adalora(parts: Parts, settings: Settings, _: str) -> Change:
    # as PEFT scales it: by the rank at the start, whatever is left of that
    scale = settings["lora_alpha"] / (settings["init_r"] + 1e-5)
    return Change(LoraPair(parts["lora_A"] * parts[SINGULAR], parts["lora_B"] * np.float32(scale)))


def _vera(parts: Parts, _: Settings, __: str) -> Change:
    return Change(LoraPair(*vera_file.factors_of(parts)))


def _lora_faults(settings: Settings) -> list[str]:
    rows = settings.get("trainable_token_indices") or {}
    tables = rows.items() if isinstance(rows, dict) else [("", rows)]
    said = [
        fault for name, ids in tables
        for fault in _ids_faults(f"trainable_token_indices{' of ' * bool(name)}{name}", ids)
    ]  # fmt: skip
    return _scale_faults(settings) + _pattern_faults(settings, "rank_pattern") + said


def _scale_faults(settings: Settings) -> list[str]:
    faults, start = [], settings.get("init_lora_weights", True)
    if isinstance(start, str) and start not in STARTS_AT_THE_BASE:
        faults.append(f"it began by changing the base's own weights (init_lora_weights: {start})")
    if not _is_number(settings.get("lora_alpha")):
        faults.append(f"lora_alpha is {settings.get('lora_alpha')}")
    return faults + _pattern_faults(settings, "alpha_pattern")


def _adalora_faults(settings: Settings) -> list[str]:
    r = settings.get("init_r")
    return [*([] if isinstance(r, int) and r > 0 else [f"init_r is {r}"]), *_scale_faults(settings)]


def _pattern_faults(settings: Settings, name: str) -> list[str]:
    patterns = settings.get(name) or {}
    if not isinstance(patterns, dict):
        return [f"{name} is no table of names and numbers"]
    faults = [f"{name}: {value} for {key}" for key, value in patterns.items() if not _is_number(value)]
    for key in patterns:
        try:
            re.compile(key)
        except re.error as e:
            faults.append(f"{name}: {key} is no regular expression ({e})")
    return faults


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST_NUMBER


# -- vectors ------------------------------------------------------------------------------------------------------


def _ia3(parts: Parts, _: Settings, __: str) -> Change:
    """Its shape says whether it multiplies what comes out (d_out, 1) or what goes in (1, d_in)."""
    factors = parts["ia3_l"]
    return Change(rows=factors[:, 0]) if factors.shape[1] == 1 else Change(columns=factors[0])


def _bias(parts: Parts, _: Settings, __: str) -> Change:
    return Change(bias=parts["bias"])


def _rows_faults(settings: Settings) -> list[str]:
    return _ids_faults("token_indices", settings.get("token_indices"))


def _ids_faults(name: str, ids: Any) -> list[str]:
    if isinstance(ids, list) and ids and all(isinstance(one, int) and one >= 0 for one in ids):
        return [] if len(set(ids)) == len(ids) else [f"{name} names a token twice: {ids}"]
    return [f"{name} is {ids}, expected token ids"]


def _no_linear(_: Parts, __: Settings, ___: str) -> Change:
    return Change()


# -- whole weights ------------------------------------------------------------------------------------------------


def _whole(parts: Parts, _: Settings, __: str) -> Change:
    return Change(whole=parts["delta"])


def _lors(parts: Parts, _: Settings, __: str) -> Change:
    return Change(whole=WhereNotZero(LoraPair(parts["lora_A"], parts["lora_B"])))


def _glora(parts: Parts, _: Settings, module: str) -> Change:
    """Of a bias c it makes c + E: what D ∘ c and W C would be, nothing here knows. Without its path A it is a LoRA."""
    if any(parts[part].any() for part in ("glora_C.X", "glora_C.Xd", "glora_D.X", *GLORA_ZEROS) if part in parts):
        raise AdapterError(
            what=f"{module}: glora_C or glora_D is not zero",
            why="what they make of a bias depends on the base's weights, and on the bias it has",
            fix="train it with --method glora, which saves the same as glora_E",
        )
    d_out, shift = len(parts["glora_A.Xd"]), parts.get("glora_E.X")
    times, plus = (LoraPair(parts[f"glora_{path}.Xu"], parts[f"glora_{path}.Xd"]) for path in "AB")
    bias = np.resize(shift, d_out) if shift is not None and shift.any() else None
    return Change(pair=plus, bias=bias) if times.is_nothing else Change(whole=TimesAndPlus(times, plus), bias=bias)


def _glora_faults(settings: Settings) -> list[str]:
    paths = settings.get("config_A_B", "lora")
    return [] if paths == "lora" else [f"config_A_B is {paths}, and lora is all that is read here"]


# -- what torch alone computes ------------------------------------------------------------------------------------


def _houlsby(parts: Parts, _: Settings, __: str) -> Change:
    return Change(of_input=Bottleneck(*(parts[f"adapter_{part}"] for part in "DdUu")))


def _molora(parts: Parts, _: Settings, __: str) -> Change:
    return Change(of_input=Mixture(LoraPair(parts["lora_A"], parts["lora_B"]), parts["router"]))


GLORA_ZEROS = {"glora_C.zeros": "in 1", "glora_D.zeros": "out", "glora_E.zeros": "out"}  # of a layer without a bias
PAIR = {"lora_A": "r in", "lora_B": "out r"}
_PAIR_ENDINGS = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}
LORA = Kind("plain LoRA", PAIR, _lora, endings=_PAIR_ENDINGS, faults=_lora_faults)
DORA = Kind("DoRA", {**PAIR, MAGNITUDE: "out"}, _lora, endings=_PAIR_ENDINGS, faults=_lora_faults)


@cache
def _lora_with(dora: bool, saves: bool, rows: bool, vocabulary: bool, biased: bool) -> Kind:
    """A LoRA or DoRA and what there is beside A and B of linear layers: whole tensors, rows of tokens, the same of
    embedding or head, biases of B."""
    plain = DORA if dora else LORA
    more = {"whole tensors": saves, "token rows": rows, "vocabulary": vocabulary, "biases": biased}
    beside = [words for words, there in more.items() if there]
    if not beside:
        return plain
    return replace(
        plain, title=f"{plain.title.removeprefix('plain ')} with {' and '.join(beside)}",
        norms=saves, vocabularies=saves or vocabulary, saves=saves, rows=rows, adds_bias=biased,
        # a bias of B before any other: of both names the end is the same
        optional=({LORA_BIAS: "out"} if biased else {}) | ({WHOLE: "out in", BIAS: "out"} if saves else {}),
        of_embedding={EMBEDDING_A: "r out", EMBEDDING_B: "in r"} if vocabulary else {},
        endings={**_PAIR_ENDINGS, BIAS: f"base_layer.{BIAS}", ROWS: f"token_adapter.{ROWS}"},
    )  # fmt: skip


KINDS: dict[str, Kind] = {
    "LORA": LORA,
    "ADALORA": Kind(
        "AdaLoRA", {**PAIR, SINGULAR: "r 1"}, _adalora,
        endings={part: f"{part}.weight" for part in (*PAIR, SINGULAR)}, faults=_adalora_faults,
    ),
    "VERA": Kind(
        "VeRA", {"vera_lambda_b": "out", "vera_lambda_d": "r", "vera_A": "r in", "vera_B": "out r"}, _vera
    ),
    "IA3": Kind("IA3", {"ia3_l": "out 1|1 in"}, _ia3),
    "GLORA": Kind(
        "GLoRA", {"glora_A.Xd": "out r", "glora_A.Xu": "r in", "glora_B.Xd": "out r", "glora_B.Xu": "r in"}, _glora,
        optional={
            "glora_C.X": "in 1", "glora_C.Xd": "in k", "glora_C.Xu": "k 1", "glora_D.X": "out|1", "glora_E.X": "out|1",
            **GLORA_ZEROS,
        },
        faults=_glora_faults,
    ),
    "TRAINABLE_TOKENS": Kind("trained token rows", {}, _no_linear, rows=True, faults=_rows_faults),
    "LN_TUNING": Kind("LayerNorm tuning", {}, _no_linear, norms=True, endings={NORM: "ln_tuning_layers.weight"}),
}  # fmt: skip
"""By PEFT's `peft_type`; a DoRA calls itself LORA, and so do those with whole tensors."""

NATIVE: dict[str, Kind] = {
    "bitfit": Kind("BitFit", {"bias": "out"}, _bias, adds_bias=True),
    "full": Kind("full fine-tuning", {"delta": "out in"}, _whole, norms=True, vocabularies=True),
    "galore": Kind("GaLore", {"delta": "out in"}, _whole, norms=True, vocabularies=True),
    "lorma_pi": Kind("LoRMA_π", {"delta": "out in"}, _whole),
    "lors": Kind("LoRS", PAIR, _lors),
    "houlsby": Kind(
        "Houlsby adapter", {"adapter_D": "r out", "adapter_d": "r", "adapter_U": "out r", "adapter_u": "out"}, _houlsby,
        of_input="it adds a small nonlinear network (gelu) behind layers, and no weight or LoRA of a GGUF can express "
        "that",
    ),
    "molora": Kind(
        "MoLoRA", {**PAIR, "router": "e in"}, _molora,
        of_input="its router weighs the experts anew for every token, and an adapter of llama.cpp has one weight",
    ),
}  # fmt: skip
"""By the `method` that an adapter_config.json of the type EDGELORA names."""


def kind_of(settings: Settings) -> Kind | None:
    """The kind that an adapter_config.json says it is; None: none that is read here."""
    peft_type = settings.get("peft_type")
    if peft_type == "LORA":
        dora, rows = bool(settings.get("use_dora")), bool(settings.get("trainable_token_indices"))
        vocabulary = not dora and reaches_vocabulary(settings.get("target_modules"))
        return _lora_with(dora, saves(settings), rows, vocabulary, bool(settings.get("lora_bias")))
    if peft_type == NATIVE_TYPE:
        return NATIVE.get(str(settings.get("method")))
    return KINDS.get(str(peft_type))


def saves(settings: Settings) -> bool:
    """Whether a LoRA's adapter_config.json says that biases or modules are saved whole beside A and B."""
    modules = settings.get("modules_to_save")
    named = isinstance(modules, list) and bool(modules) and all(isinstance(name, str) for name in modules)
    return named or settings.get("bias", "none") in SAVED_BIASES
