"""The only file of this house that touches llama_cpp's ctypes: models, contexts, adapters. Every C answer is checked.

Each handle has one owner and one way to die (`close`); a closed handle raises EngineError. Nothing here knows prompts,
adapters' names or what may be reused: that is `engine.py`.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType

from edgelora.base.ggml import PIN, library_path
from edgelora.errors import EngineError
from runtime.ggml_tensor import F32, SIZE_BYTES, GGMLTensor
from runtime.openmp import bounded_spin

with bounded_spin():
    import llama_cpp as C

UBATCH_TOKENS = 512  # one shape for every run: over a quantized base the numbers depend on it (DESIGN section 3)
OBJECT_BYTES = 32  # what ggml keeps beside each tensor: sizeof(struct ggml_object)

_last_words: deque[str] = deque(maxlen=8)


@C.llama_log_callback  # type: ignore[untyped-decorator]
def _on_log(level: int, text: bytes, _: ctypes.c_void_p) -> None:
    if level in (3, 4):  # warnings and errors
        _last_words.append(text.decode("utf-8", "replace").strip())


C.llama_log_set(_on_log, ctypes.c_void_p(0))
C.llama_backend_init()


def _refused(what: str, fix: str) -> EngineError:
    return EngineError(what=what, why=" | ".join(_last_words) or "llama.cpp gave no reason", fix=fix)


@dataclass(frozen=True)
class Placement:
    """Where a model's weights are: layers on a GPU (-1: all), mapped from the file or copied, held from swapping."""

    gpu_layers: int = 0  # what exports were checked on; builds with Metal or CUDA would take the GPU unasked
    mmap: bool = True
    mlock: bool = False


class _InC:
    """What lies in C: it has one owner, and one way to die."""

    _kind: str
    _fix: str
    _handle: Any = None

    @property
    def handle(self) -> Any:
        if self._handle is None:
            raise EngineError(what=f"a closed {self._kind} was used", why="close() frees it", fix=self._fix)
        return self._handle


class Model(_InC):
    """A loaded GGUF model: weights and vocabulary.

    `repack`: copy weights into the order that this CPU multiplies fastest; without it all stay mapped from the file.
    """

    _kind, _fix = "model", "open it again"

    def __init__(
        self, path: Path, *, vocabulary_only: bool = False, repack: bool = True, placement: Placement = Placement()
    ) -> None:
        _last_words.clear()
        params = C.llama_model_default_params()
        params.vocab_only = vocabulary_only
        params.use_extra_bufts = repack
        params.n_gpu_layers = placement.gpu_layers
        params.use_mmap, params.use_mlock = placement.mmap, placement.mlock
        self._handle = C.llama_model_load_from_file(str(path).encode(), params)
        if not self._handle:
            raise _refused(
                f"{path}: llama.cpp cannot load it", "check the file with `edgelora doctor`, or export again"
            )
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
            raise _refused("llama.cpp could not tokenize a text", "check that the text is valid")
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


class Lora(_InC):
    """A loaded GGUF adapter of one model. The file must have passed `files.adapter_check`.

    `content`: its bytes as they were checked; then `path` is not opened, and nobody can change them in between.
    """

    _kind, _fix = "adapter", "load it again"

    def __init__(self, model: Model, path: Path, content: bytes | None = None) -> None:
        _last_words.clear()
        self.model = model
        if content is None:
            self._handle = C.llama_adapter_lora_init(model.handle, str(path).encode())
        else:
            with _as_file(content) as file:
                self._handle = C.llama_adapter_lora_init_from_file_ptr(model.handle, file)
        if not self._handle:  # a failed load is a NULL pointer object, never None
            raise _refused(f"{path}: llama.cpp cannot load this adapter", "export it again for this base")

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


class Product:
    """A step of the graph that llama.cpp is computing, as its eval callback shows it. Its end is the callback's end."""

    def __init__(self, address: int) -> None:
        self._node = ctypes.cast(address, ctypes.POINTER(GGMLTensor)).contents

    @property
    def operation(self) -> str:
        """`MUL_MAT`, `MUL_MAT_ID` (each token by experts of its own), `ADD` …"""
        return str(_ggml().ggml_op_name(self._node.op).decode())

    @property
    def weight(self) -> str:
        """The name of its first operand; several devices add their own: `CUDA0#blk.0.attn_k.weight#0`."""
        if not self._node.src[0]:
            return ""
        name: bytes = self._node.src[0].contents.name
        return (name.split(b"#")[1] if b"#" in name else name).decode("utf-8", "replace")

    def input(self) -> np.ndarray | None:
        """What the weight is multiplied with: float32 (n3, n2, n1, columns), a copy; None if it is not in float32."""
        return self._read(1, np.float32) if self._node.src[1].contents.type == F32 else None

    def experts(self) -> np.ndarray:
        """Which experts each token goes to, of a MUL_MAT_ID: int32 (T, k)."""
        ids: np.ndarray = self._read(2, np.int32)[0, 0]
        return ids

    def _read(self, operand: int, dtype: type) -> np.ndarray:
        pointer = self._node.src[operand]
        tensor = pointer.contents
        shape, strides = tuple(tensor.ne)[::-1], tuple(tensor.nb)[::-1]
        n_bytes = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) + np.dtype(dtype).itemsize
        raw = np.empty(n_bytes, np.uint8)
        _ggml().ggml_backend_tensor_get(pointer, raw.ctypes.data, 0, n_bytes)  # from whatever device it is on
        return np.ndarray(shape, dtype, raw, strides=strides)


Watch = Callable[[Product, bool], bool]
"""watch(step, ask): whether it wants this step (ask), then a look at it once it is computed (not ask)."""


@cache
def _ggml() -> ctypes.CDLL:
    """libggml-base, which llama.cpp has loaded. Raises EngineError if its tensors are not the ones known here."""
    library = ctypes.CDLL(str(library_path()))
    library.ggml_tensor_overhead.restype = ctypes.c_size_t
    library.ggml_op_name.restype = ctypes.c_char_p
    library.ggml_backend_tensor_get.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
    library.ggml_backend_tensor_get.restype = None
    if (found := library.ggml_tensor_overhead() - OBJECT_BYTES) != SIZE_BYTES:
        raise EngineError(
            what="this llama.cpp cannot be watched at work",
            why=f"its tensors take {found} bytes each, {SIZE_BYTES} are known here",
            fix=PIN,
        )
    return library


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


class Context(_InC):
    """A KV cache and compute buffers over a model: `n_sequences` independent sequences of `n_ctx` tokens each.

    `exact`: keys and values in float32 and no flash attention, which rounds them to float16; else as `kept` says.
    `watch` sees the steps of each decode; what it raises, the decode raises.
    """

    _kind, _fix = "context", "open a new one"

    def __init__(
        self, model: Model, *, n_ctx: int, n_sequences: int, threads: int, n_batch: int = 2048, exact: bool = False,
        kept: KeyValues = KeyValues(), watch: Watch | None = None,
    ) -> None:  # fmt: skip
        _last_words.clear()
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
            _ggml()
            params.cb_eval = self._callback = self._watched(watch)
        self.model, self.n_ctx, self.n_sequences = model, n_ctx, n_sequences
        self._handle = C.llama_init_from_model(model.handle, params)
        if not self._handle:
            raise _refused(
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
            raise _refused("llama.cpp did not accept the set of adapters", "load them again")

    def clear(self) -> None:
        """Forget everything computed, in every sequence."""
        _ = self.handle
        C.llama_memory_clear(self._memory, True)

    def forget(self, sequence: int, position: int) -> None:
        """Forget `sequence` from `position` on."""
        _ = self.handle
        if not C.llama_memory_seq_rm(self._memory, sequence, position, -1):
            raise _refused("llama.cpp could not drop a part of a sequence", "start the conversation anew")

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
            raise _refused("llama.cpp could not save a sequence", "close other programs: memory may be short")
        return state

    def restore(self, sequence: int, state: np.ndarray) -> None:
        """Make `sequence` hold what was saved. It must be whole (its digest checked): llama.cpp takes some damaged
        ones. Raises EngineError, and leaves the sequence empty, where it is refused."""
        pointer = ctypes.byref(ctypes.c_uint8.from_buffer(state.data))  # numpy's own pointers are cyclic garbage
        if C.llama_state_seq_set_data(self.handle, pointer, state.nbytes, sequence) != state.nbytes:
            self.forget(sequence, 0)
            raise _refused("llama.cpp did not take a saved sequence", "evaluate it again")

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
            raise _refused(f"llama.cpp could not evaluate {batch.n_tokens} tokens (code {code})", "start anew")

    def close(self) -> None:
        if self._handle is not None:
            C.llama_batch_free(self._batch)
            C.llama_free(self._handle)
            self._handle = None


class Candidates:
    """Room for one row of logits as samplers take it: they sort, cut and overwrite it. One serves all of a model."""

    def __init__(self, n_vocab: int) -> None:
        self._table = np.zeros(n_vocab, [("id", np.int32), ("logit", np.float32), ("p", np.float32)])
        assert self._table.itemsize == ctypes.sizeof(C.llama_token_data)
        self._data = self._table.ctypes.data_as(C.llama_token_data_p)
        self._ids = np.arange(n_vocab, dtype=np.int32)
        self.array = C.llama_token_data_array()

    def fill(self, row: np.ndarray, ids: np.ndarray | None = None) -> Candidates:
        """Hold the logits `row`, of every token or of `ids`."""
        table = self._table[: len(row)]
        table["id"] = self._ids if ids is None else ids
        table["logit"] = row
        self.array.data, self.array.size = self._data, len(row)
        self.array.selected, self.array.sorted = -1, False
        return self

    def forbid(self, tokens: Sequence[int]) -> None:
        """Leave no chance to `tokens`, before any sampler has sorted and while all tokens are there."""
        self._table["logit"][list(tokens)] = -np.inf

    def keep_possible(self) -> int:
        """Drop what has no chance left (-inf), before any sampler has sorted; returns how many stay."""
        table = self._table[: self.array.size]
        possible = table[np.isfinite(table["logit"])]
        self._table[: len(possible)] = possible
        self.array.size = len(possible)
        return len(possible)

    def possible(self) -> list[int]:
        """The tokens that have a chance, in the order they are held in."""
        table = self._table[: self.array.size]
        ids: list[int] = table["id"][np.isfinite(table["logit"])].tolist()
        return ids

    def likeliest(self) -> int:
        """The token of the largest logit."""
        table = self._table[: self.array.size]
        return int(table["id"][table["logit"].argmax()])


class SamplerChain(_InC):
    """llama.cpp's samplers in a row, the last of which picks a token. It holds what it needs of the past."""

    _kind, _fix = "sampler", "make a new one"

    def __init__(self, model: Model) -> None:
        _last_words.clear()
        self._model = model
        params = C.llama_sampler_chain_default_params()
        params.no_perf = True
        self._handle = C.llama_sampler_chain_init(params)
        if not self._handle:
            raise _refused("llama.cpp cannot make a chain of samplers", "close something: memory may be full")

    def add(self, name: str, *arguments: float) -> None:
        """Append `llama_sampler_init_<name>(*arguments)`. Nothing is checked in C: that is `sampling.py`."""
        self._append(name, getattr(C, f"llama_sampler_init_{name}")(*arguments))

    def add_bias(self, bias: Mapping[int, float]) -> None:
        entries = (C.llama_logit_bias * len(bias))(*[C.llama_logit_bias(*item) for item in bias.items()])
        self._append("logit_bias", C.llama_sampler_init_logit_bias(self._model.n_vocab, len(bias), entries))

    def add_dry(self, *arguments: float, breakers: Sequence[bytes]) -> None:
        """arguments: multiplier, base, allowed length, how many tokens back."""
        texts = (ctypes.c_char_p * len(breakers))(*breakers)
        sampler = C.llama_sampler_init_dry(self._model.vocabulary, *arguments, texts, len(breakers))
        self._append("dry", sampler)

    def _append(self, name: str, sampler: object) -> None:
        if not sampler:
            raise _refused(f"llama.cpp cannot make the sampler {name}", "check its settings")
        C.llama_sampler_chain_add(self.handle, sampler)  # which owns it from now on

    def pick(self, candidates: Candidates) -> int:
        """One of the candidates; not taken note of until `accept`."""
        array = candidates.array
        C.llama_sampler_apply(self.handle, ctypes.byref(array))
        if not 0 <= array.selected < array.size:
            raise _refused("llama.cpp picked no token", "check the settings of sampling")
        return int(array.data[array.selected].id)

    def accept(self, token: int) -> None:
        C.llama_sampler_accept(self.handle, token)

    def close(self) -> None:
        if self._handle is not None:
            C.llama_sampler_free(self._handle)
            self._handle = None


class GrammarSampler(_InC):
    """llama.cpp's state of a grammar (GBNF, rule `root`). The text must have passed `grammar.py`: C dies of some."""

    _kind, _fix = "grammar", "make a new one"

    def __init__(self, model: Model, gbnf: str) -> None:
        _last_words.clear()
        self._one = Candidates(1)
        self._handle = C.llama_sampler_init_grammar(model.vocabulary, gbnf.encode(), b"root")
        if not self._handle:
            raise _refused("llama.cpp cannot read the grammar", "check it against llama.cpp's grammars/README.md")

    def restrict(self, candidates: Candidates) -> None:
        """Leave no chance (-inf) to tokens that the grammar does not allow next."""
        C.llama_sampler_apply(self.handle, ctypes.byref(candidates.array))

    def allows(self, token: int) -> bool:
        self._one.fill(np.zeros(1, np.float32), np.array([token], np.int32))
        self.restrict(self._one)
        return self._one.keep_possible() == 1

    def accept(self, token: int) -> None:
        """Go on behind `token`, which must be allowed: C would abort the process."""
        C.llama_sampler_accept(self.handle, token)

    def close(self) -> None:
        if self._handle is not None:
            C.llama_sampler_free(self._handle)
            self._handle = None


def build() -> str:
    """Which llama.cpp this is: two that say the same compute the same."""
    return f"llama-cpp-python {C.__version__}, {system_info()}"


def system_info() -> str:
    """What llama.cpp was built with: AVX2, AVX512, Metal, CUDA …"""
    return str(C.llama_print_system_info().decode())
