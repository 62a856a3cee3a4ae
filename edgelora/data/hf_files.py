"""What the JSON files of a Hugging Face checkpoint say about its tokenizer, each field of the type it must have."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, NonNegativeInt, RootModel, ValidationError

from edgelora.errors import BaseModelError, FileFormatError
from edgelora.files.checkpoint import read_json

LARGEST_FILE = 40 << 20  # Gemma's tokenizer.json has 33 MB; more could not be read in 256 MB
LARGEST_VOCABULARY = 1 << 22
SPECIAL_NAMES = ("bos", "eos", "unk", "sep", "pad", "mask")


class AddedToken(BaseModel):
    """A token beside the model's own, as added_tokens_decoder has it: its id is the key."""

    content: str
    special: bool = False
    rstrip: bool = False


class NumberedToken(AddedToken):
    """The same as tokenizer.json has it."""

    id: NonNegativeInt


class _AddedIds(RootModel[dict[str, NonNegativeInt]]):
    """added_tokens.json"""


class BPE(BaseModel):
    """`model` of a tokenizer.json: the one kind that is read. `dropout` and affixes must be absent."""

    type: Literal["BPE"] = "BPE"  # older files do not say it; no other model has a vocab and merges
    vocab: dict[str, NonNegativeInt]
    merges: list[str] | list[tuple[str, str]]
    byte_fallback: bool = False
    ignore_merges: bool = False
    unk_token: str | None = None
    dropout: None = None
    continuing_subword_prefix: Literal["", None] = None
    end_of_word_suffix: Literal["", None] = None

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The merges in their order; a file has each as a text with a blank, or as a list of two."""
        pairs = [merge.partition(" ")[::2] if isinstance(merge, str) else merge for merge in self.merges]
        return [(left, right) for left, right in pairs]


class TokenizerJson(BaseModel):
    """tokenizer.json, as far as it is read."""

    model: BPE
    added_tokens: list[NumberedToken] = []
    normalizer: dict[str, Any] | None = None
    pre_tokenizer: dict[str, Any] | None = None
    post_processor: dict[str, Any] | None = None

    @property
    def framing(self) -> tuple[str | None, str | None, bool]:
        """The special tokens that it puts before and behind a text, and whether it says so of both."""
        first, last, said = None, None, False
        stages: list[Any] = [self.post_processor]
        match self.post_processor:
            case {"type": "Sequence", "processors": list(inner)}:
                stages = inner
        for stage in stages:
            match stage:
                case {"type": "ByteLevel"}:
                    said = True
                case {"type": "TemplateProcessing", "single": [begin, *_, end]}:
                    first, last = _special_text(begin), _special_text(end)
        return first, last, said


def _special_text(part: object) -> str | None:
    match part:
        case {"SpecialToken": {"id": str(text)}}:
            return text
    return None


class SpecialTokens(BaseModel):
    """special_tokens_map.json"""

    model_config = ConfigDict(extra="allow")  # bos_token, eos_token …: a text or an added token

    def text_of(self, name: str) -> str | None:
        """The text of `bos`, `eos` …, None where it is not said."""
        value = (self.model_extra or {}).get(f"{name}_token")
        text = value.get("content") if isinstance(value, dict) else value
        return text if isinstance(text, str) else None


class TokenizerConfig(SpecialTokens):
    """tokenizer_config.json, as far as it is read."""

    added_tokens_decoder: dict[NonNegativeInt, AddedToken] = {}
    add_bos_token: bool | None = None
    add_eos_token: bool | None = None
    add_prefix_space: bool | None = None


_Model = TypeVar("_Model", bound=BaseModel)


class HFFolder:
    """What the files of a checkpoint say about its tokenizer; one that is not there says nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config, self.generation = self._read("config.json"), self._read("generation_config.json")
        self.tokenizer_config = self._validated(TokenizerConfig, "tokenizer_config.json")
        self._special_tokens_map = self._validated(SpecialTokens, "special_tokens_map.json")
        self._added_ids = self._validated(_AddedIds, "added_tokens.json").root
        present = (path / "tokenizer.json").is_file()
        self.tokenizer = self._validated(TokenizerJson, "tokenizer.json") if present else None

    def setting(self, name: str) -> object:
        """A value of config.json; of the text model inside where there are several."""
        inner = self.config.get("text_config")
        return self.config.get(name, inner.get(name) if isinstance(inner, dict) else None)

    def text_of(self, name: str) -> str | None:
        """The text of `bos`, `eos` …, None where it is not said."""
        return self.tokenizer_config.text_of(name) or self._special_tokens_map.text_of(name)

    @property
    def ends(self) -> list[int]:
        """The ids at which an answer ends, by generation_config.json or else by config.json."""
        return _ids(self.generation.get("eos_token_id")) or _ids(self.setting("eos_token_id"))

    def token_id(self, name: str) -> int | None:
        """The id of `bos`, `eos` … in config.json, the first one of several."""
        return next(iter(_ids(self.setting(f"{name}_token_id"))), None)

    @cached_property
    def added_tokens(self) -> dict[int, AddedToken]:
        """By id, the tokens that any file adds to the trained ones. What tokenizer_config.json says of one counts.

        Raises BaseModelError where two files give one id two texts, or one text two ids.
        """
        special = {self.text_of(name) for name in SPECIAL_NAMES}
        sources: dict[str, Iterable[tuple[int, AddedToken]]] = {
            "added_tokens.json": [(i, AddedToken(content=t, special=t in special)) for t, i in self._added_ids.items()],
            "tokenizer.json": [(t.id, t) for t in (self.tokenizer.added_tokens if self.tokenizer else ())],
            "tokenizer_config.json": self.tokenizer_config.added_tokens_decoder.items(),
        }
        merged: dict[int, AddedToken] = {}
        ids: dict[str, int] = {}
        for name, tokens in sources.items():
            for token, added in tokens:
                text = added.content
                if (other := ids.setdefault(text, token)) != token:
                    raise self._disagreement(f"{text!r} is {token} in {name}, but also {other}")
                if (before := merged.get(token, added).content) != text:
                    raise self._disagreement(f"{token} is {text!r} in {name}, but also {before!r}")
                merged[token] = added
        return merged

    def size(self, found: int) -> int:
        """How many ids the model knows: config.json's `vocab_size`, or as many as were `found`."""
        size = self.setting("vocab_size") or found
        if not isinstance(size, int) or not 0 < size <= LARGEST_VOCABULARY:
            raise self.broken("config.json", f"a vocabulary of {size} tokens")
        return size

    def sentencepiece_model(self) -> bytes:
        """The bytes of tokenizer.model. Raises FileFormatError if it is empty, too large or cannot be read."""
        path = self.path / "tokenizer.model"
        try:
            if not 0 < (size := path.stat().st_size) <= LARGEST_FILE:
                raise self.broken(path.name, f"a file of {size} bytes")
            return path.read_bytes()
        except OSError as e:
            raise self.broken(path.name, f"it cannot be read ({e.strerror})") from e

    def broken(self, name: str, why: str, fix: str | None = None) -> FileFormatError:
        """The error for what the file `name` of this folder says."""
        return FileFormatError(
            what=f"{self.path / name}: it describes no tokenizer that llama.cpp could reproduce",
            why=why,
            fix=fix or "use a base with a BPE or SentencePiece tokenizer, or download this one again",
        )

    def _disagreement(self, about: str) -> BaseModelError:
        return BaseModelError(
            what=f"{self.path}: its files disagree about the added token {about}",
            why="only one of them can be what the model was trained on",
            fix="get all files of its tokenizer from one place again, or save it anew (tokenizer.save_pretrained)",
        )

    def _read(self, name: str) -> dict[str, Any]:
        return read_json(self.path / name, LARGEST_FILE) if (self.path / name).is_file() else {}

    def _validated(self, kind: type[_Model], name: str) -> _Model:
        try:
            return kind.model_validate(self._read(name))
        except ValidationError as e:
            first = e.errors(include_url=False, include_input=False)[0]
            raise self.broken(name, f"{'.'.join(map(str, first['loc']))[:100]}: {first['msg']}") from e


def _ids(value: object) -> list[int]:
    """The token ids in a setting that may be one id or several."""
    return [i for i in (value if isinstance(value, list) else [value]) if type(i) is int and i >= 0]
