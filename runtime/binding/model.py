"""A model, and adapters of it."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from edgelora.errors import EngineError
from runtime.binding.handle import C, InC, last_words, refused
from runtime.binding.samplers import Candidates


@dataclass(frozen=True)
class Placement:
    """Where a model's weights are: layers on a GPU (-1: all), mapped from the file or copied, held from swapping."""

    gpu_layers: int = 0  # what exports were checked on; builds with Metal or CUDA would take the GPU unasked
    mmap: bool = True
    mlock: bool = False


class Model(InC):
    """A loaded GGUF model: weights and vocabulary.

    `repack`: copy weights into the order that this CPU multiplies fastest; without it all stay mapped from the file.
    """

    _kind, _fix = "model", "open it again"

    def __init__(
        self, path: Path, *, vocabulary_only: bool = False, repack: bool = True, placement: Placement = Placement()
    ) -> None:
        last_words.clear()
        params = C.llama_model_default_params()
        params.vocab_only = vocabulary_only
        params.use_extra_bufts = repack
        params.n_gpu_layers = placement.gpu_layers
        params.use_mmap, params.use_mlock = placement.mmap, placement.mlock
        self._handle = C.llama_model_load_from_file(str(path).encode(), params)
        if not self._handle:
            raise refused(f"{path}: llama.cpp cannot load it", "check the file with `edgelora doctor`, or export again")
        self._vocabulary = C.llama_model_get_vocab(self._handle)
        self.n_vocab = int(C.llama_vocab_n_tokens(self._vocabulary))
        self.n_ctx_train = int(C.llama_model_n_ctx_train(self._handle))
        self.n_embd = int(C.llama_model_n_embd_inp(self._handle))

    @property
    def vocabulary(self) -> object:
        """llama.cpp's handle of it; it dies with the model."""
        _ = self.handle
        return self._vocabulary

    @cached_property
    def candidates(self) -> Candidates:
        """Room for a row of logits, for the samplers of all conversations: they run one at a time."""
        return Candidates(self.n_vocab)

    @cached_property
    def suppressed(self) -> tuple[int, ...]:
        """Tokens that its makers say must never be generated."""
        n = ctypes.c_int32(0)
        ids = C.llama_vocab_get_suppress_tokens(self.vocabulary, ctypes.byref(n))
        return tuple(ids[: n.value]) if ids else ()

    def tokenize(self, text: str, *, parse_special: bool) -> list[int]:
        """Text → ids as llama.cpp sees it, no BOS added."""
        raw = text.encode()
        out = (C.llama_token * (len(raw) + 8))()
        n = C.llama_tokenize(self._vocabulary, raw, len(raw), out, len(out), False, parse_special)
        if n < 0:
            raise refused("llama.cpp could not tokenize a text", "check that the text is valid")
        return list(out[:n])

    def piece(self, token: int) -> bytes:
        """The bytes of a token; empty for control tokens."""
        out = ctypes.create_string_buffer(256)
        n = C.llama_token_to_piece(self._vocabulary, token, out, len(out), 0, False)
        if n < 0:  # as long as it would have been
            out = ctypes.create_string_buffer(-n)
            n = C.llama_token_to_piece(self._vocabulary, token, out, len(out), 0, False)
        return out.raw[: max(n, 0)]

    def ends_generation(self, token: int) -> bool:
        return bool(C.llama_vocab_is_eog(self._vocabulary, token))

    def close(self) -> None:
        """Free the model. Contexts must be closed before; adapters die with it."""
        if self._handle is not None:
            C.llama_model_free(self._handle)
            self._handle = None


class Lora(InC):
    """A loaded GGUF adapter of one model. The file must have passed `files.adapter_check`.

    `content`: its bytes as they were checked; then `path` is not opened, and nobody can change them in between.
    """

    _kind, _fix = "adapter", "load it again"

    def __init__(self, model: Model, path: Path, content: bytes | None = None) -> None:
        last_words.clear()
        self.model = model
        if content is None:
            self._handle = C.llama_adapter_lora_init(model.handle, str(path).encode())
        else:
            with _as_file(content) as file:
                self._handle = C.llama_adapter_lora_init_from_file_ptr(model.handle, file)
        if not self._handle:  # a failed load is a NULL pointer object, never None
            raise refused(f"{path}: llama.cpp cannot load this adapter", "export it again for this base")

    def close(self) -> None:
        """Free the adapter. It must not be set on any context; a closed model has freed it already."""
        if self._handle is not None and self.model._handle is not None:
            C.llama_adapter_lora_free(self._handle)
        self._handle = None


@contextmanager
def _as_file(content: bytes) -> Iterator[int]:
    """A C `FILE *` that reads from memory. Raises EngineError where there is no room for it."""
    libc = ctypes.CDLL(None)
    libc.fmemopen.restype, libc.fmemopen.argtypes = ctypes.c_void_p, [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_char_p]
    libc.fclose.argtypes = [ctypes.c_void_p]
    file = libc.fmemopen(content, len(content), b"rb")
    if not file:
        raise EngineError("an adapter could not be read from memory", "fmemopen failed", "free some memory")
    try:
        yield file
    finally:
        libc.fclose(file)
