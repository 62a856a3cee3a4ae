"""Put an adapter on a built decoder, and take it off again: `inject` → train → `collect`, or `attach` a trained one."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

from edgelora.errors import ConfigError
from edgelora.nn.decoder import Decoder
from edgelora.nn.linear import Delta, Weight
from edgelora.peft import vera_file
from edgelora.peft.adalora import AdaloraDelta
from edgelora.peft.adapter import Adapter, LoraPair
from edgelora.peft.dora import DoraDelta
from edgelora.peft.lora import LoraDelta
from edgelora.peft.methods import METHODS


def inject(
    decoder: Decoder,
    method: str,
    rank: int,
    alpha: float,
    seed: int,
    targets: Iterable[str] = (),
    original: Callable[[str], torch.Tensor] | None = None,
) -> list[torch.nn.Parameter]:
    """Give the linear layers a fresh delta; returns the parameters to train. Deterministic under `seed`.

    `targets`: the layers to adapt, by the ends of their names; none for all. Raises ConfigError if one fits no layer.
    `original`: a layer's weight before it was quantized, float32 (d_out, d_in), to be overwritten; without it a base is
    taken for its own.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = targeted(list(decoder.linears), tuple(targets))
    row = METHODS[method]
    adapted = {name: linear for name, linear in decoder.linears.items() if name in chosen}
    weights = [linear.weight for linear in adapted.values()]
    for linear in decoder.linears.values():
        linear.delta = None
    if row.together is not None:
        deltas = row.together(weights, rank, alpha, generator)
    elif row.from_original is not None and original is not None:
        deltas = [
            row.from_original(linear.weight, original(name), rank, alpha, generator) for name, linear in adapted.items()
        ]
    else:
        deltas = [row.fresh(weight, rank, alpha, generator) for weight in weights]
    for linear, delta in zip(adapted.values(), deltas, strict=True):
        linear.delta = delta
    return list(decoder.parameters())


def targeted(names: list[str], targets: tuple[str, ...]) -> set[str]:
    """The names that end in one of `targets` after a dot (PEFT's rule); all of them where there are no targets.

    Raises ConfigError if one fits no name.
    """
    fitting = {target: {n for n in names if n == target or n.endswith(f".{target}")} for target in targets}
    if unknown := [target for target, found in fitting.items() if not found]:
        there = sorted({name.rpartition(".")[2] for name in names})
        near = [n for target in unknown for n in difflib.get_close_matches(target, there, 1)]
        raise ConfigError(
            what=f"target_modules: no linear layer of this model is named {', '.join(unknown)}",
            why=f"its linear layers are {', '.join(there)}",
            fix=f"did you mean {', '.join(near)}?" if near else "name some of these, or none to adapt them all",
        )
    return set().union(*fitting.values()) if targets else set(names)


def adapter_config(decoder: Decoder, method: str, rank: int, alpha: float, base: str) -> dict[str, object]:
    """What PEFT's adapter_config.json says of the adapter on `decoder`."""
    adapted = [name for name, linear in decoder.linears.items() if linear.delta is not None]
    ends = {name.rpartition(".")[2] for name in adapted}
    row = METHODS[method]
    wider = row.file_ranks  # r and α by as much: α/r stays
    everywhere = all(name in adapted for name in decoder.linears if name.rpartition(".")[2] in ends)
    of_a_lora = {"lora_alpha": wider * alpha, "lora_dropout": 0.0, "use_rslora": False, "use_dora": False}
    deltas = {name: decoder.linears[name].delta for name in adapted}
    ranks = {name: len(delta.left()) for name, delta in deltas.items() if isinstance(delta, AdaloraDelta)}
    return {
        "peft_type": row.peft_type,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": wider * rank,
        "target_modules": sorted(ends if everywhere else adapted),
        "bias": "none",
        "inference_mode": True,
        **(of_a_lora if row.peft_type == "LORA" else {}),
        **({"rank_pattern": ranks} if ranks else {}),
        **row.settings,
    }


def collect(decoder: Decoder) -> dict[str, dict[str, np.ndarray]]:
    """What is saved of every linear layer, as numpy; what a VeRA's layers share is not copied for each."""
    return {
        name: {
            part: tensor.cpu().numpy() if part in vera_file.SHARED else tensor.cpu().numpy().copy()
            for part, tensor in linear.delta.tensors().items()
        }
        for name, linear in decoder.linears.items()
        if linear.delta is not None
    }


def kept_beside(decoder: Decoder) -> dict[str, torch.Tensor]:
    """What the adapter on `decoder` computes with beside its parameters, and a run must find again to go on with."""
    kept: dict[str, torch.Tensor] = {}
    for name, linear in decoder.linears.items():
        if isinstance(linear.delta, torch.nn.Module):
            trained = dict(linear.delta.named_parameters())
            state = linear.delta.state_dict()
            kept |= {f"{name}.delta.{key}": tensor for key, tensor in state.items() if key not in trained}
    return kept


def attach(decoder: Decoder, adapter: Adapter | None) -> None:
    """Make `adapter` what the decoder computes, in place of whatever was on it. None takes it off."""
    for name, linear in decoder.linears.items():
        linear.delta = None
        if adapter is not None and name in adapter.tensors:
            linear.delta = delta_of(adapter.pair(name), linear.weight)


def delta_of(pair: LoraPair, weight: Weight) -> Delta:
    """The pair as what a linear layer over `weight` computes."""
    a, b = torch.from_numpy(pair.a), torch.from_numpy(pair.b)
    if pair.magnitude is None:
        return LoraDelta(a, b, 1.0)
    return DoraDelta(a, b, 1.0, torch.from_numpy(pair.magnitude), weight)


@contextmanager
def without_adapter(decoder: Decoder) -> Iterator[None]:
    """In here every linear layer is the frozen one: the reference of a preference loss needs no second model."""
    linears = list(decoder.linears.values())
    deltas, noise = [linear.delta for linear in linears], decoder.noise
    try:
        decoder.noise = None
        for linear in linears:
            linear.delta = None
        yield
    finally:
        decoder.noise = noise
        for linear, delta in zip(linears, deltas, strict=True):
            linear.delta = delta
