"""What one asks of a running model and what comes back: settings, requests, pieces of an answer. No llama.cpp here.

Whoever serves it (an engine in this process, a worker in a child) and whoever asks (the chat, `generate`, a server)
meet in these types alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from edgelora.data.conversation import Message
from edgelora.device import Choice

MAX_SCALE = 16.0  # of an adapter, either sign; 0 is the same as not attached
Prompt = str | Sequence[int] | Sequence[Message]
"""A text to continue, token ids, or a conversation to answer."""

Finish = Literal["stop", "length", "cancelled"]
"""The model or a stop string ended it; the token limit or the context did; whoever asked did."""


@dataclass(frozen=True)
class EngineConfig:
    """How a base is held in memory. What is None is measured or chosen at opening, with its reason."""

    context: int | None = None
    """Tokens of one conversation; None: 2048, or what the base has."""
    conversations: int = 1
    """How many are in work at once."""
    chunk: int | None = None
    """Prompts are evaluated in pieces cut at multiples of this many tokens, and reuse ends at such a cut: a warm and a
    cold run then have equal batch shapes, on which the numbers depend over a quantized base. None: 64 on a CPU, where
    larger pieces are at most 4 % faster (SmolLM2-135M, Q4_1), 512 with layers on a GPU."""
    threads: int | None = None
    gpu_layers: int = 0
    """Layers held on a GPU; -1: all."""
    flash_attention: Literal["auto", "on", "off"] = "auto"
    kv_type: Literal["f32", "f16", "q8_0", "q4_0"] = "f16"
    mmap: bool = True
    mlock: bool = False
    snapshot_bytes: int = 256 << 20
    """Of states kept in RAM for switching back, the least recently used dropped first."""
    snapshot_folder: Path | None = None
    """Where states also outlive the process; None: nowhere."""
    snapshot_folder_bytes: int = 2 << 30
    """Of that folder, the oldest files removed first."""
    hot_adapters: int = 0
    """How many sets of adapters have a context of their own: a switch re-reserves nothing, each costs its KV."""
    draft_tokens: int = 0
    """Guessed ahead from the prompt itself (prompt lookup); 0: none."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn, in llama.cpp's names and order. The defaults take the likeliest token."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repeat_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    penalty_last_n: int = 64
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = -1
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    mirostat: Literal[0, 1, 2] = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    seed: int = 0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    grammar: str | None = None
    """GBNF."""
    json_schema: Mapping[str, Any] | None = None
    logprobs: int | None = None
    """How many alternatives to report for each token, besides its own log-probability; None: neither."""


@dataclass(frozen=True)
class Request:
    """One question: `adapters` by name with their scales; none is the base alone."""

    prompt: Prompt
    adapters: Mapping[str, float] = field(default_factory=dict)
    sampling: Sampling = Sampling()
    max_tokens: int = 512


@dataclass(frozen=True)
class TokenLogprob:
    """log p (nats, of the model's own distribution before any sampler) of a token, and of the likeliest others."""

    token: int
    text: bytes
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """A part of an answer: whole characters, never the beginning of a stop string."""

    text: str
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Usage:
    """What an answer cost."""

    prompt_tokens: int
    """With the positions that a soft prompt or a prefix takes."""
    reused_tokens: int
    """Of the prompt, taken from a state that was kept."""
    generated_tokens: int
    prompt_seconds: float
    generation_seconds: float
    first_token_seconds: float
    kv_bytes: int
    finish: Finish


@dataclass(frozen=True)
class AdapterInfo:
    """A loaded adapter, as whoever asks may know it."""

    name: str
    digest: str
    path: Path
    size_bytes: int
    system: str | None = None
    """The system message it was trained with."""
    single_turn: bool = False
    """It has only seen questions that stand alone."""
    invocation: tuple[int, ...] = ()
    """aLoRA: active only after these tokens."""


class Stream(Protocol):
    """An answer as it comes. Iterate to its end, or cancel it; `usage` is there afterwards."""

    def __iter__(self) -> Iterator[Piece]: ...
    def cancel(self) -> None:
        """End the answer where it is; safe to repeat."""
        ...

    @property
    def usage(self) -> Usage | None:
        """None until the answer has ended."""
        ...


class Service(Protocol):
    """A base with adapters that answers; safe to call from several threads."""

    @property
    def name(self) -> str: ...
    @property
    def threads(self) -> Choice:
        """How many compute, and why."""
        ...

    @property
    def adapters(self) -> Mapping[str, AdapterInfo]: ...
    def load(self, name: str, path: Path, *, allow_unverified: bool = False) -> AdapterInfo:
        """Raises AdapterError if it is damaged or belongs to another base."""
        ...

    def unload(self, name: str, *, wait_seconds: float = 0.0) -> None:
        """Raises EngineError if answers still need it after `wait_seconds`."""
        ...

    def generate(self, request: Request) -> Stream:
        """Raises at once for what can be known before it is computed."""
        ...

    def close(self) -> None: ...
