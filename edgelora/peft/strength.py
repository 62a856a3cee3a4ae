"""How strongly each layer is adapted: ranks, α and scales by layer, and what of PEFT's settings a method can take."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields
from typing import Any

from edgelora.errors import ConfigError
from edgelora.peft.around import NOTHING
from edgelora.peft.method import Method, pair
from edgelora.peft.methods import METHODS
from edgelora.peft.targets import Placed, Where, placed, require_ranks


def strengths(
    row: Method, shapes: Mapping[str, tuple[int, int]], where: Where, rank: int, alpha: float
) -> dict[str, Placed]:
    """What `row.fresh` is to be given for each of these layers of shape (d_out, d_in), all of them adapted.

    Raises ConfigError for settings that the method cannot take, patterns that fit nothing, ranks beyond a matrix.
    """
    require_taken(row, where)
    found = placed(shapes, where, rank, alpha)
    if row.peft_type in ("LORA", "GLORA") or row.shapes is pair:  # B A as large as W; others' ranks are another kind
        require_ranks(found, shapes, by_layer=_by_layer(row))
    if _by_root(row, where):  # a row scales by α/r: (α √r)/r is α/√r
        return {name: Placed(place.rank, place.alpha * math.sqrt(place.rank)) for name, place in found.items()}
    return found


def require_taken(row: Method, where: Where) -> None:
    """Raise ConfigError that names every setting of `where` that means nothing to this method, and who takes them."""
    faults = not_taken(row, where)
    if faults:
        others = [one.name for one in METHODS.values() if not not_taken(one, where)]
        raise ConfigError(
            what=f"{', '.join(faults)}: nothing that --method {row.name} could use",
            why="; ".join(dict.fromkeys(faults.values())),
            fix=f"leave it out, or take --method {', '.join(others)}" if others else "leave it out",
        )


def not_taken(row: Method, where: Where) -> dict[str, str]:
    """The settings of `where` that mean nothing to this method, and why."""
    lora, by_layer = row.peft_type == "LORA", _by_layer(row)
    alone = "it waits for its invocation, and they would not" if row.waits else "PEFT trains nothing whole beside it"
    asked = {
        "rank_pattern": (where.rank_pattern, by_layer, "its ranks are not each layer's own"),
        "alpha_pattern": (where.alpha_pattern, lora, "it has no α"),
        "use_rslora": (where.use_rslora, by_layer, "its scale is not α/r of a rank that stays"),
        "alora_invocation_tokens": (where.alora_invocation_tokens, row.waits, "it acts on every token"),
        "token_indices": (where.token_indices, row.rows, "it leaves the rows of all tokens as they are"),
        "bias": (where.bias != "none", lora and not row.waits, alone),
        "modules_to_save": (where.modules_to_save, lora and not row.waits, alone),
        "lora_dropout": (where.lora_dropout, row.drops, "x goes another way in it than through an A alone"),
    }
    faults = {name: why for name, (given, taken, why) in asked.items() if given and not taken}
    return faults | dict(_virtual_faults(row, where))


def _by_layer(row: Method) -> bool:
    """Whether each layer has a rank of its own, which stays."""
    return row.peft_type == "LORA" and row.around is NOTHING


def _virtual_faults(row: Method, where: Where) -> Iterator[tuple[str, str]]:
    """Settings of virtual tokens, or of layers beside them, for which the method has no use; and why."""
    for name, given in {
        "target_modules": where.target_modules, "exclude_modules": where.exclude_modules,
        "layers_to_transform": where.layers_to_transform,
    }.items():  # fmt: skip
        if given and (row.before is not None or row.rows):
            yield name, "it changes no layer"
    for one in fields(where.virtual):
        if getattr(where.virtual, one.name) != one.default and one.name not in row.virtual:
            yield one.name, "it trains no such thing"
    if "prefix_projection" in row.virtual:
        if where.virtual.prefix_projection and where.virtual.prompt_tuning_init not in (None, "random"):
            yield "prompt_tuning_init", "what a projection makes is no real token's"
        if where.virtual.encoder_hidden_size is not None and not where.virtual.prefix_projection:
            yield "encoder_hidden_size", "without --prefix-projection there is no encoder"


def as_peft(row: Method, names: Collection[str], where: Where, rank: int, alpha: float) -> dict[str, Any]:
    """r, lora_alpha, the patterns and the rest of a LoRA's adapter_config.json; `names`: of the adapted layers.

    The file's ranks may be wider than those that were trained: α grows so that the scale stays.
    """
    wider, by_root, sizes = row.file_ranks, _by_root(row, where), placed(names, where, rank, alpha)
    grown = math.sqrt(wider) if by_root else wider
    ranks = {name: wider * place.rank for name, place in sizes.items() if place.rank != rank}
    alphas = {name: grown * place.alpha for name, place in sizes.items() if place.alpha != alpha}
    return {
        "r": wider * rank,
        "lora_alpha": grown * alpha,
        "lora_dropout": where.lora_dropout,
        "use_rslora": by_root,
        "use_dora": False,
        **({"rank_pattern": ranks} if ranks else {}),
        **({"alpha_pattern": alphas} if alphas else {}),
    }


def _by_root(row: Method, where: Where) -> bool:
    """Whether it is left to us to scale by α/√r: rsLoRA's row does it itself."""
    return where.use_rslora and not row.settings.get("use_rslora")
