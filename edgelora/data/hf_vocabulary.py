"""The tokenizer of a Hugging Face checkpoint as a `Vocabulary`: what llama.cpp's own converter makes of these files.

tokenizer.model (SentencePiece) where there is one, else tokenizer.json: byte-level BPE, or SentencePiece's BPE whose
merges tell the scores. What llama.cpp could not reproduce is refused with the reason.
"""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

from gguf.constants import TokenType
from sentencepiece import SentencePieceProcessor

from edgelora.data.hf_files import BPE, SPECIAL_NAMES, AddedToken, HFFolder, TokenizerJson
from edgelora.data.pretokenizers import HF_PRE_TOKENIZERS, hf_splits
from edgelora.data.sentencepiece import SPACE
from edgelora.data.tokenizer import END_OF_GENERATION_TEXTS
from edgelora.data.vocabulary import BYTE_TOKENS, NEVER_STRIPPED, Vocabulary
from edgelora.errors import BaseModelError

_ADDED_SCORE, _UNUSED_SCORE = -1000.0, -10000.0
_FRAMES = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))
_LOOKS_SPECIAL = ("<pad>", "<mask>", "<2mass>", "[@BOS@]")  # DeepSeek's and Gemma's, not all marked as special
_LONGEST_TOKENS = 1 << 28  # the sum of their squared lengths; Gemma's is 1 << 24
_MARKED = (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)
_PREPEND = {"type": "Prepend", "prepend": SPACE}
_ESCAPE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_SPLIT_AT_SPACES = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}


def _refused(folder: Path, reason: object) -> BaseModelError:
    return BaseModelError(
        what=f"{folder}: its tokenizer cannot be kept in a GGUF file ({reason})",
        why="llama.cpp would give other token ids than the model was trained on",
        fix="use another base model",
    )


def read_folder(path: Path) -> Vocabulary:
    """See `vocabulary_from_folder`; does not look whether the parts fit together."""
    folder = HFFolder(path)
    if (path / "tokenizer.model").is_file():
        return _from_sentencepiece(folder)
    if folder.tokenizer is None:
        raise BaseModelError(
            what=f"{path}: no tokenizer in this folder",
            why="it has neither tokenizer.json nor tokenizer.model",
            fix="save it with a fast tokenizer (tokenizer.save_pretrained)"
            if (path / "merges.txt").is_file()
            else "download the whole checkpoint, not only its weights",
        )
    try:
        build = _from_merges if folder.tokenizer.model.byte_fallback else _from_byte_level
        return build(folder, folder.tokenizer)
    except ValueError as e:
        raise _refused(path, e) from e


class _Table:
    """Tokens by id. Ids that no file names are padding: the model has rows for them all the same."""

    def __init__(self, size: int) -> None:
        self.texts = [f"[PAD{i}]" for i in range(size)]
        self.types = [TokenType.UNUSED] * size
        self.scores = [_UNUSED_SCORE] * size

    def put(self, token: int, text: str, kind: TokenType, score: float) -> None:
        """Ids beyond the model's rows are left out."""
        if token < len(self.texts):
            self.texts[token], self.types[token], self.scores[token] = text, kind, score

    def has_special(self, token: int, text: str) -> bool:
        special = (TokenType.CONTROL, TokenType.UNKNOWN)
        return token < len(self.texts) and self.texts[token] == text and self.types[token] in special

    def add(self, token: int, added: AddedToken) -> None:
        """A token that was added to the trained ones: read out of any text, or if it is special only when asked to."""
        text = added.content
        framed = any(text.startswith(a) and text.endswith(b) for a, b in _FRAMES)
        if added.special or framed or text in _LOOKS_SPECIAL:
            self.put(token, text, TokenType.CONTROL, _ADDED_SCORE)
        else:
            # llama.cpp looks for it in the raw text
            self.put(token, text.replace(SPACE, " "), TokenType.USER_DEFINED, _ADDED_SCORE)


def _from_sentencepiece(folder: HFFolder) -> Vocabulary:
    pieces, space_prefix = _pieces(folder)
    table = _Table(folder.size(max(len(pieces), *(token + 1 for token in folder.added_tokens), 0)))
    for token, (text, kind, score) in enumerate(pieces):
        table.put(token, text, kind, score)
    for token, added in folder.added_tokens.items():
        # llama.cpp's converter changes a trained special token only where tokenizer_config.json names it
        if token in folder.tokenizer_config.added_tokens_decoder or not table.has_special(token, added.content):
            table.add(token, added)
    return _sentencepiece_vocabulary(folder, table, space_prefix)


def _pieces(folder: HFFolder) -> tuple[list[tuple[str, TokenType, float]], bool]:
    """Text, type and score of each trained token, and whether a space is put before a text.

    The sentencepiece library reads a stranger's protobuf in C++, in our own process. That is accepted: since 0.2.3 it
    checks the lengths and tables in it before it follows them, and broken ones are run under limits (test_mutants.py).
    """
    raw = folder.sentencepiece_model()
    try:
        model = SentencePieceProcessor(model_proto=raw)
        unigram, space_prefix = _is_unigram(model), model.normalize("a").startswith(SPACE)
        ids = range(model.vocab_size())
        pieces = [(model.id_to_piece(i), _piece_type(model, i), model.get_score(i)) for i in ids]
    except Exception as e:  # RuntimeError, UnicodeDecodeError: whatever its Python side makes of a fault
        other = "remove tokenizer.model: tokenizer.json beside it is then read" if folder.tokenizer else None
        raise folder.broken("tokenizer.model", "the sentencepiece library cannot read it", other) from e
    if unigram:
        raise _refused(folder.path, "a unigram model; llama.cpp merges by score, which is SentencePiece's BPE")
    return pieces, space_prefix


def _is_unigram(pieces: SentencePieceProcessor) -> bool:
    try:
        pieces.nbest_encode_as_pieces("a", 1)  # only a unigram model knows the best n
    except RuntimeError:
        return False
    return True


def _piece_type(pieces: SentencePieceProcessor, token: int) -> TokenType:
    if pieces.is_unknown(token):
        return TokenType.UNKNOWN
    if pieces.is_control(token):
        return TokenType.CONTROL
    if pieces.is_unused(token):
        return TokenType.UNUSED
    return TokenType.BYTE if pieces.is_byte(token) else TokenType.NORMAL


def _from_merges(folder: HFFolder, found: TokenizerJson) -> Vocabulary:
    """SentencePiece's BPE out of a tokenizer.json. Raises ValueError where its merges are not an order of tokens."""
    space_prefix = _space_prefix(found)
    scores = _scores(found.model)
    table = _listed(folder, found)
    for text, token in found.model.vocab.items():
        kind = TokenType.UNKNOWN if text == found.model.unk_token else TokenType.NORMAL
        table.put(token, text, TokenType.BYTE if text in BYTE_TOKENS else kind, scores.get(text, 0.0))
    for token, added in folder.added_tokens.items():
        table.add(token, added)
    return _sentencepiece_vocabulary(folder, table, space_prefix)


def _sentencepiece_vocabulary(folder: HFFolder, table: _Table, space_prefix: bool) -> Vocabulary:
    stated = folder.tokenizer_config.add_prefix_space
    return Vocabulary(
        model="llama",
        pre="default",
        tokens=tuple(table.texts),
        types=tuple(table.types),
        scores=tuple(table.scores),
        add_space_prefix=space_prefix if stated is None else stated,
        **_special(folder, table),
    )


def _from_byte_level(folder: HFFolder, found: TokenizerJson) -> Vocabulary:
    """Raises ValueError if llama.cpp does not cut texts, or normalizes, as this tokenizer.json says."""
    splits, ignore_merges = hf_splits(found.pre_tokenizer), found.model.ignore_merges
    pre = HF_PRE_TOKENIZERS.get((splits, ignore_merges)) or HF_PRE_TOKENIZERS.get((splits, None))
    if pre is None:
        raise ValueError(f"its pre-tokenizer cuts at {' then '.join(splits)}, ignore_merges {ignore_merges}")
    if found.normalizer not in (None, {"type": "NFC"}):  # llama.cpp composes no characters, and its answer counts
        raise ValueError(f"the normalizer {found.normalizer}")
    table = _listed(folder, found)
    for text, token in found.model.vocab.items():
        table.put(token, text, TokenType.NORMAL, 0.0)
    for token, added in folder.added_tokens.items():
        table.add(token, added)
    return Vocabulary(
        model="gpt2",
        pre=pre,
        tokens=tuple(table.texts),
        types=tuple(table.types),
        merges=tuple(f"{left} {right}" for left, right in found.model.pairs),
        **_special(folder, table),
    )


def _listed(folder: HFFolder, found: TokenizerJson) -> _Table:
    """An empty table that is large enough for every id. Raises ValueError if the model is not, or if two tokens clash.

    An added token may also be a trained one, with the same id and text.
    """
    vocab, texts = found.model.vocab, {token: text for text, token in found.model.vocab.items()}
    if len(texts) != len(vocab):
        raise ValueError("two tokens with the same id")
    for token, added in folder.added_tokens.items():
        if vocab.get(added.content, token) != token or texts.get(token, added.content) != added.content:
            raise ValueError(f"the added token {added.content!r} with the id {token} is another one in its vocab")
    last = max([*texts, *folder.added_tokens], default=-1)
    size = folder.size(last + 1)
    if last >= size:
        raise ValueError(f"it has the token {last}, but the model's vocab_size is {size}")
    return _Table(size)


def _space_prefix(found: TokenizerJson) -> bool:
    """Whether a space is put before a text. Raises ValueError if more than that and ▁ for spaces is done to it."""
    pre = found.pre_tokenizer
    steps = [found.normalizer] if found.normalizer else []
    match found.normalizer:
        case {"type": "Sequence", "normalizers": list(inner)}:
            steps = inner
    if steps == [_PREPEND, _ESCAPE] and pre is None:
        return True
    if steps == [_ESCAPE] and pre in (None, _SPLIT_AT_SPACES):  # by then there are no spaces to split at
        return False
    match pre:
        case {"type": "Metaspace", "replacement": "▁", "prepend_scheme": str(scheme), "split": False} if not steps:
            return scheme != "never"
    raise ValueError(f"the normalizer {found.normalizer} and the pre-tokenizer {pre}")


def _scores(model: BPE) -> dict[str, float]:
    """A score for each token that merges make, higher for those made earlier.

    Merging by scores is merging by ranks if all merges that make a token stand together, and none is missing. Raises
    ValueError otherwise.
    """
    if sum(len(token) ** 2 for token in model.vocab) > _LONGEST_TOKENS:
        raise ValueError("its tokens are longer than any real one's")
    pairs, made = set(model.pairs), [text for text, _ in groupby(left + right for left, right in model.pairs)]
    if len(set(made)) != len(made):
        raise ValueError("merges that make one token do not stand together, so that no score can say their order")
    known = model.vocab.keys() | {c for token in model.vocab for c in token}
    for token in model.vocab:
        for i in range(1, len(token)):
            left, right = token[:i], token[i:]
            if right in known and left in known and (left, right) not in pairs:
                raise ValueError(f"llama.cpp would merge {left!r} and {right!r} to the token {token!r}")
    return {token: -float(rank) for rank, token in enumerate(made)}


def _special(folder: HFFolder, table: _Table) -> dict[str, Any]:
    """Special ids and flags, as fields of a Vocabulary."""
    config, found = folder.tokenizer_config, folder.tokenizer
    first, last, said = found.framing if found else (None, None, False)
    ids = _special_ids(folder, table, first)
    for token in folder.ends:
        free = next((name for name in ("eos", "eot", "eom") if name not in ids), None)
        if free and token < len(table.texts) and token not in ids.values():
            told = free != "eos" and table.texts[token] in END_OF_GENERATION_TEXTS  # llama.cpp ends at these anyway
            ids |= {} if told else {free: token}
    texts = {name: table.texts[token] for name, token in ids.items()}
    stripping = {added.content for added in folder.added_tokens.values() if added.rstrip}
    marked = {text for text, kind in zip(table.texts, table.types, strict=True) if kind in _MARKED}
    return {
        "ids": ids,
        "add_bos": first == texts.get("bos") if first else (False if said else config.add_bos_token),
        "add_eos": last == texts.get("eos") if last else (False if said else config.add_eos_token),
        "strip_after_special": bool(stripping) and stripping == marked - NEVER_STRIPPED,
    }


def _special_ids(folder: HFFolder, table: _Table, first: str | None) -> dict[str, int]:
    """By the names in tokenizer_config.json, else by the ids in config.json; BOS else by what stands `first`.

    Raises BaseModelError where BOS or EOS is named and has no id: another in its place would be the wrong one.
    """
    size, ids = len(table.texts), {}
    index = {added.content: token for token, added in folder.added_tokens.items() if token < size}
    index |= {text: token for token, text in enumerate(table.texts)}
    for name in SPECIAL_NAMES:
        named = folder.text_of(name)
        if named and named not in index and name in ("bos", "eos"):
            raise BaseModelError(
                what=f"{folder.path}: its tokenizer names {named!r} as {name}, and no file gives it an id",
                why=f"no other of the {size} tokens may begin or end a text in its place",
                fix="download all files of its tokenizer again, or save it anew (tokenizer.save_pretrained)",
            )
        text = named or (first if name == "bos" else None)
        token = index.get(text) if text else None
        token = folder.token_id(name) if token is None else token
        if token is not None and token < size:
            ids[name] = token
    return ids
