"""The side of transformers and PEFT in a plain loop, each batch padded to its longest row, as people write it.

`precision`: `bf16` loads the weights in bfloat16 (PEFT keeps its adapter in float32), `autocast` keeps them in float32
under torch.autocast, `f32` does neither, `nf4` is QLoRA by bitsandbytes as its guide has it (with recomputation, which
`prepare_model_for_kbit_training` turns on). `onednn` turns on the switch that makes float32 products fast on AMD.
"""

from __future__ import annotations

import json
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, set_seed

from edgelora.data.encode import Example
from peers.channel import Turnstile
from peers.data import ALPHA, LEARNING_RATE, MAX_GRAD_NORM, RANK, batches, load, share


def build(folder: Path, precision: str) -> Any:
    """The model with a fresh LoRA on all linear layers."""
    if precision == "nf4":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=quantization, device_map={"": "cpu"}, dtype=torch.bfloat16
        )
        model = prepare_model_for_kbit_training(model)
    else:
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model.config.use_cache = False
    lora = LoraConfig(
        r=RANK, lora_alpha=int(ALPHA), lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return get_peft_model(model, lora).train()


def collate(rows: list[Example]) -> dict[str, torch.Tensor]:
    """Padded to the longest row; padding and the prompt have no loss."""
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    seen, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for i, row in enumerate(rows):
        n = len(row)
        ids[i, :n], seen[i, :n] = torch.from_numpy(row.input_ids), 1
        labels[i, :n] = torch.from_numpy(np.where(row.loss_mask, row.input_ids, -100))
    return {"input_ids": ids, "attention_mask": seen, "labels": labels}


def main(settings: dict[str, Any], turn: Turnstile) -> None:
    folder, precision = Path(settings["folder"]), settings["precision"]
    if settings["onednn"]:
        torch.set_float32_matmul_precision("medium")
    set_seed(settings["seed"] or 0)
    model = build(folder / settings["model"], precision)
    examples = load(folder / f"{settings['data']}.npz")
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)

    def casting() -> AbstractContextManager[Any]:
        return torch.autocast("cpu", torch.bfloat16) if precision == "autocast" else nullcontext()

    turn.facts = {"precision": precision, "parameters": sum(p.numel() for p in parameters)}
    turn.handlers = {
        "held_out": lambda _: {"loss": _held_out(model, load(folder / "held_out.npz"))},
        "load": lambda asked: _load(_named(model), asked["adapter"]),
        "gradients": lambda asked: _gradients(model, examples, casting(), asked),
    }
    for number, rows in enumerate(batches(examples, settings["batch"], settings["seed"])):
        turn.begin()
        with casting():
            loss = model(**collate(rows)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * share(number, settings["total"])
        optimizer.step()
        optimizer.zero_grad()
        turn.end(tokens=sum(map(len, rows)))


@torch.no_grad()
def _held_out(model: Any, examples: list[Example]) -> float:
    """Mean −log p over all answer tokens, a row at a time."""
    model.eval()
    total = sum(float(model(**collate([e])).loss) * int(e.loss_mask[1:].sum()) for e in examples)
    model.train()
    return total / sum(int(e.loss_mask[1:].sum()) for e in examples)


def _named(model: Any) -> dict[str, torch.nn.Parameter]:
    """The adapter's parameters by the base's names of their modules."""
    return {
        name.removeprefix("base_model.model.").removesuffix(".default.weight"): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


@torch.no_grad()
def _load(named: dict[str, torch.nn.Parameter], adapter: str) -> dict[str, Any]:
    with np.load(adapter) as given:
        assert set(given.files) == set(named)
        for name, parameter in named.items():
            parameter.copy_(torch.from_numpy(given[name]))
    return {}


def _gradients(
    model: Any, examples: list[Example], casting: AbstractContextManager[Any], asked: dict[str, Any]
) -> dict[str, Any]:
    """Gradients of the first batch, into the file `to`."""
    with casting:
        loss = model(**collate(next(batches(examples, asked["batch"])))).loss
    loss.backward()
    grads = {name: parameter.grad for name, parameter in _named(model).items()}
    np.savez(asked["to"], **{name: grad.float().numpy() for name, grad in grads.items() if grad is not None})  # type: ignore[arg-type]
    model.zero_grad(set_to_none=True)
    return {}


if __name__ == "__main__":
    turnstile = Turnstile()
    main(json.loads(sys.argv[1]), turnstile)
