"""The tokenizer inside a GGUF file. Contract: the ids we train on are the ids llama.cpp will see.

Knows byte-level BPE (`gpt2` in GGUF's words) with the pre-tokenizers of THE TABLE below; anything else is refused
rather than guessed. Never imports llama_cpp: tests compare the two.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from gguf.constants import TokenType
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from edgelora.errors import BaseModelError
from edgelora.files.gguf import GGUFFile, Strings

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# GGUF's name of a pre-tokenizer → the splits it makes before BPE, in order (llama.cpp: src/llama-vocab.cpp).
PRE_TOKENIZERS: dict[str, tuple[str, ...]] = {
    "smollm": (r"\p{N}", _GPT2),
    "gpt-2": (_GPT2,),
}

# Besides the ids its keys name, llama.cpp ends generation at tokens with these texts, and makes them control tokens:
# ends of a turn or text, then the padding, repository and file separators of fill-in-the-middle models.
END_OF_GENERATION_TEXTS = frozenset({
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
    "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>",
    "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~[",
    "<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]", "<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>",
    "<reponame>", "<|file_sep|>",
})  # fmt: skip


@dataclass(frozen=True)
class Encoded:
    """ids and, for each, the (first, last + 1) characters of the text it came from."""

    ids: list[int]
    offsets: list[tuple[int, int]]


class Tokenizer:
    """Text ↔ ids for one vocabulary. Special tokens are never read out of text: `encode` sees plain text only."""

    def __init__(
        self, tokens: Sequence[str], types: Sequence[int], merges: Sequence[str], pre: str, ids: dict[str, int],
        add_bos: bool,
    ) -> None:  # fmt: skip
        self.tokens, self.types, self.ids, self.add_bos = tokens, types, ids, add_bos
        vocabulary = {token: i for i, token in enumerate(tokens)}
        pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
        self._backend = Backend(models.BPE(vocab=vocabulary, merges=pairs))
        splits = [pre_tokenizers.Split(Regex(r), "isolated") for r in PRE_TOKENIZERS[pre]]
        stages = [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        # bytes without a token are left out, and as in llama.cpp nothing merges across the gap
        if gaps := "|".join(re.escape(c) for c in pre_tokenizers.ByteLevel.alphabet() if c not in vocabulary):
            stages.append(pre_tokenizers.Split(Regex(gaps), "isolated"))
        self._backend.pre_tokenizer = pre_tokenizers.Sequence(stages)
        self._backend.decoder = decoders.ByteLevel()
        user_defined = [t for t, kind in zip(tokens, types, strict=True) if kind == TokenType.USER_DEFINED]
        self._backend.add_tokens([AddedToken(t, normalized=False, special=False) for t in user_defined])
        self.control = {
            t: i
            for i, (t, kind) in enumerate(zip(tokens, types, strict=True))
            if kind == TokenType.CONTROL or t in END_OF_GENERATION_TEXTS
        }
        self._digest = hashlib.sha256("\0".join([pre, *tokens, *merges]).encode()).hexdigest()

    @property
    def sha256(self) -> str:
        """Digest of everything that decides which ids a text gets."""
        return self._digest

    @property
    def bos_id(self) -> int | None:
        return self.ids.get("bos")

    @property
    def eos_id(self) -> int | None:
        return self.ids.get("eos")

    def text_of(self, token_id: int | None) -> str:
        return "" if token_id is None else self.tokens[token_id]

    @cached_property
    def eog_ids(self) -> tuple[int, ...]:
        """The ids at which llama.cpp ends a generation."""
        named = {self.ids[k] for k in ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep") if k in self.ids}
        return tuple(sorted(named | {i for t, i in self.control.items() if t in END_OF_GENERATION_TEXTS}))

    @cached_property
    def control_pattern(self) -> re.Pattern[str]:
        """Matches any control token's text, the longest first."""
        return re.compile("|".join(re.escape(t) for t in sorted(self.control, key=len, reverse=True)) or r"(?!)")

    def encode(self, text: str) -> Encoded:
        """Plain text → ids. Text that looks like a special token is text; no BOS or EOS is added."""
        encoding = self._backend.encode(text, add_special_tokens=False)
        return Encoded(encoding.ids, encoding.offsets)

    def decode(self, ids: Sequence[int]) -> str:
        """ids → text, special tokens left out; bytes that are no whole character become U+FFFD."""
        control = set(self.control.values())
        return self._backend.decode([i for i in ids if i not in control], skip_special_tokens=False)


def read_tokenizer(file: GGUFFile) -> Tokenizer:
    """The tokenizer of a GGUF file. Raises BaseModelError for a kind that we cannot reproduce exactly."""
    model, pre = file.get("tokenizer.ggml.model", str, "missing"), file.get("tokenizer.ggml.pre", str, "missing")
    if model != "gpt2" or pre not in PRE_TOKENIZERS:
        raise BaseModelError(
            what=f"{file.path}: its tokenizer ({model}, pre-tokenizer {pre}) is not known",
            why="training on other token ids than llama.cpp will see would teach the wrong thing",
            fix=f"use a base with byte-level BPE and one of the pre-tokenizers {', '.join(PRE_TOKENIZERS)}",
        )
    tokens, merges = (_strings(file, f"tokenizer.ggml.{key}") for key in ("tokens", "merges"))
    types = file.get("tokenizer.ggml.token_type", list)
    types = types.tolist() if isinstance(types, np.ndarray) and types.dtype.kind in "iu" else []
    known = set(tokens)
    fitting = all({left, right, left + right} <= known for left, _, right in (m.partition(" ") for m in merges))
    if not tokens or not len(known) == len(types) == len(tokens) or not fitting:
        raise _broken(file, f"{len(tokens)} tokens, {len(known)} different ones, {len(types)} types")
    ids = {}
    for name in ("bos", "eos", "eot", "eom", "unknown", "padding", "fim_pad", "fim_rep", "fim_sep"):
        value = file.get(f"tokenizer.ggml.{name}_token_id", int)
        if value is not None and 0 <= value < len(tokens):
            ids[name] = value
    add_bos = bool(file.get("tokenizer.ggml.add_bos_token", bool, False))
    return Tokenizer(tokens, types, merges, pre, ids, add_bos)


def _strings(file: GGUFFile, key: str) -> list[str]:
    """The texts of an array, none where the key is missing. Raises BaseModelError for any other array."""
    value = file.get(key, list, ())
    if len(value) and not isinstance(value, Strings):
        raise _broken(file, f"{key} holds no texts")
    return list(value)


def _broken(file: GGUFFile, fault: str) -> BaseModelError:
    return BaseModelError(
        what=f"{file.path}: its vocabulary is not whole ({fault})",
        why="tokens (each one once), their types and the merges must fit together",
        fix="download or convert the model again",
    )
