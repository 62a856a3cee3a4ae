"""Put an adapter on a built decoder, and take it off again: `inject` → train → `collect`, or `attach` a trained one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from edgelora.architectures.names import EMBEDDING, HEAD
from edgelora.errors import ConfigError
from edgelora.nn.decoder import Adaptable, Decoder
from edgelora.nn.linear import Delta, Linear
from edgelora.nn.vocabulary import Vocabulary
from edgelora.peft import alora, layernorm, vera_file
from edgelora.peft.adapter import INVOCATION, Adapter
from edgelora.peft.attached import delta_of
from edgelora.peft.dropout import DroppedDelta, bare
from edgelora.peft.kind import ROWS, WHOLE
from edgelora.peft.kinds import NATIVE_TYPE
from edgelora.peft.layernorm import NormDelta
from edgelora.peft.method import Method
from edgelora.peft.methods import METHODS
from edgelora.peft.saved import SavedDelta, beside, is_adapted, is_saved, layers_of, moved, put_beside, within
from edgelora.peft.strength import as_peft, require_taken, strengths
from edgelora.peft.targets import EVERYWHERE, Where, select, target_modules
from edgelora.peft.token_rows import given, put_rows
from edgelora.peft.virtual_tokens import prompt_config, put_before


def inject(
    decoder: Decoder,
    method: str,
    rank: int,
    alpha: float,
    seed: int,
    targets: Iterable[str] | Where = (),
    original: Callable[[str], torch.Tensor] | None = None,
) -> list[torch.nn.Parameter]:
    """Give the layers a fresh delta, or the decoder fresh virtual tokens; returns the parameters to train.
    Deterministic under `seed`.

    `targets`: the layers to adapt, by the ends of their names or all that `Where` can say; none for all that the method
    adapts (see `chosen`). Raises ConfigError for what fits no layer, or not this method.
    `original`: a layer's weight before it was quantized, float32 (d_out, d_in), to be overwritten; without it a base is
    taken for its own.
    """
    generator = torch.Generator().manual_seed(seed)
    linears, norms, row = decoder.linears, decoder.norms, METHODS[method]
    where = _where(targets)
    names, norm_names = chosen(method, linears, norms, where)
    adapted = {name: linears[name] for name in names}
    sizes = strengths(row, {name: linear.weight.shape for name, linear in adapted.items()}, where, rank, alpha)
    attach(decoder, None)
    if row.before is not None:
        put_before(decoder, row, where.virtual, seed)
        return list(decoder.parameters())
    if row.rows:
        put_rows(decoder, where.token_indices)
        return list(decoder.parameters())
    if row.together is not None:
        deltas = row.together([linear.weight for linear in adapted.values()], rank, alpha, generator)
    else:
        fresh = _fresh(row, sizes, generator, original)
        deltas = [fresh(name, linear) for name, linear in adapted.items()]
    for linear, delta in zip(adapted.values(), deltas, strict=True):
        if row.with_bias is not None and linear.bias is not None:
            row.with_bias(delta, linear)
        linear.delta = DroppedDelta(delta, where.lora_dropout) if where.lora_dropout else delta
    if where.alora_invocation_tokens:
        alora.wait(decoder, where.alora_invocation_tokens)
    for name in norm_names:
        norms[name].delta = layernorm.fresh(norms[name].weight, norms[name].shift)
    put_beside(decoder, row, beside(row, layers_of(decoder), names, where))
    return list(decoder.parameters())


def _fresh(
    row: Method,
    sizes: Mapping[str, tuple[int, float]],
    generator: torch.Generator,
    original: Callable[[str], torch.Tensor] | None,
) -> Callable[[str, Linear], Delta]:
    """What makes the delta of a layer, given its name; `sizes`: the rank and α of each."""
    if (from_original := row.from_original) is not None and original is not None:
        return lambda name, linear: from_original(linear.weight, original(name), *sizes[name], generator)
    return row.of_layer or (lambda name, linear: row.fresh(linear.weight, *sizes[name], generator))


def chosen(
    method: str, linears: Iterable[str], norms: Iterable[str], targets: Iterable[str] | Where = ()
) -> tuple[list[str], list[str]]:
    """Which linear layers and norms the method adapts. `targets` choose among the linear layers, and among the norms
    where a method adapts nothing else; norms that are saved whole are among them. Raises ConfigError for what fits no
    name."""
    row, where = METHODS[method], _where(targets)
    if row.before is not None or row.rows:
        require_taken(row, where)
        return [], []
    linears, norms = list(linears), [name for name in norms if row.norms or is_saved(name, where)]
    if not row.linears:
        return [], select(norms, where, "norm")
    if not where.target_modules and row.targets:
        own = tuple(end for end in row.targets if any(name.endswith(f".{end}") for name in linears))
        where = replace(where, target_modules=own)
    return _left(select(linears, where), where), norms


def _left(found: Sequence[str], where: Where) -> list[str]:
    """Those of these layers that are not saved whole. Raises ConfigError if none is left, or none that a target
    names."""
    left = [name for name in found if not is_saved(name, where)]
    both = [one for one in where.target_modules if _names(one, found) and not _names(one, left)]
    if both or not left:
        raise ConfigError(
            what=f"modules_to_save leaves no {' and no '.join(both) if left else 'layer'} to adapt",
            why="a layer is saved whole, or it is adapted",
            fix="name fewer of them there" + (", or leave them out of target_modules" if left else ""),
        )
    return left


def _names(end: str, layers: Iterable[str]) -> bool:
    return any(name == end or name.endswith(f".{end}") for name in layers)


def _where(targets: Iterable[str] | Where) -> Where:
    return targets if isinstance(targets, Where) else Where(tuple(targets))


def adapter_config(
    decoder: Decoder, method: str, rank: int, alpha: float, base: str, where: Where = EVERYWHERE
) -> dict[str, object]:
    """What PEFT's adapter_config.json says of the adapter on `decoder`, which `inject` put there with the same."""
    row, layers = METHODS[method], decoder.adaptable
    if row.before is not None:
        return prompt_config(decoder.config, row, where.virtual, base)
    deltas: dict[str, Any] = {name: layer.delta for name, layer in layers.items() if layer.delta is not None}
    if row.peft_type == "LORA":  # what else it trains it saves whole
        deltas = {name: bare(within(one.delta)) for name, one in decoder.linears.items() if is_adapted(one.delta)}
    targets = target_modules(deltas, layers)
    own: dict[str, object] = {}
    if row.ranked and row.peft_type != NATIVE_TYPE:
        own |= {"r": rank, "bias": where.bias}
    if row.peft_type == "LORA":
        own |= as_peft(row, deltas, where, rank, alpha)
    if row.drops:
        own[row.drops] = where.lora_dropout
    if where.alora_invocation_tokens:
        own[INVOCATION] = list(where.alora_invocation_tokens)
    if row.peft_type == NATIVE_TYPE:
        own["method"] = method
    if row.rows:
        own["token_indices"] = sorted(set(where.token_indices))
    return {
        "peft_type": row.peft_type,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "target_modules": targets,
        "inference_mode": True,
        **own,
        **row.more_settings(deltas, targets),
        **row.settings,
        **_saved(decoder, row, where),
    }


def _saved(decoder: Decoder, row: Method, where: Where) -> dict[str, object]:
    """PEFT's settings of what is trained whole beside a LoRA."""
    named = row.settings.get("modules_to_save")
    saved = [*(named if isinstance(named, list) else ()), *where.modules_to_save]
    found: dict[str, object] = {"modules_to_save": list(dict.fromkeys(saved))} if saved else {}
    if isinstance(decoder.model.embed_tokens.delta, SavedDelta) and decoder.config.tie_word_embeddings:
        found["ensure_weight_tying"] = True
    return found


def collect(decoder: Decoder) -> dict[str, dict[str, np.ndarray]]:
    """What is saved of every adapted layer, as numpy; what a VeRA's layers share is not copied for each."""
    found = {
        name: {
            part: tensor.cpu().numpy() if part in vera_file.SHARED else tensor.cpu().numpy().copy()
            for part, tensor in layer.delta.tensors().items()
        }
        for name, layer in decoder.adaptable.items()
        if layer.delta is not None
    }
    if {WHOLE, ROWS} & found.get(EMBEDDING, {}).keys() and decoder.config.tie_word_embeddings:
        found[HEAD] = found[EMBEDDING]  # as PEFT saves them
    return found


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
    decoder.before = decoder.awake = None
    for name, layer in decoder.adaptable.items():
        layer.delta = None
        if adapter is not None and name in adapter.tensors:
            if isinstance(layer, Linear):
                layer.delta = delta_of(adapter.change(name), layer.weight)
                if adapter.invocation:
                    layer.delta = alora.waiting(layer.delta)
            elif isinstance(layer, Vocabulary):
                some, device = adapter.token_rows.get(name), decoder.model.norm.weight.device
                whole = moved(name, layer.weight, [(adapter, 1.0)]).to(device) if some is None else None
                layer.delta = whole if some is None else given(*some, device)
            else:
                layer.delta = NormDelta(torch.from_numpy(adapter.norm(name)) + layer.shift, layer.shift)
    if adapter is not None and adapter.invocation:
        alora.wait(decoder, adapter.invocation)


@contextmanager
def without_adapter(decoder: Decoder) -> Iterator[None]:
    """In here every layer is the frozen one: the reference of a preference loss needs no second model."""
    layers: list[Adaptable] = list(decoder.adaptable.values())
    deltas, noise, before = [layer.delta for layer in layers], decoder.noise, decoder.before
    try:
        decoder.noise = decoder.before = None
        for layer in layers:
            layer.delta = None
        yield
    finally:
        decoder.noise, decoder.before = noise, before
        for layer, delta in zip(layers, deltas, strict=True):
            layer.delta = delta
