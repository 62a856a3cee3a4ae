"""The side of TRL: its SFTTrainer with every default, besides the batch size and the LoRA that all sides have."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from peers.channel import Turnstile
from peers.data import ALPHA, RANK

ENDLESS = 100_000  # steps; the benchmark ends the process


def main(settings: dict[str, Any], turn: Turnstile) -> None:
    from datasets import load_dataset
    from peft import LoraConfig
    from torch.utils.data import SequentialSampler
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    folder = Path(settings["folder"])
    rows = folder / "prompt_completion.jsonl"
    dataset = load_dataset("json", data_files=str(rows), split="train", cache_dir=str(folder / "datasets"))

    class Counted(SFTTrainer):  # type: ignore[misc]
        """Takes the rows in the order that all sides take them in, and counts tokens that are not padding."""

        tokens = 0

        def _get_train_sampler(self, *_: Any, **__: Any) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)

        def training_step(self, model: Any, inputs: Any, *args: Any, **given: Any) -> Any:
            self.tokens = int(inputs["attention_mask"].sum())
            return super().training_step(model, inputs, *args, **given)

    class Turns(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            turn.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            turn.end(tokens=trainer.tokens)

    config = SFTConfig(
        output_dir=str(folder / "trl"), per_device_train_batch_size=settings["batch"], max_steps=ENDLESS,
        report_to="none", save_strategy="no", use_cpu=True,  # without a GPU it asks for this
    )  # fmt: skip
    lora = LoraConfig(r=RANK, lora_alpha=int(ALPHA), target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = Counted(
        model=str(folder / settings["model"]), args=config, train_dataset=dataset, peft_config=lora, callbacks=[Turns()]
    )
    turn.facts = {
        "bf16": config.bf16, "gradient_checkpointing": config.gradient_checkpointing, "loss_type": config.loss_type,
        "weights": str(trainer.model.dtype),
    }  # fmt: skip
    trainer.train()


if __name__ == "__main__":
    turnstile = Turnstile()
    main(json.loads(sys.argv[1]), turnstile)
