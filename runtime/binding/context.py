"""A context over a model: tokens in, logits out; sequences copied, cut, saved and restored."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType

from edgelora.errors import EngineError
from runtime.binding.handle import C, InC, last_words, refused
from runtime.binding.model import Lora, Model
from runtime.binding.watch import Product, Watch, ggml

UBATCH_TOKENS = 512  # one shape for every run: over a quantized base the numbers depend on it (DESIGN section 3)


@dataclass(frozen=True)
class Entry:
    """One token of a decode: which sequence, at which position, and whether its logits are wanted."""

    token: int
    position: int
    sequence: int
    wanted: bool


@dataclass(frozen=True)
class KeyValues:
    """How keys and values are kept (`F32`, `F16`, `Q8_0`, `Q4_0`) and attended to (None: as llama.cpp chooses)."""

    type: GGMLQuantizationType = GGMLQuantizationType.F16
    flash: bool | None = None


_FLASH = {
    None: C.LLAMA_FLASH_ATTN_TYPE_AUTO, True: C.LLAMA_FLASH_ATTN_TYPE_ENABLED, False: C.LLAMA_FLASH_ATTN_TYPE_DISABLED,
}  # fmt: skip
EXACT = KeyValues(GGMLQuantizationType.F32, flash=False)


class Context(InC):
    """A KV cache and compute buffers over a model: `n_sequences` independent sequences of `n_ctx` tokens each.

    `exact`: keys and values in float32 and no flash attention, which rounds them to float16; else as `kept` says.
    `watch` sees the steps of each decode; what it raises, the decode raises.
    """

    _kind, _fix = "context", "open a new one"

    def __init__(
        self, model: Model, *, n_ctx: int, n_sequences: int, threads: int, n_batch: int = 2048, exact: bool = False,
        kept: KeyValues = KeyValues(), watch: Watch | None = None,
    ) -> None:  # fmt: skip
        last_words.clear()
        params = C.llama_context_default_params()
        params.n_ctx = n_ctx * n_sequences
        params.n_batch = self.n_batch = max(n_batch, 32)
        params.n_ubatch = UBATCH_TOKENS
        params.n_seq_max = n_sequences
        params.n_threads = params.n_threads_batch = threads
        params.no_perf = True
        params.kv_unified = False
        kept = EXACT if exact else kept
        params.type_k = params.type_v = int(kept.type)
        params.flash_attn_type = _FLASH[kept.flash]
        self._fault: BaseException | None = None
        if watch is not None:
            ggml()
            params.cb_eval = self._callback = self._watched(watch)
        self.model, self.n_ctx, self.n_sequences = model, n_ctx, n_sequences
        self._handle = C.llama_init_from_model(model.handle, params)
        if not self._handle:
            raise refused(
                f"llama.cpp cannot make a context of {n_ctx} x {n_sequences} tokens", "ask for a smaller context"
            )
        self._memory = C.llama_get_memory(self._handle)
        self._batch = C.llama_batch_init(self.n_batch, 0, 1)

    def _watched(self, watch: Watch) -> Any:
        """`watch` as C calls it, where nothing may be raised."""

        @C.ggml_backend_sched_eval_callback  # type: ignore[untyped-decorator]
        def on_step(address: int, ask: bool, _: object) -> bool:
            try:
                return self._fault is None and watch(Product(address), ask)
            except BaseException as e:
                self._fault = e
                return False

        return on_step

    def set_threads(self, threads: int) -> None:
        C.llama_set_n_threads(self.handle, threads, threads)

    def set_adapters(self, adapters: Sequence[tuple[Lora, float]]) -> None:
        """Replace the whole set. It does not touch the KV: what may be reused is the caller's business."""
        n = len(adapters)
        if n:
            pointers = (C.llama_adapter_lora_p_ctypes * n)(*[lora.handle for lora, _ in adapters])
            scales = (ctypes.c_float * n)(*[scale for _, scale in adapters])
            code = C.llama_set_adapters_lora(self.handle, pointers, n, scales)
        else:
            code = C.llama_set_adapters_lora(self.handle, None, 0, None)
        if code != 0:
            raise refused("llama.cpp did not accept the set of adapters", "load them again")

    def clear(self) -> None:
        """Forget everything computed, in every sequence."""
        _ = self.handle
        C.llama_memory_clear(self._memory, True)

    def forget(self, sequence: int, position: int) -> None:
        """Forget `sequence` from `position` on."""
        _ = self.handle
        if not C.llama_memory_seq_rm(self._memory, sequence, position, -1):
            raise refused("llama.cpp could not drop a part of a sequence", "start the conversation anew")

    def copy(self, source: int, target: int) -> None:
        """Make `target` hold all that `source` holds. (A partial copy between sequences would abort the process.)"""
        _ = self.handle
        C.llama_memory_seq_cp(self._memory, source, target, -1, -1)

    def state_bytes(self, sequence: int) -> int:
        """What `save` would take."""
        return int(C.llama_state_seq_get_size(self.handle, sequence))

    def save(self, sequence: int) -> np.ndarray:
        """The keys and values of a sequence: uint8 (n,). Any context of this model with equal settings takes them."""
        state = np.empty(self.state_bytes(sequence), np.uint8)
        pointer = ctypes.byref(ctypes.c_uint8.from_buffer(state.data))  # numpy's own pointers are cyclic garbage
        if C.llama_state_seq_get_data(self.handle, pointer, state.nbytes, sequence) != state.nbytes:
            raise refused("llama.cpp could not save a sequence", "close other programs: memory may be short")
        return state

    def restore(self, sequence: int, state: np.ndarray) -> None:
        """Make `sequence` hold what was saved. It must be whole (its digest checked): llama.cpp takes some damaged
        ones. Raises EngineError, and leaves the sequence empty, where it is refused."""
        pointer = ctypes.byref(ctypes.c_uint8.from_buffer(state.data))  # numpy's own pointers are cyclic garbage
        if C.llama_state_seq_set_data(self.handle, pointer, state.nbytes, sequence) != state.nbytes:
            self.forget(sequence, 0)
            raise refused("llama.cpp did not take a saved sequence", "evaluate it again")

    def decode(self, entries: Sequence[Entry]) -> np.ndarray:
        """Evaluate tokens; returns float32 (n wanted, V), a view that the next decode overwrites."""
        if not 0 < len(entries) <= self.n_batch:
            raise EngineError(
                what=f"{len(entries)} tokens in one decode",
                why=f"this context takes 1 to {self.n_batch}",
                fix="send the prompt in smaller pieces",
            )
        batch, n_wanted = self._batch, 0
        batch.n_tokens = len(entries)
        for i, entry in enumerate(entries):
            batch.token[i], batch.pos[i] = entry.token, entry.position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, entry.sequence
            batch.logits[i] = entry.wanted
            n_wanted += entry.wanted
        self._run(batch)
        if not n_wanted:
            return np.empty((0, self.model.n_vocab), np.float32)
        return np.ctypeslib.as_array(C.llama_get_logits(self.handle), shape=(n_wanted, self.model.n_vocab))

    def evaluate(self, embeddings: np.ndarray, first: int, sequence: int) -> None:
        """Let a sequence hold what embeddings float32 (n, d) stand for, from the position `first` on.

        Of some families llama.cpp scales them, of others only those of tokens: see `LlamaCpp.scales_embeds`.
        """
        n, d = embeddings.shape
        if not 0 < n <= self.n_batch or d != self.model.n_embd:
            raise EngineError(
                what=f"{n} embeddings {d} wide in one decode",
                why=f"this context takes 1 to {self.n_batch}, {self.model.n_embd} wide",
                fix="send them in smaller pieces, to the base that they are for",
            )
        batch = C.llama_batch_init(n, d, 1)
        try:
            batch.n_tokens = n
            ctypes.memmove(batch.embd, np.ascontiguousarray(embeddings, np.float32).tobytes(), 4 * n * d)
            for i in range(n):
                batch.pos[i], batch.logits[i] = first + i, False
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            self._run(batch)
        finally:
            C.llama_batch_free(batch)

    def _run(self, batch: Any) -> None:
        code = C.llama_decode(self.handle, batch)
        if self._fault is not None:
            fault, self._fault = self._fault, None
            raise fault
        if code == 1:
            raise EngineError(
                what="the context is full",
                why=f"each conversation has room for {self.n_ctx} tokens",
                fix="start anew (/reset), or open with a larger --context",
            )
        if code != 0:
            raise refused(f"llama.cpp could not evaluate {batch.n_tokens} tokens (code {code})", "start anew")

    def close(self) -> None:
        if self._handle is not None:
            C.llama_batch_free(self._batch)
            C.llama_free(self._handle)
            self._handle = None
