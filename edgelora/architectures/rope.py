"""How a model turns positions into angles, read from config.json or from a GGUF; the angles are made in `nn/rotary.py`.

RoFormer (arXiv:2104.09864) and the ways to stretch it: linear (arXiv:2306.15595), dynamic NTK, YaRN (arXiv:2309.00071),
LongRoPE (arXiv:2402.13753) and Llama 3.1's bands of frequencies.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgelora.errors import BaseModelError
from edgelora.files.gguf import GGUFFile

FREQUENCIES, SHORT, LONG = "rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"
KINDS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")


@dataclass(frozen=True)
class Rope:
    """Frequencies theta^(-2i/dim), i < dim / 2, and what a scaling makes of them."""

    theta: float
    dim: int
    """How many numbers of a head rotate, the first ones."""
    scaling: str = "default"
    """One of KINDS."""
    factor: float = 1.0
    """How much longer the context became (linear, dynamic, yarn)."""
    original_max_position_embeddings: int = 0
    """The context before it was stretched (dynamic, yarn, longrope)."""
    attention_factor: float = 1.0
    """What cos and sin are multiplied by (yarn, longrope)."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    """The borders of yarn's ramp, and whether they are rounded to whole dimensions. In these families llama.cpp always
    takes the defaults, whatever a GGUF says."""
    divisors: tuple[float, ...] = ()
    """What each frequency is divided by (llama3; longrope up to the original context)."""
    long_divisors: tuple[float, ...] = ()
    """The same for sequences longer than the original context (longrope)."""


def read_hf_rope(config: Mapping[str, Any], head_dim: int, layer_type: str | None = None, theta: float = 1e4) -> Rope:
    """The rope of `layer_type` in a config.json, old (`rope_theta`, `rope_scaling`) or new (`rope_parameters`).

    Raises BaseModelError for a scaling that is not known or lacks its numbers.
    """
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    given = given.get(layer_type, given) if layer_type is not None else given

    def stated(*keys: str, default: Any = None) -> Any:
        """The first of these that is not null, among the rope's own settings, else in config.json."""
        values = [given.get(key) for key in keys] + [config.get(key) for key in keys]
        return next((value for value in values if value is not None), default)

    try:
        kind = str(next((k for k in (given.get("rope_type"), given.get("type")) if k is not None), "default"))
        kind = {"su": "longrope"}.get(kind, kind)
        theta = float(stated("rope_theta", default=theta))
        dim = int(head_dim * float(stated("partial_rotary_factor", default=1.0)))
        context = int(config["max_position_embeddings"])
        # a key of its own beats the one among the rope's, as in transformers
        original = config.get("original_max_position_embeddings") or given.get("original_max_position_embeddings")
        original = int(original or context)
        if kind == "default":
            return _checked(Rope(theta, dim), head_dim)
        if kind == "llama3":
            rope = Rope(theta, dim, kind, divisors=_llama3_divisors(theta, dim, given, original))
            return _checked(rope, head_dim)
        if kind == "longrope":
            return _checked(_longrope(theta, dim, given, context, original), head_dim)
        if kind in ("linear", "dynamic"):
            rope = Rope(theta, dim, kind, float(given["factor"]), context if kind == "dynamic" else 0)
            return _checked(rope, head_dim)
        if kind == "yarn":
            factor = float(given.get("factor") or context / original)
            rope = Rope(
                theta, dim, kind, factor, original, _yarn_attention_factor(given, factor),
                float(given.get("beta_fast") or 32), float(given.get("beta_slow") or 1),
                given.get("truncate") is not False,
            )  # fmt: skip
            return _checked(rope, head_dim)
    except (KeyError, TypeError, ValueError, OverflowError, ZeroDivisionError, AttributeError) as e:
        raise BaseModelError(
            what=f"config.json: its rope settings {dict(given) if isinstance(given, Mapping) else given!r} "
            f"cannot be used ({e!r})",
            why="a wrong rotation of positions changes every answer",
            fix="download the checkpoint again",
        ) from e
    raise BaseModelError(
        what=f"config.json: the rope scaling {kind} is not known",
        why=f"edgelora computes {', '.join(KINDS)} and guesses at no other",
        fix="use another base",
    )


def _checked(rope: Rope, head_dim: int) -> Rope:
    """The rope, if angles can be made of it. Raises ValueError."""
    numbers = (rope.theta, rope.factor, rope.attention_factor, rope.beta_fast, rope.beta_slow, *rope.divisors)
    if not all(math.isfinite(x) and x > 0 for x in (*numbers, *rope.long_divisors)):
        raise ValueError("a number that is not above zero")
    if not 2 <= rope.dim <= head_dim or rope.dim % 2 or rope.original_max_position_embeddings < 0:
        raise ValueError(f"{rope.dim} of {head_dim} numbers of a head rotate")
    return rope


def read_gguf_rope(file: GGUFFile, head_dim: int, base_key: str = "freq_base", theta: float = 1e4) -> Rope:
    """The rope that llama.cpp would compute from a GGUF. Raises BaseModelError for settings that are not known."""
    prefix = f"{file.architecture}.rope."
    dim = file.get(prefix + "dimension_count", int, head_dim)
    theta = file.get(prefix + base_key, float, theta)
    known = {"type", "factor", "original_context_length", "attn_factor", "finetuned", "yarn_beta_fast",
             "yarn_beta_slow", "yarn_attn_factor", "yarn_ext_factor"}  # fmt: skip
    unknown = sorted(
        key for key in file.metadata
        if key.startswith(prefix + "scaling.") and key.removeprefix(prefix + "scaling.") not in known
    )  # fmt: skip
    kind = file.get(prefix + "scaling.type", str, "linear")
    factor = file.get(prefix + "scaling.factor", float, 0.0) or file.get(prefix + "scale_linear", float, 0.0)
    original = file.get(prefix + "scaling.original_context_length", int, 0)
    original = original or file.get(f"{file.architecture}.context_length", int, 0)
    attention = file.get(prefix + "scaling.attn_factor", float, 1.0)
    divided = {name for name in (FREQUENCIES, LONG, SHORT) if name in file.tensors}
    # llama.cpp would compute these together; no model is made so
    both = (divided and factor not in (0.0, 1.0)) or (attention != 1.0 and kind != "yarn" and LONG not in divided)
    fit = 2 <= dim <= head_dim and dim % 2 == 0 and theta > 0 and factor >= 0 and attention > 0
    if unknown or both or kind not in ("none", "linear", "yarn", "longrope") or not fit:
        raise BaseModelError(
            what=f"{file.path}: its rope settings are not known "
            f"({', '.join(unknown) or f'{kind}, factor {factor:g}, {dim} of {head_dim}, theta {theta:g}'})",
            why="a wrong rotation of positions changes every answer",
            fix="use another base, or convert the model again",
        )
    if LONG in file.tensors or SHORT in file.tensors:
        short, long = (_stored_divisors(file, name, dim) for name in (SHORT, LONG))
        return Rope(theta, dim, "longrope", 1.0, original, attention, divisors=short, long_divisors=long)
    if FREQUENCIES in file.tensors:
        return Rope(theta, dim, "llama3", divisors=_stored_divisors(file, FREQUENCIES, dim))
    if kind == "yarn" and factor > 1:
        return Rope(
            theta, dim, "yarn", factor, original, attention * _magnitude(factor)
        )  # fmt: skip
    return Rope(theta, dim, "linear", factor) if kind == "linear" and factor not in (0.0, 1.0) else Rope(theta, dim)


def gguf_rope(rope: Rope) -> tuple[dict[str, float | int | str], dict[str, np.ndarray]]:
    """What a GGUF says of a rope: keys behind `{architecture}.rope.`, and tensors by name."""
    keys: dict[str, float | int | str] = {"dimension_count": rope.dim, "freq_base": rope.theta}
    tensors: dict[str, np.ndarray] = {}
    if rope.scaling in ("linear", "yarn"):
        keys |= {"scaling.type": rope.scaling, "scaling.factor": rope.factor}
    if rope.scaling == "longrope":
        keys |= {"scaling.type": "longrope", "scaling.attn_factor": rope.attention_factor}
        tensors = {SHORT: np.array(rope.divisors, np.float32), LONG: np.array(rope.long_divisors, np.float32)}
    if rope.scaling in ("yarn", "longrope"):
        keys["scaling.original_context_length"] = rope.original_max_position_embeddings
    if rope.scaling == "yarn" and (more := rope.attention_factor / _magnitude(rope.factor)) != 1.0:
        keys["scaling.attn_factor"] = more
    if rope.scaling == "llama3":
        tensors = {FREQUENCIES: np.array(rope.divisors, np.float32)}
    return keys, tensors


def _stored_divisors(file: GGUFFile, name: str, dim: int) -> tuple[float, ...]:
    info = file.tensors.get(name)
    values = None if info is None or info.type.name != "F32" else file.rows(name).reshape(-1).view(np.float32)
    if values is None or values.shape != (dim // 2,) or not (np.isfinite(values) & (values != 0)).all():
        raise BaseModelError(
            what=f"{file.path}: {name} does not hold {dim // 2} usable numbers in F32",
            why="a wrong rotation of positions changes every answer",
            fix="download or convert the model again",
        )
    return tuple(values.tolist())


def _llama3_divisors(theta: float, dim: int, given: Mapping[str, Any], original: int) -> tuple[float, ...]:
    """1 for short wavelengths, `factor` for long ones, and a smooth passage between (as Llama 3.1 does)."""
    factor = float(given["factor"])
    low, high = float(given["low_freq_factor"]), float(given["high_freq_factor"])
    frequencies = 1.0 / theta ** (np.arange(0, dim, 2) / dim)
    turns = original * frequencies / (2 * math.pi)  # how often each rotates within the original context
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return tuple((1 / ((1 - smooth) / factor + smooth)).astype(np.float32).tolist())


def _longrope(theta: float, dim: int, given: Mapping[str, Any], context: int, original: int) -> Rope:
    short, long = (tuple(float(x) for x in given[key]) for key in ("short_factor", "long_factor"))
    if not len(short) == len(long) == dim // 2:
        raise ValueError(f"{len(short)} and {len(long)} factors for {dim // 2} frequencies")
    factor = float(given.get("factor") or context / original)
    attention = given.get("attention_factor")
    if attention is None:
        attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return Rope(theta, dim, "longrope", 1.0, original, float(attention), divisors=short, long_divisors=long)


def _yarn_attention_factor(given: Mapping[str, Any], factor: float) -> float:
    stated, mscale, mscale_all = (given.get(k) for k in ("attention_factor", "mscale", "mscale_all_dim"))
    if stated is not None:
        return float(stated)
    if mscale and mscale_all:
        return _magnitude(factor, float(mscale)) / _magnitude(factor, float(mscale_all))
    return _magnitude(factor)


def _magnitude(factor: float, mscale: float = 1.0) -> float:
    """YaRN's growth of q and k with the stretch of the context (equation 22)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
