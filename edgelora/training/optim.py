"""Optimizers over named parameters: groups, learning rates, and a state that is kept and put back bit for bit."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from edgelora.architectures.names import EMBEDDING, HEAD
from edgelora.config import TrainConfig
from edgelora.errors import ConfigError, FileFormatError
from edgelora.peft.methods import METHODS
from edgelora.training import galore
from edgelora.training.adafactor import Adafactor
from edgelora.training.defaults import WHOLE_BESIDE
from edgelora.training.lion import Lion
from edgelora.training.offloaded_adamw import OffloadedAdamW
from edgelora.training.places import keep_gradients

BETA2 = {"adamw": 0.999, "adamw8bit": 0.999, "lion": 0.99}  # where the config leaves it open: each paper's own

SAVED = "delta"  # the parameter of a weight that is trained whole (`peft/full.py`)

Named = Iterable[tuple[str, nn.Parameter]]
Group = dict[str, Any]


def build_optimizer(named_parameters: Named, config: TrainConfig) -> Optimizer:
    """The optimizer of `config` over `decoder.named_parameters()`; config.learning_rate must have been chosen.

    Its groups differ in learning rate (`_ratio`) and in weight decay, which pulls matrices towards the base and would
    pull a vector, such as a DoRA's lengths, away from it.
    Raises ConfigError if the optimizer cannot run here.
    """
    assert config.learning_rate is not None
    _without_the_compiler()
    row, groups = METHODS[config.method], dict[tuple[float, float, bool], Group]()
    rank = config.rank or int(row.defaults.rank.value)
    scale = config.alpha or row.defaults.alpha(rank).value
    for name, parameter in named_parameters:
        projected = row.projects and parameter.dim() > 1 and not name.startswith((EMBEDDING, HEAD))
        # the learning rate is one that α is still to multiply, for all that GaLore trains
        ratio = scale if row.projects and not projected else _ratio(name, config)
        decay = config.weight_decay if parameter.dim() > 1 else 0.0
        rate = config.learning_rate * ratio
        group = groups.setdefault((ratio, decay, projected), {
            "params": [], "lr": rate, "initial_lr": rate, "weight_decay": decay,
            **({"projected": projected} if row.projects else {}),
        })  # fmt: skip
        group["params"].append((name, parameter))
    keep_gradients(parameter for group in groups.values() for _, parameter in group["params"])
    if row.projects:
        return galore.GaLore(groups.values(), rank, scale, config.update_proj_gap, _betas(config, "adamw"))
    return OPTIMIZERS[config.optimizer](list(groups.values()), config)


def require_optimizer(name: str, device: str) -> None:
    """Raise ConfigError if the optimizer cannot run on `device`."""
    if name != "adamw8bit":
        return
    if not device.startswith("cuda"):
        raise ConfigError(
            what="optimizer adamw8bit: there is no CUDA device in this run",
            why="it saves a graphics card's memory: moments in 8 bits, moved to the machine's own when space is short",
            fix="take --optimizer adamw, or adafactor where memory is short",
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            what="optimizer adamw8bit: bitsandbytes is not installed",
            why="its 8-bit kernels are an extra, for CUDA only",
            fix="pip install 'edgelora[cuda]', or take --optimizer adamw",
        )


def _ratio(name: str, config: TrainConfig) -> float:
    """Of the learning rate, that of a parameter: LoRA+'s for B, and its share for a matrix that is saved whole."""
    row, last = METHODS[config.method], name.rpartition(".")[2]
    if last in row.faster:
        return config.loraplus_ratio
    return WHOLE_BESIDE.value if row.peft_type == "LORA" and last == SAVED else 1.0


def set_share(optimizer: Optimizer, share: float) -> None:
    """Make `share` of its peak the learning rate of every group (see `schedule.share_at`)."""
    for group in optimizer.param_groups:
        group["lr"] = share * group["initial_lr"]


def clip(parameters: Sequence[nn.Parameter], max_norm: float) -> float:
    """Scale all gradients so that together they are no longer than `max_norm`; returns how long they were."""
    whole = _in_one(parameters)
    if whole is None:
        return float(nn.utils.clip_grad_norm_(parameters, max_norm))
    norm = torch.linalg.vector_norm(whole)
    whole.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))  # as torch does it
    return float(norm)


def _in_one(parameters: Sequence[nn.Parameter]) -> Tensor | None:
    """The tensor whose parts all gradients are (`nn/graphs.py`), if there is one, and it has no other parts."""
    grads = [parameter.grad for parameter in parameters]
    whole = None if grads[0] is None else grads[0]._base
    if whole is None or any(grad is None or grad._base is not whole for grad in grads):
        return None
    return whole if whole.numel() == sum(parameter.numel() for parameter in parameters) else None


def _betas(config: TrainConfig, optimizer: str) -> tuple[float, float]:
    return config.beta1, BETA2[optimizer] if config.beta2 is None else config.beta2


# -- one function for each optimizer ------------------------------------------------------------------------------


class AdamW(torch.optim.AdamW):
    """torch's own, whose wrapper of `step` imports torch's compiler: see `_without_the_compiler`."""

    step = torch.no_grad()(torch.optim.Adam.step.__wrapped__)  # type: ignore[attr-defined]


def _without_the_compiler() -> None:
    """torch's optimizers import its compiler to say that it shall leave them alone: 885 modules, 150 MB and 0.9 s
    before the first step. What they would be told is written down here beforehand."""
    for name in dir(Optimizer):
        raw = getattr(getattr(Optimizer, name), "__wrapped__", None)
        if raw is not None and not hasattr(raw, "__dynamo_disable"):
            setattr(raw, "__dynamo_disable", raw)  # torch._compile asks for this very name


def _adamw(groups: list[Group], config: TrainConfig) -> Optimizer:
    # fused: one pass over each tensor. foreach writes temporaries the size of all parameters between its passes.
    if config.offload:
        return OffloadedAdamW(groups, betas=_betas(config, "adamw"), fused=True)
    return AdamW(groups, betas=_betas(config, "adamw"), fused=True)


def _adamw8bit(groups: list[Group], config: TrainConfig) -> Optimizer:
    for device in {parameter.device.type for group in groups for _, parameter in group["params"]}:
        require_optimizer("adamw8bit", device)
    bitsandbytes = importlib.import_module("bitsandbytes.optim")  # where it is installed; it bears no types
    optimizer: Optimizer = bitsandbytes.PagedAdamW8bit(groups, betas=_betas(config, "adamw8bit"))
    return optimizer


def _adafactor(groups: list[Group], config: TrainConfig) -> Optimizer:
    assert config.learning_rate is not None
    return Adafactor(groups, config.learning_rate)


def _lion(groups: list[Group], config: TrainConfig) -> Optimizer:
    assert config.learning_rate is not None
    return Lion(groups, config.learning_rate, _betas(config, "lion"))


OPTIMIZERS: dict[str, Callable[[list[Group], TrainConfig], Optimizer]] = {
    "adamw": _adamw,
    "adamw8bit": _adamw8bit,
    "adafactor": _adafactor,
    "lion": _lion,
}


# -- the state in a checkpoint ------------------------------------------------------------------------------------


def flatten_state(optimizer: Optimizer) -> dict[str, Tensor]:
    """Everything that `optimizer` remembers, as `parameter name.key`: the tensors themselves, no copies.

    Step counters are 0-d: float32 where the optimizer keeps a tensor, int64 where it keeps a Python number. Learning
    rates are not in it, the schedule sets them anew.
    """
    if isinstance(optimizer, OffloadedAdamW):
        optimizer.wait()
    return {
        f"{name}.{key}": value.detach() if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.int64)
        for name, parameter in _named(optimizer)
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_state(optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `flatten_state` gave; the tensors are copied. Raises FileFormatError if it is another run's."""
    places = {name: i for i, (name, _) in enumerate(_named(optimizer))}
    state: dict[int, dict[str, Any]] = {}
    strangers = []
    for full, value in tensors.items():
        name, _, key = full.rpartition(".")
        if name not in places:
            strangers.append(full)
            continue
        number = value.dim() == 0 and value.dtype == torch.int64
        state.setdefault(places[name], {})[key] = int(value) if number else value.clone()
    if strangers:
        raise FileFormatError(
            what=f"the optimizer's state has {len(strangers)} tensors of parameters that are not trained here",
            why=f"the first is {strangers[0]}: it was kept by a run with other settings",
            fix="resume with the settings of that run, or start a new one",
        )
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    if getattr(optimizer, "is_paged", False):
        _page(optimizer)


def _page(optimizer: Any) -> None:
    """bitsandbytes loads its moments into the card's own memory: back into memory that it can move."""
    for parameter, state in optimizer.state.items():
        for key in ("state1", "state2"):
            state[key] = optimizer.get_state_buffer(parameter, dtype=state[key].dtype).copy_(state[key])


def _named(optimizer: Optimizer) -> Iterator[tuple[str, nn.Parameter]]:
    """In the order in which torch numbers the parameters of all groups."""
    for group in optimizer.param_groups:
        yield from zip(group["param_names"], group["params"], strict=True)
