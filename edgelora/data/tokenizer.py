"""Text ↔ ids. Contract: the ids we train on are the ids llama.cpp will see.

Reads special tokens out of text, or does not, as llama.cpp does; the text between them is BPE's (`bpe.py`,
`sentencepiece.py`). Never imports llama_cpp: tests compare the two.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from gguf.constants import TokenType

from edgelora.data.bpe import ByteLevelBPE, spelled_bytes
from edgelora.data.pretokenizers import PRE_TOKENIZERS
from edgelora.data.sentencepiece import SPACE, SentencePieceBPE
from edgelora.data.vocabulary import NEVER_STRIPPED, Vocabulary

# Besides the ids its keys name, llama.cpp ends generation at tokens with these texts, and makes them control tokens.
END_OF_GENERATION_TEXTS = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
    "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>",
    "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~[",
)  # fmt: skip
# It finds a fill-in-the-middle id that no key names by its text (of two such texts we take the one that stands first
# here), and makes it a control token; the last three end generation too.
FIM_TEXTS = {
    "fim_pre": ("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>",
                "<|code_prefix|>", "<|prefix|>"),
    "fim_suf": ("<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>",
                "<|code_suffix|>", "<|suffix|>"),
    "fim_mid": ("<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>",
                "<|code_middle|>", "<|middle|>"),
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}  # fmt: skip
# gpt-oss's marks of its channels are always shown.
_SHOWN = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")
_BLANK = " \t\n\v\f\r"
_SPECIAL = (TokenType.CONTROL, TokenType.UNKNOWN)


@dataclass(frozen=True)
class Encoded:
    """ids and, for each, the (first, last + 1) characters of the text it came from."""

    ids: list[int]
    offsets: list[tuple[int, int]]


class Tokenizer:
    """Text ↔ ids for one vocabulary, which must be a checked one.

    ids: the special ids that llama.cpp uses, by the names of `ID_KEYS`; types: those of the tokens, both with
    llama.cpp's own corrections; control: text → id of the tokens that only `parse_special` reads out of a text.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary, self.tokens = vocabulary, vocabulary.tokens
        sentencepiece = vocabulary.model == "llama"
        # llama.cpp's own for SentencePiece; its 11 for both of byte-level BPE is nobody's, and `checked` refuses it
        defaults = {"bos": 1, "eos": 2, "unk": 0} if sentencepiece else {}
        named = {name: i for name, i in defaults.items() if i < len(self.tokens)} | dict(vocabulary.ids)
        self.ids, self.types, self.eog_ids = _corrected(vocabulary, named)
        self.control = {t: i for i, t in enumerate(self.tokens) if self.types[i] in _SPECIAL}
        begins = sentencepiece or PRE_TOKENIZERS[vocabulary.pre].add_bos
        self.add_bos = begins if vocabulary.add_bos is None else vocabulary.add_bos
        self.add_eos = bool(vocabulary.add_eos)
        self._space_prefix = sentencepiece and vocabulary.add_space_prefix is not False
        self._model = SentencePieceBPE(vocabulary) if sentencepiece else ByteLevelBPE(vocabulary)

    @cached_property
    def sha256(self) -> str:
        """Digest of everything that decides which ids a text gets."""
        v = self.vocabulary
        flags = self.add_bos, self.add_eos, self._space_prefix, v.strip_after_special
        parts = v.model, v.pre, v.tokens, tuple(map(int, self.types)), v.scores, v.merges, flags
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    @property
    def bos_id(self) -> int | None:
        return self.ids.get("bos")

    @property
    def eos_id(self) -> int | None:
        return self.ids.get("eos")

    def text_of(self, token_id: int | None) -> str:
        return "" if token_id is None else self.tokens[token_id]

    @cached_property
    def control_pattern(self) -> re.Pattern[str]:
        """Matches any control token's text, the longest first."""
        return re.compile("|".join(re.escape(t) for t in sorted(self.control, key=len, reverse=True)) or r"(?!)")

    # -- text → ids -----------------------------------------------------------------------------------------------

    def encode(self, text: str, *, parse_special: bool = False) -> Encoded:
        """Text → ids; no BOS or EOS is added.

        Text that looks like a control token is text, unless `parse_special`. User-defined tokens are always read.
        """
        ids, offsets = list[int](), list[tuple[int, int]]()
        for piece, start, end in self._partition(text, parse_special):
            if isinstance(piece, int):
                ids.append(piece)
                offsets.append((start, end))
            else:
                found, spans = self._plain(piece)
                ids += found
                offsets += [(start + a, start + b) for a, b in spans] if start else spans
        return Encoded(ids, offsets)

    def _plain(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        if isinstance(self._model, SentencePieceBPE):
            return self._model.encode(text, space_prefix=self._space_prefix)
        return self._model.encode(text)

    def _partition(self, text: str, parse_special: bool) -> list[tuple[int | str, int, int]]:
        """The special tokens in `text` and the plain texts between them, each with its first and last + 1 character.

        The longest token anywhere in the text goes first, not the leftmost.
        """
        pieces: list[tuple[int | str, int, int]] = [(text, 0, len(text))] if text else []
        readable = self._readable[parse_special]
        if not readable:
            return pieces
        heads = {text[i : i + n] for i in range(len(text)) for n in (1, 2)}
        candidates = sorted(rank for head in heads & readable.keys() for rank in readable[head])
        for _, token in candidates:
            if self.tokens[token] in text:
                pieces = [part for piece in pieces for part in self._cut(piece, token)]
        return pieces

    def _cut(self, piece: tuple[int | str, int, int], token: int) -> Iterable[tuple[int | str, int, int]]:
        text, start, end = piece
        mark = self.tokens[token]
        if isinstance(text, int):
            yield piece
            return
        at = 0
        while (found := text.find(mark, at)) >= 0:
            if at < found:
                yield text[at:found], start + at, start + found
            at = found + len(mark)
            yield token, start + found, start + at
            if self.strips_after(token):
                at = len(text) - len(text[at:].lstrip(_BLANK))
        if at < len(text):
            yield text[at:], start + at, end

    def strips_after(self, token: int) -> bool:
        """Whether llama.cpp drops the white space that follows this special token (Phi-3)."""
        return self.vocabulary.strip_after_special and self.tokens[token] not in NEVER_STRIPPED

    @cached_property
    def _readable(self) -> tuple[dict[str, list[tuple[int, int]]], dict[str, list[tuple[int, int]]]]:
        """What is read out of a text, without and with `parse_special`: first two characters → (rank, token)."""
        always, special = defaultdict(list), defaultdict(list)
        marked = [i for i, kind in enumerate(self.types) if kind in (TokenType.USER_DEFINED, *_SPECIAL)]
        marked.sort(key=lambda i: len(self.tokens[i].encode()), reverse=True)
        for rank, token in enumerate(marked):
            head = self.tokens[token][:2]
            special[head].append((rank, token))
            if self.types[token] == TokenType.USER_DEFINED:
                always[head].append((rank, token))
        return always, special

    # -- ids → text -----------------------------------------------------------------------------------------------

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """The bytes of one token, as llama.cpp writes them; none for a control token, unless `special`."""
        text, kind = self.tokens[token], self.types[token]
        if kind in _SPECIAL:
            return text.encode() if special else b""
        if kind == TokenType.USER_DEFINED:
            return text.encode()
        if kind == TokenType.BYTE:
            return bytes([int(text[3:5], 16)])  # <0x0A>
        if kind == TokenType.NORMAL:
            return text.replace(SPACE, " ").encode() if self.vocabulary.model == "llama" else spelled_bytes(text)
        return b""

    def decode(self, ids: Sequence[int]) -> str:
        """ids → text, special tokens left out; bytes that are no whole character become U+FFFD.

        The space that `encode` puts in front of a text is taken away again.
        """
        raw = b"".join(self.piece(token) for token in ids)
        if self._space_prefix and ids and self.piece(ids[0]).startswith(b" "):
            raw = raw[1:]
        return raw.decode("utf-8", "replace")


def _corrected(
    vocabulary: Vocabulary, named: dict[str, int]
) -> tuple[dict[str, int], tuple[TokenType, ...], tuple[int, ...]]:
    """The special ids, the types and the ids that end a generation, once llama.cpp has looked at the tokens' texts."""
    ids, types = dict(named), list(vocabulary.types)
    index = {t: i for i, t in enumerate(vocabulary.tokens)}
    for name, texts in FIM_TEXTS.items():
        if name not in ids and (found := [index[t] for t in texts if t in index]):
            ids[name] = found[0]
            types[found[0]] = TokenType.CONTROL
    ending = {index[t] for t in END_OF_GENERATION_TEXTS if t in index}
    for token in ending:
        types[token] = TokenType.CONTROL
    for text in _SHOWN:
        if text in index:
            types[index[text]] = TokenType.USER_DEFINED
    ending |= {ids[name] for name in ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep") if name in ids}
    has = {vocabulary.tokens[token] for token in ending}
    # where a call or a return ends the turn, <|end|> does not; where a tool's response does, </s> is plain text
    if "<|end|>" in has and has & {"<|call|>", "<|calls|>"} and has & {"<|return|>", "<|flush|>"}:
        ending.discard(index["<|end|>"])
        types[index["<|end|>"]] = TokenType.USER_DEFINED
    if has >= {"<|tool_response>", "</s>"}:
        ending.discard(index["</s>"])
        types[index["</s>"]] = TokenType.NORMAL
    return ids, tuple(types), tuple(sorted(ending))
