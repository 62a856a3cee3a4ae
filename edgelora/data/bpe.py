"""Byte-level BPE as llama.cpp does it (`gpt2` in GGUF's words), by the `tokenizers` package. Knows plain text only."""

from __future__ import annotations

import re
from functools import lru_cache

from tokenizers import Regex, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from edgelora.data.pretokenizers import PRE_TOKENIZERS
from edgelora.data.vocabulary import BYTE_OF, Vocabulary

SHORT = 256  # characters of a text whose ids may be kept


class ByteLevelBPE:
    """Text → ids by ranked merges of bytes, within the words of the pre-tokenizer."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        pre = PRE_TOKENIZERS[vocabulary.pre]
        ids = {token: i for i, token in enumerate(vocabulary.tokens)}
        merges = dict.fromkeys(vocabulary.merges)  # of two that are equal the first counts
        pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
        self._backend = Backend(models.BPE(vocab=ids, merges=pairs, ignore_merges=pre.ignore_merges))
        splits = [pre_tokenizers.Split(Regex(r), "isolated") for r in pre.splits]
        stages = [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        # bytes without a token are left out, and as in llama.cpp nothing merges across the gap
        if gaps := "|".join(re.escape(c) for c in BYTE_OF if c not in ids):
            stages.append(pre_tokenizers.Split(Regex(gaps), "isolated"))
        self._backend.pre_tokenizer = pre_tokenizers.Sequence(stages)
        # what a chat template writes between two turns, or a system message says, comes again in every row
        self._short = lru_cache(maxsize=256)(self._encode)

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids, and for each the (first, last + 1) characters it came from. Not to be changed: both may be kept."""
        return self._short(text) if len(text) <= SHORT else self._encode(text)

    def _encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        found = self._backend.encode(text, add_special_tokens=False)
        return found.ids, found.offsets


def spelled_bytes(token: str) -> bytes:
    """The bytes that an ordinary token stands for, or what llama.cpp writes where it stands for none."""
    return b"".join(
        bytes([BYTE_OF[c]]) if c in BYTE_OF else f"[UNK_BYTE_0x{c.encode().hex()}{token}]".encode() for c in token
    )
