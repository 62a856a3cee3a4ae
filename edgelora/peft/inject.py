"""Put an adapter on a built decoder, and take it off again: `inject` → train → `collect`, or `attach` a trained one."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from edgelora.errors import ConfigError
from edgelora.nn.decoder import Adaptable, Decoder
from edgelora.nn.linear import Delta, Linear
from edgelora.peft import ia3, layernorm, vera_file
from edgelora.peft.adalora import AdaloraDelta
from edgelora.peft.adapter import Adapter
from edgelora.peft.attached import delta_of
from edgelora.peft.kinds import NATIVE_TYPE
from edgelora.peft.layernorm import NormDelta
from edgelora.peft.methods import METHODS
from edgelora.peft.targets import target_modules


def inject(
    decoder: Decoder,
    method: str,
    rank: int,
    alpha: float,
    seed: int,
    targets: Iterable[str] = (),
    original: Callable[[str], torch.Tensor] | None = None,
) -> list[torch.nn.Parameter]:
    """Give the layers a fresh delta; returns the parameters to train. Deterministic under `seed`.

    `targets`: the layers to adapt, by the ends of their names; none for all that the method adapts (see `chosen`).
    Raises ConfigError if one fits no layer.
    `original`: a layer's weight before it was quantized, float32 (d_out, d_in), to be overwritten; without it a base is
    taken for its own.
    """
    generator = torch.Generator().manual_seed(seed)
    linears, norms, row = decoder.linears, decoder.norms, METHODS[method]
    names, norm_names = chosen(method, linears, norms, targets)
    adapted = {name: linears[name] for name in names}
    weights = [linear.weight for linear in adapted.values()]
    attach(decoder, None)
    deltas: Sequence[Delta]
    if row.together is not None:
        deltas = row.together(weights, rank, alpha, generator)
    elif row.from_original is not None and original is not None:
        deltas = [
            row.from_original(linear.weight, original(name), rank, alpha, generator) for name, linear in adapted.items()
        ]
    elif row.of_layer is not None:
        deltas = [row.of_layer(name, linear) for name, linear in adapted.items()]
    else:
        deltas = [row.fresh(weight, rank, alpha, generator) for weight in weights]
    for linear, delta in zip(adapted.values(), deltas, strict=True):
        linear.delta = delta
    for name in norm_names:
        norms[name].delta = layernorm.fresh(norms[name].weight, norms[name].shift)
    return list(decoder.parameters())


def chosen(
    method: str, linears: Iterable[str], norms: Iterable[str], targets: Iterable[str] = ()
) -> tuple[list[str], list[str]]:
    """Which linear layers and norms the method adapts. `targets` choose among the linear layers, and among the norms
    where a method adapts nothing else. Raises ConfigError if one fits no name."""
    row, asked = METHODS[method], tuple(targets)
    linears, norms = list(linears) if row.linears else [], list(norms) if row.norms else []
    names = linears or norms
    if not asked and row.targets:
        asked = tuple(end for end in row.targets if any(name.endswith(f".{end}") for name in names))
    among = targeted(names, asked, "linear layer" if linears else "norm")
    return [name for name in linears if name in among], [name for name in norms if linears or name in among]


def targeted(names: list[str], targets: tuple[str, ...], what: str = "linear layer") -> set[str]:
    """The names that end in one of `targets` after a dot (PEFT's rule); all of them where there are no targets.

    Raises ConfigError if one fits no name.
    """
    fitting = {target: {n for n in names if n == target or n.endswith(f".{target}")} for target in targets}
    if unknown := [target for target, found in fitting.items() if not found]:
        there = sorted({name.rpartition(".")[2] for name in names})
        near = [n for target in unknown for n in difflib.get_close_matches(target, there, 1)]
        raise ConfigError(
            what=f"target_modules: no {what} of this model is named {', '.join(unknown)}",
            why=f"its {what}s are {', '.join(there)}",
            fix=f"did you mean {', '.join(near)}?" if near else "name some of these, or none to adapt them all",
        )
    return set().union(*fitting.values()) if targets else set(names)


def adapter_config(decoder: Decoder, method: str, rank: int, alpha: float, base: str) -> dict[str, object]:
    """What PEFT's adapter_config.json says of the adapter on `decoder`."""
    row, layers = METHODS[method], decoder.adaptable
    deltas = {name: layer.delta for name, layer in layers.items() if layer.delta is not None}
    targets = target_modules(deltas, layers)
    wider = row.file_ranks  # r and α by as much: α/r stays
    ranks = {name: len(delta.left()) for name, delta in deltas.items() if isinstance(delta, AdaloraDelta)}
    own: dict[str, object] = {}
    if row.peft_type in ("LORA", "VERA"):
        own |= {"r": wider * rank, "bias": "none"}
    if row.peft_type == "LORA":
        own |= {"lora_alpha": wider * alpha, "lora_dropout": 0.0, "use_rslora": False, "use_dora": False}
    if row.peft_type == "IA3":
        own["feedforward_modules"] = [name for name in targets if name.endswith(ia3.FEED_FORWARD)]
    if row.peft_type == NATIVE_TYPE:
        own["method"] = method
    return {
        "peft_type": row.peft_type,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "target_modules": targets,
        "inference_mode": True,
        **own,
        **({"rank_pattern": ranks} if ranks else {}),
        **row.settings,
    }


def collect(decoder: Decoder) -> dict[str, dict[str, np.ndarray]]:
    """What is saved of every adapted layer, as numpy; what a VeRA's layers share is not copied for each."""
    return {
        name: {
            part: tensor.cpu().numpy() if part in vera_file.SHARED else tensor.cpu().numpy().copy()
            for part, tensor in layer.delta.tensors().items()
        }
        for name, layer in decoder.adaptable.items()
        if layer.delta is not None
    }


def kept_beside(decoder: Decoder) -> dict[str, torch.Tensor]:
    """What the adapter on `decoder` computes with beside its parameters, and a run must find again to go on with."""
    kept: dict[str, torch.Tensor] = {}
    for name, layer in decoder.adaptable.items():
        if isinstance(layer.delta, torch.nn.Module):
            trained = dict(layer.delta.named_parameters())
            state = layer.delta.state_dict()
            kept |= {f"{name}.delta.{key}": tensor for key, tensor in state.items() if key not in trained}
    return kept


def attach(decoder: Decoder, adapter: Adapter | None) -> None:
    """Make `adapter` what the decoder computes, in place of whatever was on it. None takes it off."""
    for name, layer in decoder.adaptable.items():
        layer.delta = None
        if adapter is not None and name in adapter.tensors:
            if isinstance(layer, Linear):
                layer.delta = delta_of(adapter.change(name), layer.weight)
            else:
                layer.delta = NormDelta(torch.from_numpy(adapter.norm(name)) + layer.shift, layer.shift)


@contextmanager
def without_adapter(decoder: Decoder) -> Iterator[None]:
    """In here every layer is the frozen one: the reference of a preference loss needs no second model."""
    layers: list[Adaptable] = list(decoder.adaptable.values())
    deltas, noise = [layer.delta for layer in layers], decoder.noise
    try:
        decoder.noise = None
        for layer in layers:
            layer.delta = None
        yield
    finally:
        decoder.noise = noise
        for layer, delta in zip(layers, deltas, strict=True):
            layer.delta = delta
