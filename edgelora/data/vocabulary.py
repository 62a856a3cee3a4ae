"""What a GGUF file says about its tokenizer: tokens, types, scores or merges, special ids.

A GGUF file or the folder of a checkpoint (`hf_vocabulary.py`) gives a `Vocabulary`; `Tokenizer` does with it what
llama.cpp does, and a converter writes it with `add_to`. What llama.cpp decides where a key is missing is not said here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np
from gguf.constants import Keys, TokenType

from edgelora.data.pretokenizers import PRE_TOKENIZERS
from edgelora.errors import BaseModelError
from edgelora.files.gguf import GGUFFile, Strings

# How a vocabulary spells the 256 bytes: SentencePiece by name, byte-level BPE each by a printable character (GPT-2's).
BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))
_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
BYTE_OF = {chr(b): b for b in _PRINTABLE} | {
    chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in _PRINTABLE)
}
# What each special id is called here → its key.
ID_KEYS: dict[str, str] = {
    "bos": Keys.Tokenizer.BOS_ID, "eos": Keys.Tokenizer.EOS_ID, "eot": Keys.Tokenizer.EOT_ID,
    "eom": Keys.Tokenizer.EOM_ID, "unk": Keys.Tokenizer.UNK_ID, "sep": Keys.Tokenizer.SEP_ID,
    "pad": Keys.Tokenizer.PAD_ID, "mask": Keys.Tokenizer.MASK_ID,
    "fim_pre": Keys.Tokenizer.FIM_PRE_ID, "fim_suf": Keys.Tokenizer.FIM_SUF_ID, "fim_mid": Keys.Tokenizer.FIM_MID_ID,
    "fim_pad": Keys.Tokenizer.FIM_PAD_ID, "fim_rep": Keys.Tokenizer.FIM_REP_ID, "fim_sep": Keys.Tokenizer.FIM_SEP_ID,
}  # fmt: skip
# older keys: llama.cpp reads them after the others, and the last one counts
_OLD_ID_KEYS = {
    "fim_pre": Keys.Tokenizer.PREFIX_ID, "fim_suf": Keys.Tokenizer.SUFFIX_ID, "fim_mid": Keys.Tokenizer.MIDDLE_ID,
}  # fmt: skip
# White space behind these stays, even where it is dropped behind all other special tokens.
NEVER_STRIPPED = frozenset({"<unk>", "<s>", "<|endoftext|>"})


@dataclass(frozen=True)
class Vocabulary:
    """`tokenizer.ggml.*`, each key as it is; what is None stands in no key. `checked` holds it to be whole."""

    model: str
    """"gpt2": byte-level BPE by merges; "llama": SentencePiece's BPE by scores."""
    pre: str
    """The row of PRE_TOKENIZERS; "default" for "llama", which has none."""
    tokens: tuple[str, ...]
    """The text of every id, each text once."""
    types: tuple[TokenType, ...]
    scores: tuple[float, ...] = ()
    """One for each token of "llama", as float32 holds it: what merges first. None for "gpt2"."""
    merges: tuple[str, ...] = ()
    """For "gpt2": two tokens with a space between, what merges first comes first."""
    ids: Mapping[str, int] = field(default_factory=dict)
    """Special ids by the names of ID_KEYS."""
    add_bos: bool | None = None
    add_eos: bool | None = None
    add_space_prefix: bool | None = None
    strip_after_special: bool = False
    """White space behind a special token is dropped. No key says this: llama.cpp finds `phi-3` in general.name."""

    def add_to(self, writer: gguf.GGUFWriter) -> None:
        """Write every key. The name that `strip_after_special` needs is the caller's to write."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        writer.add_token_scores(self.scores)
        writer.add_token_merges(self.merges)
        for name, token in self.ids.items():
            writer.add_uint32(ID_KEYS[name], token)
        flags = {
            Keys.Tokenizer.ADD_BOS: self.add_bos,
            Keys.Tokenizer.ADD_EOS: self.add_eos,
            Keys.Tokenizer.ADD_PREFIX: self.add_space_prefix,
        }
        for key, value in flags.items():
            if value is not None:
                writer.add_bool(key, value)


def name_strips_after_special(name: str) -> bool:
    """Whether llama.cpp reads out of a `general.name` that white space behind special tokens is dropped."""
    return "phi-3" in name.lower() or "phi3" in name.lower()


def checked(vocabulary: Vocabulary, source: Path) -> Vocabulary:
    """The same vocabulary, if `Tokenizer` gives the ids for it that llama.cpp gives.

    Raises BaseModelError, with every fault named, for one that we do not reproduce or that does not fit together.
    """
    v = vocabulary
    if v.model not in ("gpt2", "llama") or (v.model == "gpt2" and v.pre not in PRE_TOKENIZERS):
        raise BaseModelError(
            what=f"{source}: its tokenizer ({v.model}, pre-tokenizer {v.pre}) is not known",
            why="training on other token ids than llama.cpp will see would teach the wrong thing",
            fix=f"use a base with SentencePiece, or byte-level BPE and one of: {', '.join(PRE_TOKENIZERS)}",
        )
    faults = _faults(v) + (_bpe_faults(v) if v.model == "gpt2" else _sentencepiece_faults(v))
    missing = _missing_ids(v)
    if faults:
        raise _not_whole(source, *faults, *missing)
    if missing:
        raise BaseModelError(
            what=f"{source}: its vocabulary has {' and '.join(missing)}",
            why="llama.cpp would take token 11 in its place, whatever that is",
            fix="name it in tokenizer_config.json (eos_token, bos_token), and convert that checkpoint again for a GGUF",
        )
    return v


def _faults(v: Vocabulary) -> list[str]:
    faults = []
    if not v.tokens:
        faults.append("no tokens")
    if len(set(v.tokens)) != len(v.tokens):
        text, count = Counter(v.tokens).most_common(1)[0]
        faults.append(f"the token {text!r} stands in it {count} times")
    if len(v.types) != len(v.tokens):
        faults.append(f"{len(v.tokens)} tokens but {len(v.types)} types")
    odd = [t for t, kind in zip(v.tokens, v.types, strict=False) if kind == TokenType.BYTE and t not in BYTE_TOKENS]
    if odd:
        faults.append(f"{odd[0]!r} is no byte, as its type says")
    return faults


def _bpe_faults(v: Vocabulary) -> list[str]:
    known, pre = set(v.tokens), PRE_TOKENIZERS[v.pre]
    faults = []
    for merge in v.merges:
        left, _, right = merge.partition(" ")
        if not {left, right, left + right} <= known:
            faults.append(f"the merge {merge!r} is not of tokens")
            break
    missing = BYTE_OF.keys() - known
    if missing and pre.ignore_merges and any(missing & set(token) for token in v.tokens):
        faults.append(f"no tokens for {len(missing)} bytes that other tokens are made of")
    return faults


def _missing_ids(v: Vocabulary) -> list[str]:
    """For byte-level BPE; SentencePiece has ids that llama.cpp takes where none are named."""
    if v.model != "gpt2":
        return []
    begins = PRE_TOKENIZERS[v.pre].add_bos if v.add_bos is None else v.add_bos
    missing = [] if "eos" in v.ids else ["no eos_token_id"]
    return missing if "bos" in v.ids or not begins else [*missing, "no bos_token_id, though its texts begin with it"]


def _sentencepiece_faults(v: Vocabulary) -> list[str]:
    faults = []
    if len(v.scores) != len(v.tokens):
        faults.append(f"{len(v.tokens)} tokens but {len(v.scores)} scores")
    if not np.isfinite(np.array(v.scores, np.float32)).all():
        faults.append("scores that are no numbers")
    if missing := set(BYTE_TOKENS) - set(v.tokens):
        faults.append(f"no tokens for {len(missing)} bytes ({min(missing)} …): it lacks SentencePiece's byte fallback")
    return faults


# -- the GGUF reader ----------------------------------------------------------------------------------------------


def vocabulary_from_gguf(file: GGUFFile) -> Vocabulary:
    """The vocabulary of a GGUF file, checked. Raises BaseModelError, or FileFormatError for a key of a wrong type."""
    keys = Keys.Tokenizer
    model = file.get(keys.MODEL, str, "missing")
    tokens = tuple(t or f"[EMPTY_{i}]" for i, t in enumerate(_strings(file, keys.LIST)))  # as llama.cpp calls them
    ids: dict[str, int] = {}
    for name, key in (*ID_KEYS.items(), *_OLD_ID_KEYS.items()):
        token = file.get(key, int)
        if token is not None and 0 <= token < len(tokens):  # llama.cpp ignores any other
            ids[name] = token
    vocabulary = Vocabulary(
        model=model,
        pre="default" if model == "llama" else file.get(keys.PRE, str, "missing"),
        tokens=tokens,
        types=_types(file),
        scores=_scores(file, len(tokens)) if model == "llama" else (),
        merges=tuple(_strings(file, keys.MERGES)) if model == "gpt2" else (),
        ids=ids,
        add_bos=file.get(keys.ADD_BOS, bool),
        add_eos=file.get(keys.ADD_EOS, bool),
        add_space_prefix=file.get(keys.ADD_PREFIX, bool),
        strip_after_special=name_strips_after_special(file.get(Keys.General.NAME, str, "")),
    )
    return checked(vocabulary, file.path)


def vocabulary_from_folder(folder: Path) -> Vocabulary:
    """The vocabulary of a Hugging Face checkpoint as llama.cpp's own converter would write it, checked.

    Raises BaseModelError for one that llama.cpp cannot reproduce, FileFormatError for files that are not whole.
    """
    from edgelora.data.hf_vocabulary import read_folder  # loads sentencepiece, which a GGUF file does not need

    return checked(read_folder(folder), folder)


def _strings(file: GGUFFile, key: str) -> list[str]:
    value = file.get(key, list, ())
    if len(value) and not isinstance(value, Strings):
        raise _not_whole(file.path, f"{key} holds no texts")
    return list(value)


def _numbers(file: GGUFFile, key: str, kinds: str) -> np.ndarray:
    value = file.get(key, list, np.empty(0, np.int32))
    if not isinstance(value, np.ndarray) or value.dtype.kind not in kinds:
        raise _not_whole(file.path, f"{key} holds no numbers of the right kind")
    return value


def _types(file: GGUFFile) -> tuple[TokenType, ...]:
    found: list[int] = _numbers(file, Keys.Tokenizer.TOKEN_TYPE, "iu").tolist()
    if unknown := set(found) - {int(kind) for kind in TokenType}:
        raise _not_whole(file.path, f"a token of the unknown type {min(unknown)}")
    known = {int(kind): kind for kind in TokenType}
    return tuple(known[kind] for kind in found)


def _scores(file: GGUFFile, n_tokens: int) -> tuple[float, ...]:
    if Keys.Tokenizer.SCORES not in file.metadata:
        return (0.0,) * n_tokens  # as llama.cpp reads it
    return tuple(_numbers(file, Keys.Tokenizer.SCORES, "fi").astype(np.float32).tolist())


def _not_whole(source: Path, *faults: str) -> BaseModelError:
    return BaseModelError(
        what=f"{source}: its vocabulary is not whole ({'; '.join(faults)})",
        why="tokens (each one once), their types, and scores or merges must fit together, or llama.cpp aborts",
        fix="download or convert the model again",
    )
