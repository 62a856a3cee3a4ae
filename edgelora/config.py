"""Settings of a training run, checked when they are made."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class TrainConfig(BaseModel):
    """What `edgelora train` does. Unknown settings are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    base: Path
    data: Path
    out: Path
    valid: Path | None = None
    """Held-out rows: their loss is measured at the end."""
    method: Literal["lora"] = "lora"
    rank: int = Field(16, ge=1, le=1024)
    alpha: float = Field(32.0, gt=0)
    learning_rate: float = Field(1e-3, gt=0, lt=1)
    """At the peak. 1e-3 is for models under a billion weights: ten times what is usual for full fine-tuning
    (LoRA Without Regret, Thinking Machines 2025, found that factor across sizes)."""
    epochs: float = Field(2.0, gt=0)
    batch_rows: int = Field(8, ge=1)
    """Rows for each optimizer step; the loss is the mean over all their tokens to learn."""
    micro_batch_tokens: int = Field(768, ge=16)
    """Rows are packed into pieces of about this many tokens; memory grows with it, little else does."""
    max_length: int = Field(1024, ge=8)
    warmup_steps: int = Field(10, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    base_dtype: Literal[
        "auto", "blocks", "nf4", "f32", "f16", "bf16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0",
        "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs",
    ] = "auto"  # fmt: skip
    """How the frozen weights are held: `blocks` as the file stores them, dequantized on use; or turned on opening into
    floats, NF4 or a type of llama.cpp's."""
    chat_template: str | None = None
    """For a base that has no chat template: `chatml`, or the path of a Jinja file. It travels with the adapter."""
    seed: int = Field(0, ge=0)
    overwrite: bool = False
