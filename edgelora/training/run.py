"""One training run: base + rows → an adapter folder with its contract. What can be refused is refused first."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import torch

from edgelora.base.decoder import build_decoder
from edgelora.base.hold import choose_base_dtype
from edgelora.base.model import Base, open_base
from edgelora.config import TrainConfig
from edgelora.data.conversation import Conversation, common_system, read_conversations
from edgelora.data.encode import Example, encode_all
from edgelora.device import Choice, choose_device, choose_dtype, free_memory_bytes, peak_memory_bytes, physical_cores
from edgelora.files.contract import Contract, sha256_file
from edgelora.peft.adapter import Adapter, refuse_to_write, write_adapter
from edgelora.peft.inject import collect, inject
from edgelora.progress import OnProgress, silent
from edgelora.training.loop import Result, not_finite, train
from edgelora.versions import versions


@dataclass(frozen=True)
class Run:
    """What a run ended in."""

    out: Path
    result: Result
    choices: dict[str, Choice]
    n_rows: int
    n_steps: int
    seconds: float
    peak_bytes: int


def run_training(
    config: TrainConfig, on_progress: OnProgress = silent, on_choice: Callable[[str, Choice], None] = lambda *_: None
) -> Run:
    """Train and write the adapter to config.out (PEFT's format and `edgelora.json`).

    `on_choice` hears what was chosen and why, before the first step.

    Raises EdgeloraError for every fault of the input before the first step; writes nothing unless the run ends well.
    """
    started = time.perf_counter()
    config = _resolved(config)
    refuse_to_write(config.out, config.overwrite)
    base = open_base(config.base)
    if config.chat_template is not None:
        base = base.with_template(config.chat_template)
    data = config.data[0].path
    data_sha256 = sha256_file(data) if data.is_file() else ""
    rows = read_conversations(data)
    examples = _encode(rows, base, config)
    held_out = _encode(read_conversations(config.valid), base, config) if config.valid else []
    choices = {
        "device": choose_device(),
        "dtype": choose_dtype(),
        "base_dtype": choose_base_dtype(config.base_dtype, base, free_memory_bytes()),
    }
    for name, choice in choices.items():
        on_choice(name, choice)
    torch.set_num_threads(physical_cores())
    decoder = build_decoder(base, choices["base_dtype"].value)
    parameters = inject(decoder, config.method, config.rank, config.alpha, config.seed)
    result = train(decoder, parameters, examples, held_out, config, on_progress, peak_memory_bytes)
    if result.skipped_steps == len(result.losses):
        raise not_finite("in any step", config.learning_rate)
    run = Run(
        config.out, result, choices, len(examples), len(result.losses), time.perf_counter() - started,
        peak_memory_bytes(),
    )  # fmt: skip
    contract = _contract(config, base, run, data_sha256, rows)
    adapter = Adapter(peft_config(config, base, decoder.linears), collect(decoder), contract)
    write_adapter(config.out, adapter, overwrite=config.overwrite)
    return run


def _resolved(config: TrainConfig) -> TrainConfig:
    """Every setting that was left to us, chosen."""
    chosen = {"rank": 16, "alpha": 32.0, "learning_rate": 1e-3, "micro_batch_tokens": 768, "max_length": 1024}
    return config.model_copy(update={name: value for name, value in chosen.items() if getattr(config, name) is None})


def _encode(rows: Sequence[Conversation], base: Base, config: TrainConfig) -> list[Example]:
    longest = min(config.max_length, base.config.max_position_embeddings)
    return encode_all(rows, base.tokenizer, base.template, longest)


def peft_config(config: TrainConfig, base: Base, modules: Iterable[str]) -> dict[str, object]:
    """What PEFT's adapter_config.json says of this adapter."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base.path),
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted({name.rsplit(".", 1)[-1] for name in modules}),
        "bias": "none",
        "use_rslora": False,
        "inference_mode": True,
    }


def _contract(config: TrainConfig, base: Base, run: Run, data_sha256: str, rows: Sequence[Conversation]) -> Contract:
    """The contract of a fresh adapter: its base, how it was trained, and what it reached."""
    elsewhere = {"base", "data", "valid", "out", "overwrite", "method", "chat_template"}
    settings = config.model_dump(mode="json", exclude=elsewhere)
    return Contract(
        version=versions()["edgelora"],
        base=base.fingerprint,
        base_file=base.base_file,
        tokenizer_sha256=base.tokenizer.sha256,
        chat_template_sha256=base.template_sha256,
        chat_template=base.chosen_template,
        eog_ids=base.tokenizer.eog_ids,
        system=common_system(rows),
        single_turn=all(sum(m.role == "user" for m in row.messages) == 1 for row in rows),
        method=config.method,
        training={
            **settings,
            "template_date": date.today().isoformat() if base.template.tells_the_date else None,
            "data": {"name": config.data[0].path.name, "rows": run.n_rows, "sha256": data_sha256},
            "choices": {name: asdict(choice) for name, choice in run.choices.items()},
            "steps": run.n_steps,
            "skipped_steps": run.result.skipped_steps,
            "seconds": round(run.seconds, 1),
            "peak_bytes": run.peak_bytes,
            "tokens_per_s": round(run.result.tokens_per_s, 1),
        },
        evaluation={"held_out_loss_torch": run.result.held_out_loss, "last_loss": run.result.losses[-1]},
        versions=versions(),
    )
