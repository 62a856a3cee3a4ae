"""The 16-bit original of a quantized base, from which LoftQ takes its start: found, checked, and read by matrices.

The base may be a *residual* (`pipeline/residual.py`): what was quantized of the original without some of its ranks.
"""

from __future__ import annotations

from torch import Tensor

from edgelora.base.hold import FLOATS, hold
from edgelora.base.model import FLOAT_QUANTS, Base, open_base
from edgelora.config import TrainConfig
from edgelora.device import Choice
from edgelora.errors import ConfigError
from edgelora.files.adapter_check import contract_of
from edgelora.files.contract import SAME_WEIGHTS, SKETCH_TOLERANCE, Contract, differences
from edgelora.peft.methods import METHODS

RESIDUAL = "residual"  # the method that the contract of such a base names


def original_of(config: TrainConfig, base: Base) -> Base | None:
    """The model whose weights `config.method` starts from: `config.original`, or a base that is quantized on opening.

    None for a method that needs none. `config` is settled. Raises ConfigError if there is none, or it is no original of
    this base.
    """
    _require_ranks(config, base)
    if METHODS[config.method].from_original is None:
        if config.original is not None:
            raise ConfigError(
                what=f"--original {config.original}: {config.method} has no use for it",
                why="its adapter does not start at what quantization took away",
                fix="leave it out, or pass --method loftq",
            )
        return None
    if base.quant in FLOAT_QUANTS and config.base_dtype in ("blocks", *FLOATS):
        raise ConfigError(
            what=f"{base.path}: it is {base.quant}, and held as {config.base_dtype}: nothing is quantized",
            why=f"{config.method} starts at what quantization took away",
            fix="pass --base-dtype nf4 or another 4-bit type, or a quantized file of it with this one as --original; "
            "or --method lora",
        )
    if config.original is not None:
        original = open_base(config.original)
        require_original(original, base)
        return original
    if base.quant in FLOAT_QUANTS:
        return base
    raise ConfigError(
        what=f"--method {config.method} without --original: {base.path} is {base.quant}",
        why="the adapter starts at what quantization took away, the difference to the weights before it",
        fix="pass --original MODEL: the F16, BF16 or F32 model that the base was made from",
    )


def why_original(original: Base, base: Base, held: str) -> Choice:
    """Which original it is, for whoever reads of the run; held: how the base's weights are."""
    over = f"held as {held}" if original is base else f"as {base.quant}"
    name = original.path.resolve().name
    return Choice(f"{name} ({original.quant})", f"the adapter starts at what its weights lost {over}")


class Originals:
    """The weights of an original by the base's modules; each is read when it is asked for, and forgotten."""

    def __init__(self, original: Base) -> None:
        self._tensors = original.tensors

    def __call__(self, module: str) -> Tensor:
        """float32 (d_out, d_in), in memory of its own."""
        name = f"{module}.weight"
        weight = hold(self._tensors.matrix(name), "f32").dequantize()
        self._tensors.forget(name)
        return weight


def _residual(base: Base) -> Contract | None:
    """What a base says of the model that it is the rest of; None for one that is whole."""
    contract = contract_of(base.file) if base.is_gguf else None
    return contract if contract is not None and contract.method == RESIDUAL else None


def _require_ranks(config: TrainConfig, base: Base) -> None:
    """Raise ConfigError for a residual whose missing ranks the adapter of this run would not bring back."""
    rest = _residual(base)
    if rest is None:
        return
    missing, method = rest.training.get("rank", 0), METHODS[config.method]
    if method.from_original is None or config.target_modules or (config.rank or 0) < missing:
        raise ConfigError(
            what=f"{base.path}: {missing} ranks were taken out of each of its linear layers",
            why="an adapter over it must bring them back: it is no model by itself",
            fix=f"pass --method loftq --rank {missing} with the original, {rest.base_file.name}, as --original, and no "
            "--target-modules",
        )


def require_original(original: Base, base: Base) -> None:
    """Raise ConfigError unless `base` is `original` quantized, or what is left of it without some ranks."""
    rest = _residual(base)
    if original.quant not in FLOAT_QUANTS:
        raise ConfigError(
            what=f"--original {original.path}: it is {original.quant}",
            why="what quantization took away is the difference to weights that are not quantized themselves",
            fix="pass the F16, BF16 or F32 model that the base was made from",
        )
    wanted, quant = (base.fingerprint, base.quant) if rest is None else (rest.base, original.quant)
    if faults := differences(wanted, original.fingerprint, quant):
        raise ConfigError(
            what=f"--original {original.path} is not the original of {base.path}: " + "; ".join(faults),
            why="the adapter would start at the difference between two models",
            fix="pass the F16, BF16 or F32 model that the base was made from",
        )
    distance = base.fingerprint.distance(original.fingerprint)  # None or far, of a residual
    if distance is not None and distance <= SAME_WEIGHTS and base.quant not in SKETCH_TOLERANCE:
        raise ConfigError(
            what=f"--original {original.path}: its weights are those of {base.path}",
            why=f"they were {base.quant} before they were stored as {original.quant}, and nothing is lost between both",
            fix="pass the model that was quantized to the base, or --method lora",
        )
