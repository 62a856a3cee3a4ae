"""What the settings of sampling may be. No llama.cpp here: whoever asks can be told before anything is loaded.

This is all that stands between a request and C, which checks nothing: a temperature of NaN, a negative count or an id
beyond the vocabulary ends in undefined behaviour there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import fields

from edgelora.errors import ConfigError
from runtime.service import Sampling

INT32 = 2**31 - 1
# THE TABLE: what each number may be, both ends included. What lies beyond is off, undefined or noise in C.
LIMITS: dict[str, tuple[float, float]] = {
    "temperature": (0, 100),
    "top_k": (0, INT32),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "repeat_penalty": (0.01, 100),  # C divides by it
    "presence_penalty": (-100, 100),
    "frequency_penalty": (-100, 100),
    "penalty_last_n": (-1, INT32),
    "dry_multiplier": (0, 100),
    "dry_base": (1, 100),  # below 1 C takes DRY for off
    "dry_allowed_length": (1, INT32),
    "dry_penalty_last_n": (-1, INT32),
    "xtc_probability": (0, 1),
    "xtc_threshold": (0, 0.5),  # above it XTC is off
    "mirostat": (0, 2),
    "mirostat_tau": (0.01, 100),
    "mirostat_eta": (0, 10),
    "seed": (0, 2**32 - 2),  # 2**32 - 1 means "from the clock"
    "logprobs": (0, 100),
}
WHOLE = {f.name for f in fields(Sampling) if isinstance(f.default, int)} | {"logprobs"}
MAX_BIAS = 1e6  # beyond which float32 logits lose what they said; -inf forbids a token
MAX_STOPS, MAX_STOP_CHARACTERS = 64, 1000


def check_sampling(sampling: Sampling, n_vocab: int) -> None:
    """Raises ConfigError with everything that cannot be, before C sees any of it."""
    faults = [*_numbers(sampling), *_biases(sampling, n_vocab), *_stops(sampling.stop)]
    if sampling.mirostat and sampling.temperature == 0:
        faults.append("mirostat with temperature 0, which leaves it nothing to choose from")
    if not isinstance(sampling.grammar, str | None):
        faults.append("the grammar is no text")
    if sampling.grammar is not None and sampling.json_schema is not None:
        faults.append("a grammar and a JSON schema, where one must decide")
    if faults:
        raise ConfigError(
            what=f"sampling: {'; '.join(faults)}",
            why="llama.cpp does not check these: it would answer noise, ignore them or crash",
            fix="correct these settings",
        )


def _numbers(sampling: Sampling) -> Iterable[str]:
    for name, (low, high) in LIMITS.items():
        value = getattr(sampling, name)
        if value is None and name == "logprobs":
            continue
        kind = int if name in WHOLE else (int, float)
        if isinstance(value, bool) or not isinstance(value, kind):
            yield f"{name} is {value!r}, not a {'whole ' if name in WHOLE else ''}number"
        elif not low <= value <= high:  # NaN is in no interval
            yield f"{name} is {value}, outside {low} to {high}"


def _biases(sampling: Sampling, n_vocab: int) -> Iterable[str]:
    if not isinstance(sampling.logit_bias, Mapping):
        yield "logit_bias is no table of tokens"
        return
    for token, bias in sampling.logit_bias.items():
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < n_vocab:
            yield f"a logit bias for token {token!r} of {n_vocab}"
        elif not isinstance(bias, (int, float)) or not (bias == -math.inf or abs(bias) <= MAX_BIAS):
            yield f"a logit bias of {bias!r} for token {token}"


def _stops(stop: tuple[str, ...]) -> Iterable[str]:
    if isinstance(stop, str):
        yield "stop is a text, not a list of texts"
        return
    if len(stop) > MAX_STOPS:
        yield f"{len(stop)} stop strings, more than {MAX_STOPS}"
    for text in stop:
        if not isinstance(text, str) or not 0 < len(text) <= MAX_STOP_CHARACTERS:
            yield f"a stop string that is not of 1 to {MAX_STOP_CHARACTERS} characters"
        elif any("\ud800" <= character <= "\udfff" for character in text):
            yield f"a stop string with half a character, {text!r}, which no answer can hold"
