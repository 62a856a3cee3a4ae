"""What training whole weights asks for: floats, a rate, memory for moments, and a word on the size that it leaves."""

from __future__ import annotations

from math import prod

from edgelora.base.model import Base
from edgelora.config import TrainConfig
from edgelora.device import Choice
from edgelora.errors import ConfigError
from edgelora.peft.methods import METHODS
from edgelora.peft.remade import no_floats
from edgelora.training.adapter_footprint import adapted, adapter_numbers, trained_whole
from edgelora.training.base_footprint import Model, held_bytes
from edgelora.training.defaults import WHOLE_BESIDE
from edgelora.words import size

MOMENTS_SHARE = 0.25  # of the memory there is, beyond which AdamW's moments of whole weights are not taken unasked


def require_whole(config: TrainConfig, base: Base) -> None:
    """Raise ConfigError for a method that changes weights over any that are not held as floats, and for GaLore around
    another optimizer than Adam. `config` is settled."""
    if METHODS[config.method].projects and config.optimizer != "adamw":
        raise ConfigError(
            what=f"--optimizer {config.optimizer} with --method {config.method}",
            why="GaLore is an optimizer itself: AdamW over projected gradients",
            fix="leave it out; --method full trains the same weights with any optimizer",
        )
    if not METHODS[config.method].dense and not config.modules_to_save:
        return
    model = Model.of(base)
    whole, asked = trained_whole(model, config).linears, f"{config.method} --modules-to-save"
    layers = adapted(model, config) if METHODS[config.method].dense else {}
    for module in (*layers, *whole):
        (d_out, d_in), kind = model.matrices[f"{module}.weight"]
        if held_bytes((d_out, d_in), kind, config.base_dtype) < 2 * d_out * d_in:
            how = f"is {base.quant}" if config.base_dtype == "blocks" else f"is held as {config.base_dtype}"
            method = f"{asked} {module.rpartition('.')[2]}" if module in whole else config.method
            raise no_floats(method, f"{base.path} {how}")


def optimizer_of(config: TrainConfig, model: Model, budget: int | None) -> tuple[TrainConfig, dict[str, Choice]]:
    """The optimizer of full fine-tuning where none was asked for, by the bytes there are, and why; of others theirs."""
    row = METHODS[config.method]
    if not row.trains_weights or row.projects or "optimizer" in config.model_fields_set or budget is None:
        return config, {}
    moments = 8 * adapter_numbers(model, config)
    if moments <= MOMENTS_SHARE * budget:
        return config, {}
    why = (
        f"AdamW's moments of all weights would take {moments / 1e9:.2f} GB of {budget / 1e9:.1f} GB; Adafactor keeps "
        "those of rows and columns, and trained T5 so (arXiv:1804.04235, arXiv:1910.10683)"
    )
    return config.model_copy(update={"optimizer": "adafactor"}), {"optimizer": Choice("adafactor", why)}


def rate_of_whole(config: TrainConfig, model: Model) -> dict[str, Choice]:
    """At what rate the matrices learn that are trained whole beside A and B, and why; nothing where there are none."""
    whole = trained_whole(model, config)
    if METHODS[config.method].peft_type != "LORA" or not (whole.linears or whole.vocabularies):
        return {}
    assert config.learning_rate is not None
    return {"whole_learning_rate": Choice(f"{config.learning_rate * WHOLE_BESIDE.value:g}", WHOLE_BESIDE.why)}


def size_of(config: TrainConfig, model: Model) -> dict[str, Choice]:
    """How large the file will be that whole weights leave as, said before they are trained; of others nothing."""
    row, layers = METHODS[config.method], adapted(model, config)
    if not row.leaves_weights:
        return {}
    norms = model.layers.norms.values() if row.norms else ()
    matrices = [one.shape for one in layers.values()]
    matrices += [model.matrices[f"{name}.weight"][0] for name in trained_whole(model, config).vocabularies]
    numbers = sum(map(prod, matrices)) + sum(norms)
    why = f"what is added to {numbers / 1e6:.0f} million weights, float32; `edgelora merge` makes a model of it"
    return {"size": Choice(size(4 * numbers), why)}
