"""The other side of each ratio: llama.cpp through llama_cpp's ctypes alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class Bare:
    """A context of its own over a model of its own."""

    def __init__(self, base: Path, threads: int, n_ctx: int = 2048) -> None:
        # not llama_cpp: whoever loads libgomp first says how long its threads spin, and both sides should wait alike
        from runtime.binding.handle import C

        self.C = C
        self.model = C.llama_model_load_from_file(str(base).encode(), _without_gpu(C))
        settings = C.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch, settings.no_perf = n_ctx, 64, 64, True
        settings.n_threads = settings.n_threads_batch = threads
        self.context = C.llama_init_from_model(self.model, settings)
        self.memory = C.llama_get_memory(self.context)
        self.n_vocab = C.llama_vocab_n_tokens(C.llama_model_get_vocab(self.model))
        self.batch = C.llama_batch_init(64, 0, 1)

    def clear(self) -> None:
        self.C.llama_memory_clear(self.memory, True)

    def evaluate(self, tokens: list[int], first: int) -> int:
        """The likeliest token behind `tokens`, in pieces of 64."""
        import numpy as np

        batch = self.batch
        for start in range(0, len(tokens), 64):
            part = tokens[start : start + 64]
            batch.n_tokens = len(part)
            for i, token in enumerate(part):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, first + start + i, 1, 0
                batch.logits[i] = start + i == len(tokens) - 1
            assert self.C.llama_decode(self.context, batch) == 0
        return int(np.ctypeslib.as_array(self.C.llama_get_logits(self.context), shape=(self.n_vocab,)).argmax())

    def load(self, path: Path) -> Any:
        return self.C.llama_adapter_lora_init(self.model, str(path).encode())

    def attach(self, lora: Any) -> None:
        import ctypes

        pointers, scales = (self.C.llama_adapter_lora_p_ctypes * 1)(lora), (ctypes.c_float * 1)(1.0)
        assert self.C.llama_set_adapters_lora(self.context, pointers, 1, scales) == 0


def _without_gpu(C: Any) -> Any:
    settings = C.llama_model_default_params()
    settings.n_gpu_layers = 0
    return settings
