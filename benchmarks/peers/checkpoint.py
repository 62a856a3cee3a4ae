"""Write the base as a Hugging Face folder in bfloat16, so that every side trains over the very same weights.

The model is SmolLM2-135M as the quickstart's GGUF holds it, dequantized; `width` 768 pads it with zeros to the same
function in rows that K-quants divide (see `step.py`).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from step import WIDTH, floats_of, padded

from edgelora.architectures.config import ModelConfig
from edgelora.architectures.names import EMBEDDING
from edgelora.base.model import Base, open_base
from edgelora.nn.frozen import Frozen


def write(gguf: Path, folder: Path, width: int | None) -> None:
    """`folder` with config.json, model.safetensors and the tokenizer's files."""
    base = open_base(gguf)
    architecture, config, frozen = floats_of(gguf)
    if width == WIDTH:
        config, frozen = padded(architecture, config, frozen)
    folder.mkdir(parents=True)
    save_file(_tensors(frozen), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(_config(base, config), indent=2) + "\n", encoding="utf-8")
    _write_tokenizer(base, folder)


def _tensors(frozen: Frozen) -> dict[str, torch.Tensor]:
    named = {f"{name}.weight": weight.dequantize() for name, weight in frozen.matrices.items()}
    named[f"{EMBEDDING}.weight"] = frozen.embedding.dequantize()
    return {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in (named | dict(frozen.vectors)).items()}


def _config(base: Base, config: ModelConfig) -> dict[str, object]:
    same = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "head_dim", "vocab_size", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings", "hidden_act",
    )  # fmt: skip
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16",
        "rope_theta": config.rope.theta, "bos_token_id": base.tokenizer.bos_id, "eos_token_id": base.tokenizer.eos_id,
        **{name: getattr(config, name) for name in same},
    }  # fmt: skip


def _write_tokenizer(base: Base, folder: Path) -> None:
    """tokenizer.json as SmolLM2 has it: digits one by one, then GPT-2's words, then merges of bytes."""
    tokenizer, vocabulary = base.tokenizer, base.vocabulary
    assert vocabulary.pre == "smollm"
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": i, "content": text, **flags} for text, i in sorted(tokenizer.control.items(), key=lambda t: t[1])]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    words = [{"type": "Digits", "individual_digits": True}, byte_level]
    model = {
        "type": "BPE", "vocab": {t: i for i, t in enumerate(vocabulary.tokens)}, "merges": list(vocabulary.merges),
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps({
        "version": "1.0", "added_tokens": added, "normalizer": None, "post_processor": None, "model": model,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": words}, "decoder": byte_level,
    }, ensure_ascii=False), encoding="utf-8")  # fmt: skip
    eos = tokenizer.text_of(tokenizer.eos_id)
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "GPT2Tokenizer", "bos_token": tokenizer.text_of(tokenizer.bos_id), "eos_token": eos,
        "pad_token": eos, "chat_template": base.template_source,
    }), encoding="utf-8")  # fmt: skip


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    write(Path(asked["gguf"]), Path(asked["folder"]), asked["width"])
