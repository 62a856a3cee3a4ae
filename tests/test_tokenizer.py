"""Our ids are llama.cpp's ids: on recorded cases, and on any text for every tokenizer that we claim to know."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import gguf
import llama_cpp
import pytest
from gguf.constants import TokenType
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, trainers

from edgelora.data.pretokenizers import PRE_TOKENIZERS
from edgelora.data.tokenizer import Encoded, Tokenizer
from edgelora.data.vocabulary import (
    BYTE_OF,
    BYTE_TOKENS,
    Vocabulary,
    checked,
    vocabulary_from_folder,
    vocabulary_from_gguf,
)
from edgelora.files.gguf import GGUFFile
from runtime.binding import Model

ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
# what pre-tokenizers disagree about: kinds of white space and digits, contractions, joiners, case, special tokens
AWKWARD = [
    " ", "  ", "\t", "\n", "\r", "\r\n", "\x0b", "\x1c", "\x85", "\xa0", "\u1680", "\u180e", "\u2003", "\u2028",
    "\u200b", "\u3000", "\ufeff", "\x00", "'s", "'S", "'ll", "'RE", "'ſ", "’s", "it's", "7", "12", "345", "２", "½",
    "Ⅷ", "²", "٣", "a", "A", "Ab", "aB", "ß", "é", "e\u0301", "ſ", "K", "İ", "ǅ", "ʰ", "中", "한", "한국", "\U0001f600",
    "\u200d", "\ue000", "\U000e0100", "\U0010ffff", "_", ".", "!!", "/", "$", "`", "▁", "<0x0A>",
    "<|im_end|>", "<|im_start|>", "<|endoftext|>", "<|im_", "</s>", "<s>", "<unk>", "[x]", "[x][",
]  # fmt: skip
AWKWARD_TEXT = st.lists(st.sampled_from(AWKWARD), max_size=12).map("".join)
TEXT = st.one_of(ANY_TEXT, AWKWARD_TEXT)
ORACLE = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
ENDS = {"bos": 0, "eos": 1}


def typed(tokens, kinds: dict[str, TokenType]) -> tuple[TokenType, ...]:
    return tuple(kinds.get(token, TokenType.NORMAL) for token in tokens)


@pytest.fixture(scope="module")
def merged() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Tokens and merges of awkward text that nothing cut into words: wherever llama.cpp cuts it, the ids change."""
    draw = random.Random(0)
    bpe = Backend(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=2500,
        special_tokens=["<s>", "</s>", "<unk>", "[x]", "<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        max_token_length=12,
        show_progress=False,
    )
    bpe.train_from_iterator(("".join(draw.choices(AWKWARD, k=12)) for _ in range(2000)), trainer)
    model = json.loads(bpe.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    # a word that no merge makes: only a pre-tokenizer that ignores merges finds it
    return (*tokens, "Ġword"), tuple(" ".join(pair) for pair in model["merges"])


def byte_level(merged, pre: str) -> Vocabulary:
    tokens, merges = merged
    kinds = {"<s>": TokenType.CONTROL, "</s>": TokenType.NORMAL, "[x]": TokenType.USER_DEFINED}
    return Vocabulary("gpt2", pre, tokens, typed(tokens, kinds), merges=merges, ids=ENDS)


def sentencepiece(**changes) -> Vocabulary:
    """Scores with many equals and in no order, tokens that reach across spaces, and one without its characters."""
    texts = [
        *"ab12é中▁ <>|/s[x]!'.",
        "ab",
        "ba",
        "aba",
        "bab",
        "▁a",
        "▁ab",
        "a▁b",
        "▁▁",
        "▁▁▁",
        "12",
        "é中",
        "b▁",
        "▁b▁a",
    ]
    texts += ["<s", "/s", "/s>", "\n\n", "한국", "국한", "!!", "'s", "..", "  ", "[x]", "[x][", "unused", "ſK"]
    tokens = ("<unk>", "<s>", "</s>", "<|endoftext|>", *BYTE_TOKENS, *dict.fromkeys(texts))
    kinds = dict.fromkeys(BYTE_TOKENS, TokenType.BYTE)
    kinds |= {"<unk>": TokenType.UNKNOWN, "<s>": TokenType.CONTROL, "</s>": TokenType.CONTROL}
    kinds |= {"[x]": TokenType.USER_DEFINED, "  ": TokenType.USER_DEFINED, "[x][": TokenType.USER_DEFINED}
    draw = random.Random(0)
    scores = tuple(float(draw.choice([-1, -1, -2, -3, -1000, 0])) for _ in tokens)
    whole = Vocabulary("llama", "default", tokens, typed(tokens, kinds | {"unused": TokenType.UNUSED}), scores, ids={})
    return replace(whole, **changes)


VOCABULARIES = {
    **{pre: lambda merged, pre=pre: byte_level(merged, pre) for pre in PRE_TOKENIZERS},
    "sentencepiece": lambda _: sentencepiece(),
    "without a space in front": lambda _: sentencepiece(add_space_prefix=False),
    "space stripped": lambda _: sentencepiece(strip_after_special=True),
    "space stripped, BPE": lambda merged: replace(byte_level(merged, "qwen2"), strip_after_special=True),
}
FILES = ["stories", pytest.param("smollm", marks=pytest.mark.real), pytest.param("gemma", marks=pytest.mark.real)]


# What does not depend on where a text is cut: one of each kind is enough.
each_kind = pytest.mark.parametrize(
    "path", ["llama-bpe", "sentencepiece", "without a space in front", "space stripped", *FILES], indirect=True
)


def write(path, vocabulary: Vocabulary):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("Phi-3" if vocabulary.strip_after_special else "any")
    vocabulary.add_to(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def stories(shared_data):
    return shared_data / "models" / "stories260K" / "stories260K-f32.gguf"


@pytest.fixture(params=[*VOCABULARIES, *FILES], scope="module")
def path(request, tmp_path_factory):
    if request.param not in VOCABULARIES:
        return request.getfixturevalue(request.param)
    folder = tmp_path_factory.mktemp("vocabulary")
    vocabulary = VOCABULARIES[request.param](request.getfixturevalue("merged"))
    return write(folder / "vocabulary.gguf", checked(vocabulary, folder))


@pytest.fixture(scope="module")
def tokenizer(path):
    return Tokenizer(vocabulary_from_gguf(GGUFFile(path)))


@pytest.fixture(scope="module")
def llama(path):
    """The oracle: llama.cpp's own vocabulary of the same file."""
    model = Model(path, vocabulary_only=True)
    yield model
    model.close()


# -- the oracle ---------------------------------------------------------------------------------------------------


@ORACLE
@given(TEXT, st.booleans())
@example("".join(AWKWARD), False)
@example("".join(AWKWARD), True)
@example(" ".join(reversed(AWKWARD)), True)
@example("a word  word \n word", False)
def test_ids_are_those_of_llama_cpp(tokenizer, llama, text, parse_special):
    expected = llama.tokenize(text, parse_special=parse_special)
    assert tokenizer.encode(text, parse_special=parse_special).ids == expected


@each_kind
def test_generation_ends_where_llama_cpp_ends_it(tokenizer, llama):
    assert tokenizer.eog_ids == tuple(i for i in range(llama.n_vocab) if llama.ends_generation(i))
    assert tokenizer.eog_ids


@each_kind
def test_pieces_are_those_of_llama_cpp(tokenizer, llama):
    for token in [*range(300), *range(300, llama.n_vocab, 1 + llama.n_vocab // 500)]:
        assert tokenizer.piece(token) == llama.piece(token)


@pytest.mark.parametrize("pre", {row.splits: name for name, row in PRE_TOKENIZERS.items()}.values())
def test_every_character_is_split_as_llama_cpp_splits_it(merged, tmp_path, pre):
    # between letters, digits, spaces and itself: where the class of a character changes the split, the ids change
    vocabulary = byte_level(merged, pre)
    tokenizer, llama = Tokenizer(vocabulary), Model(write(tmp_path / "v.gguf", vocabulary), vocabulary_only=True)

    def differ(characters: list[str]) -> bool:
        text = "\n".join(f"a{c}b {c}{c} 1{c}" for c in characters)
        return tokenizer.encode(text).ids != llama.tokenize(text, parse_special=False)

    plane = [chr(c) for c in range(1, 0x10000) if not 0xD800 <= c < 0xE000]
    rows = [plane[first : first + 256] for first in range(0, len(plane), 256)]
    assert [f"U+{ord(c):04X}" for row in rows if differ(row) for c in row if differ([c])] == []
    llama.close()


# -- recorded cases: 40 texts with the ids that four real models must give them, special tokens read or not -----


def recorded(shared_data, kind: str) -> list[dict]:
    lines = (shared_data / "tokenizers" / "cases.jsonl").read_text(encoding="utf-8").split("\n")
    return [case for line in lines if line for case in [json.loads(line)] if case["kind"] == kind]


@pytest.fixture
def qwen(shared_data, tmp_path) -> Vocabulary:
    """Only its tokenizer.json is at hand, and what its config says of the vocabulary."""
    (tmp_path / "tokenizer.json").symlink_to(shared_data / "tokenizers" / "qwen2.5.tokenizer.json")
    (tmp_path / "config.json").write_text('{"vocab_size": 151936, "bos_token_id": 151643, "eos_token_id": 151645}')
    return vocabulary_from_folder(tmp_path)


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("qwen2.5", "qwen"), ("stories260K", "stories"),
        pytest.param("smollm2", "smollm", marks=pytest.mark.real),
        pytest.param("gemma3", "gemma", marks=pytest.mark.real),
    ],
)  # fmt: skip
def test_recorded_texts(shared_data, request, name, source):
    found = request.getfixturevalue(source)
    tokenizer = Tokenizer(found if isinstance(found, Vocabulary) else vocabulary_from_gguf(GGUFFile(found)))
    cases = recorded(shared_data, "text")
    assert len(cases) == 80
    wrong = [c for c in cases if tokenizer.encode(c["text"], parse_special=c["parse_special"]).ids != c[name]]
    assert wrong == []


@pytest.mark.real
@pytest.mark.parametrize(("name", "source"), [("smollm2", "smollm"), ("gemma3", "gemma")])
def test_recorded_chats(shared_data, request, name, source):
    tokenizer = Tokenizer(vocabulary_from_gguf(GGUFFile(request.getfixturevalue(source))))
    cases = [case for case in recorded(shared_data, "chat") if case["model"] == name]
    for case in cases:
        encoded = tokenizer.encode(case["prompt"], parse_special=True).ids
        bos = [tokenizer.bos_id] if tokenizer.add_bos and encoded[:1] != [tokenizer.bos_id] else []
        assert bos + encoded == case["ids"]


# -- invariants ---------------------------------------------------------------------------------------------------


@each_kind
@settings(parent=ORACLE, max_examples=50)
@given(TEXT)
def test_offsets_cover_the_text_in_order(tokenizer, text):
    encoded = tokenizer.encode(text)
    starts, ends = [s for s, _ in encoded.offsets], [e for _, e in encoded.offsets]
    assert starts == sorted(starts)
    assert ends == sorted(ends)
    assert all(s < e <= len(text) for s, e in encoded.offsets)
    spelled = [tokenizer.decode(tokenizer.encode(c).ids) == c for c in text]  # SmolLM2's vocabulary lacks a few bytes
    stripped = tokenizer.vocabulary.strip_after_special
    if all(spelled) and not stripped:
        assert {i for s, e in encoded.offsets for i in range(s, e)} == set(range(len(text)))


ordinary = pytest.mark.parametrize("path", ["llama-bpe", *FILES], indirect=True)


@ordinary
@settings(parent=ORACLE, max_examples=50)
@given(TEXT)
def test_decoding_gives_the_text_back(tokenizer, text):
    # ▁ is a space to SentencePiece, and SmolLM2's vocabulary lacks a few bytes
    text = "".join(c for c in text if tokenizer.decode(tokenizer.encode(c).ids) == c)
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


@ordinary
def test_what_is_done_to_ids_changes_nobody_elses(tokenizer):
    first = tokenizer.encode("light on")
    ids, offsets = list(first.ids), list(first.offsets)
    first.ids.append(0)
    first.offsets.clear()
    assert tokenizer.encode("light on") == Encoded(ids, offsets)


@ordinary
def test_plain_text_gives_no_control_tokens(tokenizer):
    for text in tokenizer.control:
        assert not set(tokenizer.encode(f"a {text} b{text}{text}").ids) & set(tokenizer.control.values())


def test_the_bytes_of_one_character_share_its_place():
    encoded = Tokenizer(sentencepiece()).encode("a\U0001f600b")
    assert encoded.offsets == [(0, 1), (1, 2), (1, 2), (1, 2), (1, 2), (2, 3)]


def test_the_space_in_front_belongs_to_the_first_character():
    tokenizer = Tokenizer(sentencepiece())
    encoded = tokenizer.encode("éé")
    assert [tokenizer.tokens[i] for i in encoded.ids] == ["▁", "é", "é"]
    assert encoded.offsets == [(0, 1), (0, 1), (1, 2)]


@each_kind
def test_special_tokens_are_read_out_of_text_only_when_asked_to(tokenizer):
    assert tokenizer.control
    for text, token in [*tokenizer.control.items()][:200]:
        assert token in tokenizer.encode(f"a {text} b", parse_special=True).ids
        assert tokenizer.control_pattern.fullmatch(text)
        assert tokenizer.decode([token]) == ""
        assert tokenizer.piece(token, special=True) == text.encode()


def changed(vocabulary: Vocabulary) -> list[Vocabulary]:
    tokens = (*vocabulary.tokens[:-1], "x!")
    types = (*vocabulary.types[:-1], TokenType.USER_DEFINED)
    return [
        replace(vocabulary, tokens=tokens), replace(vocabulary, types=types), replace(vocabulary, add_bos=False),
        replace(vocabulary, strip_after_special=True), replace(vocabulary, add_eos=True),
    ]  # fmt: skip


def test_a_digest_for_each_vocabulary(merged):
    spm, bpe = sentencepiece(), byte_level(merged, "llama-bpe")
    others = [
        *changed(spm), replace(spm, scores=(1.5, *spm.scores[1:])), replace(spm, add_space_prefix=False),
        *changed(bpe), replace(bpe, merges=bpe.merges[1:]), replace(bpe, pre="qwen2"),
    ]  # fmt: skip
    assert Tokenizer(spm).sha256 == Tokenizer(sentencepiece(add_bos=True, add_space_prefix=True, add_eos=False)).sha256
    assert len({Tokenizer(v).sha256 for v in (spm, bpe, *others)}) == 2 + len(others)


@pytest.mark.parametrize(
    ("vocabulary", "stated", "begins"),
    [("sentencepiece", None, True), ("sentencepiece", False, False), ("llama-bpe", None, True), ("tekken", None, True),
     ("llama-bpe", False, False), ("qwen2", None, False), ("qwen2", True, True), ("smaug-bpe", None, False)],
)  # fmt: skip
def test_bos_is_added_where_llama_cpp_adds_it(merged, tmp_path, vocabulary, stated, begins):
    whole = replace(VOCABULARIES[vocabulary](merged), add_bos=stated)
    model = Model(write(tmp_path / "v.gguf", whole), vocabulary_only=True)
    assert Tokenizer(whole).add_bos == begins == bool(llama_cpp.llama_vocab_get_add_bos(model._vocabulary))
    model.close()


SPOKEN = ["<|end|>", "<|call|>", "<|return|>", "<|flush|>", "<|channel|>", "<|tool_response>", "</s>", "<fim_pad>",
          "<reponame>", "<|file_sep|>", "<|eom_id|>", "<fim_prefix>", "<eos>", "<|im_end|>"]  # fmt: skip


@settings(parent=ORACLE, max_examples=40)
@given(st.sets(st.sampled_from(SPOKEN)), st.sampled_from([TokenType.NORMAL, TokenType.CONTROL, TokenType.USER_DEFINED]))
def test_tokens_known_by_their_texts(tmp_path, texts, kind):
    tokens = tuple(dict.fromkeys(("<s>", "end", *sorted(BYTE_OF), *sorted(texts))))
    vocabulary = Vocabulary(
        "gpt2", "qwen2", tokens, typed(tokens, dict.fromkeys(texts, kind)), merges=("a b",), ids=ENDS
    )
    vocabulary = replace(vocabulary, tokens=(*tokens, "ab"), types=(*vocabulary.types, TokenType.NORMAL))
    tokenizer, model = Tokenizer(vocabulary), Model(write(tmp_path / "v.gguf", vocabulary), vocabulary_only=True)
    assert tokenizer.eog_ids == tuple(i for i in range(model.n_vocab) if model.ends_generation(i))
    assert [tokenizer.piece(i) for i in range(model.n_vocab)] == [model.piece(i) for i in range(model.n_vocab)]
    for parse_special in (True, False):
        text = "x".join(SPOKEN)
        expected = model.tokenize(text, parse_special=parse_special)
        assert tokenizer.encode(text, parse_special=parse_special).ids == expected
    model.close()
