"""Our ids are llama.cpp's ids: on recorded cases, and on any text for the tiny and the real vocabulary."""

from __future__ import annotations

import json

import numpy as np
import pytest
from gguf.constants import GGUFValueType, TokenType
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from edgelora.base.model import open_base
from edgelora.data.conversation import Message
from edgelora.data.encode import encode_prompt
from edgelora.data.tokenizer import Tokenizer, read_tokenizer
from edgelora.errors import BaseModelError, EdgeloraError
from edgelora.files.gguf import GGUFFile, Strings, Value
from runtime.binding import Model

ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
# what pre-tokenizers disagree about: kinds of white space and digits, contractions, joiners, case, special tokens
AWKWARD = [
    " ", "  ", "\t", "\n", "\r\n", "\x0b", "\x1c", "\x85", "\xa0", "\u1680", "\u180e", "\u2003", "\u2028", "\u200b",
    "\u3000", "\ufeff", "\x00", "'s", "'S", "'ll", "’s", "it's", "7", "２", "½", "Ⅷ", "²", "٣", "a", "ß", "é",
    "e\u0301", "ſ", "中", "한", "\U0001f600", "\u200d", "\ue000", "\U000e0100", "\U0010ffff", "_", ".", "!!",
    "<|im_end|>", "<|im_start|>", "<|endoftext|>", "<|im_", "</s>",
]  # fmt: skip
AWKWARD_TEXT = st.lists(st.sampled_from(AWKWARD), max_size=12).map("".join)
TEXT = st.one_of(ANY_TEXT, AWKWARD_TEXT)
ORACLE = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(params=["tiny", pytest.param("smollm", marks=pytest.mark.real)], scope="module")
def path(request):
    found = request.getfixturevalue(request.param)
    return found.path if request.param == "tiny" else found


@pytest.fixture(scope="module")
def tokenizer(path):
    return read_tokenizer(GGUFFile(path))


@pytest.fixture(scope="module")
def llama(path):
    """The oracle: llama.cpp's own vocabulary of the same file."""
    model = Model(path, vocabulary_only=True)
    yield model
    model.close()


# -- the oracle ---------------------------------------------------------------------------------------------------


@ORACLE
@given(TEXT)
@example("".join(AWKWARD))
def test_ids_are_those_of_llama_cpp(tokenizer, llama, text):
    assert tokenizer.encode(text).ids == llama.tokenize(text, parse_special=False)


def test_every_character_is_split_as_llama_cpp_splits_it(tokenizer, llama):
    # between letters, digits, spaces and itself: where the class of a character changes the split, the ids change
    def differ(characters: list[str]) -> bool:
        text = "\n".join(f"a{c}b {c}{c} 1{c}" for c in characters)
        return tokenizer.encode(text).ids != llama.tokenize(text, parse_special=False)

    plane = [chr(c) for c in range(1, 0x10000) if not 0xD800 <= c < 0xE000]
    rows = [plane[first : first + 256] for first in range(0, len(plane), 256)]
    assert [f"U+{ord(c):04X}" for row in rows if differ(row) for c in row if differ([c])] == []


def test_generation_ends_where_llama_cpp_ends_it(tokenizer, llama):
    assert tokenizer.eog_ids == tuple(i for i in range(llama.n_vocab) if llama.ends_generation(i))
    assert tokenizer.eog_ids


def test_pieces_are_those_of_llama_cpp(tokenizer, llama):
    for token in range(0, llama.n_vocab, max(1, llama.n_vocab // 500)):
        assert tokenizer.decode([token]) == llama.piece(token).decode("utf-8", "replace")


# -- recorded cases: some 40 texts with the ids that the real model must give them --------------------------------


def recorded(shared_data, kind: str) -> list[dict]:
    lines = (shared_data / "tokenizers" / "cases.jsonl").read_text(encoding="utf-8").split("\n")
    return [case for line in lines if line for case in [json.loads(line)] if case["kind"] == kind]


@pytest.mark.real
def test_recorded_texts(shared_data, smollm):
    tokenizer = read_tokenizer(GGUFFile(smollm))
    cases = [case for case in recorded(shared_data, "text") if not case["parse_special"]]  # we never parse specials
    assert len(cases) == 40
    assert {c["text"]: tokenizer.encode(c["text"]).ids for c in cases} == {c["text"]: c["smollm2"] for c in cases}


@pytest.mark.real
def test_recorded_chats(shared_data, smollm):
    base = open_base(smollm)
    cases = [case for case in recorded(shared_data, "chat") if case["model"] == "smollm2"]  # the rest: other models
    assert len(cases) == 3
    for case in cases:
        messages = [Message(m["role"], m["content"]) for m in case["messages"]]
        rendered = base.template.render(messages, generation_prompt=case["add_generation_prompt"])
        assert rendered.text == case["prompt"]
        assert encode_prompt(messages, base.tokenizer, base.template) == case["ids"]


# -- invariants ---------------------------------------------------------------------------------------------------


def spelled(tokenizer: Tokenizer, text: str) -> str:
    """What of `text` the vocabulary can write: SmolLM2's lacks a few bytes, which llama.cpp drops as we do."""
    return "".join(c for c in text if tokenizer.decode(tokenizer.encode(c).ids) == c)


def test_a_vocabulary_can_write_nearly_everything(tokenizer):
    characters = "".join(map(chr, [*range(1, 0xD800), *range(0xE000, 0x10000), 0x1F600]))
    lost = set(characters) - set(spelled(tokenizer, characters))
    assert len(lost) < 10
    assert not any(c.isprintable() or c.isspace() for c in lost - {"\x1d"})


@settings(parent=ORACLE, max_examples=100)
@given(TEXT)
def test_decoding_gives_the_text_back(tokenizer, text):
    text = spelled(tokenizer, text)
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


@settings(parent=ORACLE, max_examples=100)
@given(TEXT)
def test_offsets_cover_the_text_in_order(tokenizer, text):
    text = spelled(tokenizer, text)
    encoded = tokenizer.encode(text)
    starts, ends = [s for s, _ in encoded.offsets], [e for _, e in encoded.offsets]
    assert starts == sorted(starts)
    assert ends == sorted(ends)
    assert {i for s, e in encoded.offsets for i in range(s, e)} == set(range(len(text)))


def test_special_tokens_are_never_read_out_of_text(tokenizer):
    assert {"<|im_start|>", "<|im_end|>", "<|endoftext|>"} <= tokenizer.control.keys()
    for text, token in tokenizer.control.items():
        assert token not in tokenizer.encode(f"a {text} b{text}{text}").ids
        assert tokenizer.control_pattern.fullmatch(text)


def test_decoding_leaves_special_tokens_out(tokenizer):
    assert tokenizer.decode([1, *tokenizer.encode("Hi").ids, 2]) == "Hi"


def test_a_digest_for_each_vocabulary():
    def digest(tokens, merges, pre):
        return Tokenizer(tokens, [TokenType.NORMAL] * len(tokens), merges, pre, {}, False).sha256

    plain = digest(["a", "b", "ab"], ["a b"], "gpt-2")
    others = [
        digest(["a", "b", "ab"], [], "gpt-2"), digest(["b", "a", "ab"], ["a b"], "gpt-2"),
        digest(["a", "b", "ab"], ["a b"], "smollm"),
    ]  # fmt: skip
    assert plain == digest(["a", "b", "ab"], ["a b"], "gpt-2")
    assert len({plain, *others}) == 4


def test_user_defined_tokens_are_read_out_of_text_as_llama_cpp_does():
    tokens = ["a", "b", "[x]", "[", "x", "]"]
    types = [TokenType.USER_DEFINED if t == "[x]" else TokenType.NORMAL for t in tokens]
    assert Tokenizer(tokens, types, [], "gpt-2", {}, False).encode("a[x]b").ids == [0, 2, 1]


# -- errors -------------------------------------------------------------------------------------------------------


def opened(tiny, **changes: Value | None) -> GGUFFile:
    """The tiny model's file with some of its tokenizer's keys changed (None: taken out)."""
    file = GGUFFile(tiny.path)
    for name, value in changes.items():
        file.metadata.pop(f"tokenizer.ggml.{name}")
        if value is not None:
            file.metadata[f"tokenizer.ggml.{name}"] = value
    return file


def text(value: str) -> Value:
    return Value(GGUFValueType.STRING, value)


def numbers(*values: int) -> Value:
    return Value(GGUFValueType.ARRAY, np.array(values, np.int32), GGUFValueType.INT32)


@pytest.mark.parametrize(
    "changes", [{"pre": text("llama-bpe")}, {"pre": None}, {"model": text("llama")}, {"model": None}], ids=str
)
def test_an_unknown_tokenizer_is_refused(tiny, changes):
    with pytest.raises(BaseModelError) as caught:
        read_tokenizer(opened(tiny, **changes))
    assert "is not known" in caught.value.what
    assert "smollm" in caught.value.fix


def words(*values: str) -> Value:
    raw = [v.encode() for v in values]
    ends = np.cumsum([len(r) for r in raw])
    strings = Strings(memoryview(b"".join(raw)), ends - [len(r) for r in raw], ends)
    return Value(GGUFValueType.ARRAY, strings, GGUFValueType.STRING)


BROKEN = {
    "no tokens": {"tokens": None},
    "no types": {"token_type": None},
    "too few types": {"token_type": numbers(1, 1, 1)},
    "a token twice": {"tokens": words(*"aa"), "token_type": numbers(1, 1), "merges": words()},
    "a merge of one word": {"merges": words("ab")},
    "a merge of unknown words": {"merges": words("中 中")},
    "a merge into an unknown word": {"tokens": words(*"ab"), "token_type": numbers(1, 1), "merges": words("a b")},
    "tokens that are numbers": {"tokens": numbers(*range(512))},
    "merges that are numbers": {"merges": numbers(1, 2)},
    "types that are texts": {"token_type": words(*["1?"] * 512)},
    "tokens that are a text": {"tokens": text("abc")},
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_vocabulary_is_a_typed_error(tiny, case):
    with pytest.raises(EdgeloraError):
        read_tokenizer(opened(tiny, **BROKEN[case]))


@pytest.mark.real
def test_nothing_merges_across_a_byte_without_a_token(smollm):
    assert open_base(smollm).tokenizer.encode("/\x06<").ids == [31, 44]  # llama.cpp's ids; 31194 is "/<"
