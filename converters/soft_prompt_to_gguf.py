"""A trained soft prompt or prefix → a GGUF that `runtime/` puts before prompts. Imports no torch.

HF and llama.cpp do not scale the embeddings of the same families: a file holds what llama.cpp must be given. Of a
prefix the keys move as the rows of k_proj do; they stay as attention read them, rotated or not.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

from converters.metadata import put_contract, write_whole
from edgelora.architectures.names import gguf_row_order
from edgelora.base.model import Base
from edgelora.files.soft_prompt import (
    BASE_LOGITS,
    EMBEDDINGS,
    KEYS,
    LOGITS,
    PREFIX,
    SOFT_PROMPT,
    TOKENS,
    VALUES,
    Reference,
)  # fmt: skip
from edgelora.peft.soft_prompt import TrainedPrompt


def write_soft_prompt_gguf(
    out: Path, prompt: TrainedPrompt, base: Base, name: str, reference: Reference | None = None
) -> None:
    """Write the GGUF to `out` (a staged path), with a reserved place for the certificate.

    reference: what a prefix, and only that, is tested with before it is used.
    """
    writer = gguf.GGUFWriter(out, base.architecture.gguf_name)
    writer.add_type("adapter")
    writer.add_name(name)
    writer.add_string("adapter.type", PREFIX if prompt.embeddings is None else SOFT_PROMPT)
    put_contract(writer, prompt.contract)
    for tensor, values in _tensors(prompt, base, reference).items():
        writer.add_tensor(tensor, np.ascontiguousarray(values))
    write_whole(writer)


def _tensors(prompt: TrainedPrompt, base: Base, reference: Reference | None) -> dict[str, np.ndarray]:
    if prompt.embeddings is not None:
        architecture, factor = base.architecture, base.config.embedding_multiplier
        power = architecture.scales_embeds - architecture.llama_cpp.scales_embeds  # 1, 0 or -1
        return {EMBEDDINGS: prompt.embeddings * np.float32(factor**power)}
    assert prompt.keys is not None
    assert prompt.values is not None
    assert reference is not None
    found = {}
    for i, (keys, values) in enumerate(zip(prompt.keys, prompt.values, strict=True)):
        order = gguf_row_order(base.architecture, base.config, f"model.layers.{i}.self_attn.k_proj")
        rows = keys.reshape(len(keys), -1)  # (n, KV · d_head)
        found[KEYS.format(i)] = (rows if order is None else rows[:, order]).reshape(keys.shape)
        found[VALUES.format(i)] = values
    return {**found, TOKENS: reference.tokens, LOGITS: reference.logits, BASE_LOGITS: reference.base_logits}
