"""How byte-level BPE cuts a text into words before it merges: THE TABLE of the pre-tokenizers that we reproduce.

The patterns are Oniguruma's (the `tokenizers` package) and split exactly as llama.cpp does (src/llama-vocab.cpp and
src/unicode.cpp), which is not always as the model's own tokenizer.json says: llama.cpp's answer wins.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGIT = r"\p{N}"
# not (?i:…): that would also read 'ſ as 's
_CONTRACTION = r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]"
_LINES_AND_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD_AND_MORE = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|%s| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_LINES_AND_SPACES}"
_LLAMA3 = _WORD_AND_MORE % r"\p{N}{1,3}"
_QWEN2 = _WORD_AND_MORE % r"\p{N}"
# llama.cpp knows no case beyond ASCII: every other letter is upper and lower
_UPPER, _LOWER = r"[\p{L}&&[^a-z]]", r"[\p{L}&&[^A-Z]]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?(?:{_UPPER}*{_LOWER}+|{_UPPER}+{_LOWER}*)"
_TEKKEN = rf"{_CASED}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_LINES_AND_SPACES}"
_O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+(?:{_CONTRACTION})?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*(?:{_CONTRACTION})?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_LINES_AND_SPACES}"
)


@dataclass(frozen=True)
class PreTokenizer:
    """One way to cut a text into words."""

    splits: tuple[str, ...]
    """Patterns, one after the other: each cuts what the last one left into its matches and what lies between."""
    ignore_merges: bool = False
    """A word that is a token is that token, whatever the merges would make of it."""
    add_bos: bool = False
    """Whether a text begins with BOS where the file does not say."""


# GGUF's name (tokenizer.ggml.pre) → what llama.cpp does under it.
PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "gpt-2": PreTokenizer((GPT2,)),
    "phi-2": PreTokenizer((GPT2,)),
    "olmo": PreTokenizer((GPT2,)),
    "smollm": PreTokenizer((_DIGIT, GPT2)),
    "refact": PreTokenizer((_DIGIT, GPT2)),  # Granite
    "starcoder": PreTokenizer((_DIGIT, GPT2)),
    "command-r": PreTokenizer((_DIGIT, GPT2)),
    "qwen2": PreTokenizer((_QWEN2,)),
    "deepseek-r1-qwen": PreTokenizer((_QWEN2,)),
    "stablelm2": PreTokenizer((_QWEN2,)),
    "llama-bpe": PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True),
    "llama3": PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True),
    "llama-v3": PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True),
    "falcon3": PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True),
    "pixtral": PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True),
    "dbrx": PreTokenizer((_LLAMA3,)),  # OLMo 2, Phi-4, Granite 4
    "smaug-bpe": PreTokenizer((_LLAMA3,)),  # SmolLM3
    "tekken": PreTokenizer((_TEKKEN,), ignore_merges=True, add_bos=True),
    "gpt-4o": PreTokenizer((_O200K,)),
    "llama4": PreTokenizer((_O200K,)),
}

_HF_WORD_AND_MORE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_HF_UPPER, _HF_LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_HF_CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_HF_UPPER}*{_HF_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_HF_UPPER}+{_HF_LOWER}*%s"
    r"|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_HF_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"

# The splits of a tokenizer.json, and whether it ignores merges → GGUF's name. None: llama.cpp has the name either way.
HF_PRE_TOKENIZERS: dict[tuple[tuple[str, ...], bool | None], str] = {
    ((GPT2,), False): "gpt-2",
    ((_DIGIT, GPT2), False): "smollm",
    ((_HF_WORD_AND_MORE % r"\p{N}",), False): "qwen2",
    ((_HF_WORD_AND_MORE % r"\p{N}{1,3}",), True): "llama-bpe",
    ((_HF_WORD_AND_MORE % r"\p{N}{1,3}",), False): "dbrx",
    ((_HF_CASED % ("", "", ""),), None): "tekken",
    ((_HF_CASED % (_HF_CONTRACTION, _HF_CONTRACTION, "{1,3}"),), False): "gpt-4o",
}


def hf_splits(pre_tokenizer: dict[str, Any] | None) -> tuple[str, ...]:
    """The patterns at which the `pre_tokenizer` of a tokenizer.json cuts a text, before it looks at bytes.

    Raises ValueError, naming the stage, for any that does more than cut.
    """
    match pre_tokenizer:
        case {"type": "Sequence", "pretokenizers": [*stages, {"type": "ByteLevel"} as last]}:
            return tuple(_hf_split(stage) for stage in stages) + hf_splits(last)
        case {"type": "ByteLevel", "add_prefix_space": False, **rest}:
            return (GPT2,) if rest.get("use_regex", True) else ()
    raise ValueError(f"the pre-tokenizer {pre_tokenizer}")


def _hf_split(stage: object) -> str:
    match stage:
        case {"type": "Digits", "individual_digits": True}:
            return _DIGIT
        case {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated", "invert": False}:
            return pattern
        case {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Removed", "invert": True}:
            return pattern  # what does not match is removed: nothing, as the patterns of the table match anything
    raise ValueError(f"the pre-tokenizer {stage}")
