"""How many numbers a run trains, holds beside those and keeps in its optimizer, from dimensions and settings alone."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from math import prod
from typing import NamedTuple

from edgelora.architectures.names import EMBEDDING, HEAD
from edgelora.config import TrainConfig
from edgelora.peft.inject import chosen
from edgelora.peft.methods import METHODS
from edgelora.peft.saved import Beside, beside
from edgelora.peft.targets import by_pattern
from edgelora.peft.virtual_tokens import shapes
from edgelora.training import galore
from edgelora.training.base_footprint import Model, Shape
from edgelora.training.where import where_of

MOMENTS = {"adamw": 8.0, "adamw8bit": 2.03, "lion": 4.0}  # bytes for each trained number


class Adapted(NamedTuple):
    """A linear layer with an adapter: (d_out, d_in), and the adapter's rank."""

    shape: Shape
    rank: int


@lru_cache(maxsize=8)  # a plan asks a hundred times, for lengths of one config
def adapted(model: Model, config: TrainConfig) -> Mapping[str, Adapted]:
    """Every linear layer that gets an adapter, by its HF name."""
    assert config.rank is not None
    shapes, where = model.layers.linears, where_of(config)
    names, _ = chosen(config.method, shapes, model.layers.norms, where)
    return {name: Adapted(shapes[name], by_pattern(where.rank_pattern, name, config.rank)) for name in names}


def trained_norms(model: Model, config: TrainConfig) -> list[str]:
    """The norms whose weights are trained, by their HF names."""
    row = METHODS[config.method]
    if row.rows or row.before is not None:
        return []
    return list(chosen(config.method, model.layers.linears, model.layers.norms, where_of(config))[1])


def most_adapted(model: Model, config: TrainConfig) -> list[Adapted]:
    """Those of the decoder layer whose adapters have the most ranks."""
    layers: dict[str, list[Adapted]] = {}
    for name, one in adapted(model, config).items():
        layers.setdefault(name.partition(".layers.")[2].partition(".")[0], []).append(one)
    return max(layers.values(), key=lambda of_one: sum(one.rank for one in of_one), default=[])


def trained_shapes(model: Model, config: TrainConfig) -> list[tuple[int, ...]]:
    """Of every tensor that is trained."""
    row, widths = METHODS[config.method], model.layers.norms
    if row.rows:
        n = len(config.train_tokens)
        return [(n, model.config.hidden_size)] * (1 if model.config.tie_word_embeddings else 2)
    if row.before is not None:
        return shapes(row, model.config, where_of(config).virtual)
    of_linears = [
        shape for name, one in adapted(model, config).items() for shape in row.trained(name, *one.shape, one.rank)
    ]
    whole = trained_whole(model, config)
    matrices = [model.matrices[f"{name}.weight"][0] for name in (*whole.linears, *whole.vocabularies)]
    biases = [model.matrices[f"{name}.weight"][0][:1] for name in whole.biases]
    return of_linears + [(widths[name],) for name in trained_norms(model, config)] + matrices + biases


def trained_whole(model: Model, config: TrainConfig) -> Beside:
    """What is trained beside the adapted layers as a whole, and norms: named layers, embedding and head, biases."""
    row, where = METHODS[config.method], where_of(config)
    if row.rows or row.before is not None:
        return Beside()
    return beside(row, model.layers, adapted(model, config), where)


def virtual_tokens(config: TrainConfig) -> int:
    """How many of them stand before every row."""
    return config.num_virtual_tokens if METHODS[config.method].before is not None else 0


def adapter_numbers(model: Model, config: TrainConfig) -> int:
    """How many numbers are trained."""
    return sum(map(prod, trained_shapes(model, config)))


def held_beside(model: Model, config: TrainConfig) -> int:
    """How many numbers the adapter holds beside those."""
    return METHODS[config.method].held * sum(one.rank * sum(one.shape) for one in adapted(model, config).values())


def optimizer_bytes(model: Model, config: TrainConfig) -> int:
    """What the optimizer keeps between steps: moments, or for Adafactor those of rows and columns."""
    if METHODS[config.method].projects:
        assert config.rank is not None
        projected, plain = trained_shapes(model, config), trained_whole(model, config).vocabularies
        moments = 0
        for name in plain:  # by plain AdamW
            projected.remove(model.matrices[f"{name}.weight"][0])
            moments += 2 * prod(model.matrices[f"{name}.weight"][0])
        return 4 * (moments + sum(galore.moments_of(shape, config.rank) for shape in projected))
    if config.optimizer != "adafactor":
        return int(MOMENTS[config.optimizer] * adapter_numbers(model, config))
    return 4 * sum(sum(shape) for shape in trained_shapes(model, config))  # a vector has one side


def trains_head(model: Model, config: TrainConfig) -> bool:
    """Whether all rows of the head are trained, which then are put together of two a slice at a time."""
    return (EMBEDDING if model.config.tie_word_embeddings else HEAD) in trained_whole(model, config).vocabularies
