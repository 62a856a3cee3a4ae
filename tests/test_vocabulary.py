"""A vocabulary is the same whichever file it was read from, and what cannot be kept in a GGUF file is refused."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import sentencepiece
import transformers
from gguf.constants import GGUFValueType, TokenType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from edgelora.data.hf_vocabulary import read_folder
from edgelora.data.pretokenizers import GPT2, HF_PRE_TOKENIZERS
from edgelora.data.tokenizer import Tokenizer
from edgelora.data.vocabulary import BYTE_OF, BYTE_TOKENS, Vocabulary, vocabulary_from_folder, vocabulary_from_gguf
from edgelora.errors import BaseModelError, EdgeloraError, FileFormatError
from edgelora.files.gguf import GGUFFile, Strings, Value
from runtime.binding import Model

ROWS = [
    "the light is on, the light's off", "12345 lights in 2024", "C'est l'été à Noël: 3,5 °C", "日本語のテキスト",
    "  def f(x):\n\n    return x ** 2\t# it's\n", "I'LL be THERE, CamelCase_and-more!!!", "Привет, мир 🙂🙂",
] * 20  # fmt: skip
TEXT = st.text(st.sampled_from("aehilt sT'LMd12345.,!\n\t_#éà日本П🙂"), max_size=40)
ORACLE = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def ids_of_llama_cpp(vocabulary: Vocabulary, path: Path) -> Model:
    writer = gguf.GGUFWriter(path, "llama")
    if vocabulary.strip_after_special:
        writer.add_name("Phi-3")
    vocabulary.add_to(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return Model(path, vocabulary_only=True)


def write_json(folder: Path, **files: object) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


# -- byte-level BPE ---------------------------------------------------------------------------------------------


def trained(splits: tuple[str, ...], ignore_merges: bool = False) -> Backend:
    backend = Backend(models.BPE(ignore_merges=ignore_merges))
    stages = [pre_tokenizers.Split(Regex(r), "isolated") for r in splits]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*stages, byte_level])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<s>", "</s>"], show_progress=False, initial_alphabet=sorted(BYTE_OF)
    )
    backend.train_from_iterator(ROWS, trainer)
    return backend


def saved(backend: Backend, folder: Path, **files: object) -> Path:
    files.setdefault("tokenizer_config", {"bos_token": "<s>", "eos_token": {"content": "</s>"}})
    return write_json(folder, tokenizer=json.loads(backend.to_str()), **files)


@pytest.fixture(scope="module", params=HF_PRE_TOKENIZERS, ids=HF_PRE_TOKENIZERS.values())
def original(request, tmp_path_factory):
    """A tokenizer of HF's with each of the splits that we know, and llama.cpp over what we made of it."""
    splits, ignore_merges = request.param
    backend = trained(splits, bool(ignore_merges))
    folder = tmp_path_factory.mktemp("bpe")
    vocabulary = vocabulary_from_folder(saved(backend, folder))
    assert vocabulary.pre == HF_PRE_TOKENIZERS[request.param]
    model = ids_of_llama_cpp(vocabulary, folder / "v.gguf")
    yield backend, vocabulary, model
    model.close()


@ORACLE
@given(TEXT)
def test_llama_cpp_gives_the_ids_of_the_original(original, text):
    backend, vocabulary, model = original
    assert model.tokenize(text, parse_special=False) == Tokenizer(vocabulary).encode(text).ids
    if vocabulary.pre not in ("tekken", "gpt-4o") or text.isascii():  # llama.cpp knows no case beyond ASCII
        assert model.tokenize(text, parse_special=False) == backend.encode(text, add_special_tokens=False).ids


# as they stand in the files of Mistral-Nemo, gpt-4o (Phi-4-mini), Llama 3 and Qwen2
PUBLISHED = {
    "tekken": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "gpt-4o": r""
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
}


@pytest.mark.parametrize("pre", PUBLISHED)
def test_the_table_has_the_patterns_that_are_published(pre):
    assert {(splits, name) for (splits, _), name in HF_PRE_TOKENIZERS.items()} >= {((PUBLISHED[pre],), pre)}


@pytest.mark.parametrize("pre", ["qwen2", "smollm"])
def test_a_vocabulary_survives_its_gguf(pre, tmp_path):
    (splits, ignore), _ = next(item for item in HF_PRE_TOKENIZERS.items() if item[1] == pre)
    vocabulary = vocabulary_from_folder(saved(trained(splits, ignore), tmp_path))
    vocabulary = replace(
        vocabulary, add_bos=True, add_eos=False, ids=vocabulary.ids | {"eot": 5, "fim_pre": 7, "pad": 8}
    )
    ids_of_llama_cpp(vocabulary, tmp_path / "v.gguf").close()
    assert vocabulary_from_gguf(GGUFFile(tmp_path / "v.gguf")) == vocabulary


def gpt2(**changes: object) -> Backend:
    backend = Backend(models.BPE(vocab={t: i for i, t in enumerate(["<s>", "</s>", *sorted(BYTE_OF)])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for name, value in changes.items():
        setattr(backend, name, value)
    return backend


def after(stage: object, use_regex: bool = True) -> object:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    return pre_tokenizers.Sequence([stage, byte_level])


@pytest.mark.parametrize(
    ("pre_tokenizer", "name"),
    [
        (pre_tokenizers.ByteLevel(add_prefix_space=False), "gpt-2"),
        (after(pre_tokenizers.Digits(True)), "smollm"),
        (after(pre_tokenizers.Split(Regex(GPT2), "removed", invert=True), use_regex=False), "gpt-2"),
    ],
)  # fmt: skip
def test_other_ways_to_say_the_same_splits(pre_tokenizer, name, tmp_path):
    folder = saved(gpt2(pre_tokenizer=pre_tokenizer, normalizer=normalizers.NFC()), tmp_path)
    assert vocabulary_from_folder(folder).pre == name


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)}, "add_prefix_space"),
        ({"pre_tokenizer": pre_tokenizers.Whitespace()}, "Whitespace"),
        ({"pre_tokenizer": after(pre_tokenizers.Split(Regex(r"\d+"), "isolated"))}, r"\d+"),
        ({"pre_tokenizer": after(pre_tokenizers.Split(Regex(GPT2), "merged_with_next"))}, "MergedWithNext"),
        ({"pre_tokenizer": after(pre_tokenizers.Digits(False))}, "Digits"),
        ({"normalizer": normalizers.Lowercase()}, "Lowercase"),
        ({"model": models.BPE(vocab={"<s>": 0, "</s>": 1}, merges=[], ignore_merges=True)}, "ignore_merges"),
    ],
)  # fmt: skip
def test_what_llama_cpp_would_do_otherwise_is_refused(changes, reason, tmp_path):
    with pytest.raises(BaseModelError) as caught:
        vocabulary_from_folder(saved(gpt2(**changes), tmp_path))
    assert "cannot be kept in a GGUF file" in caught.value.what
    assert reason in caught.value.what


def test_added_tokens_and_padding(tmp_path):
    backend = gpt2()
    backend.add_special_tokens([AddedToken("<think>", special=True)])
    backend.add_tokens([AddedToken("a▁b"), AddedToken("<|tool|>"), AddedToken("<note>")])
    decoder = {"261": {"content": "<note>", "special": True}}
    config = {"bos_token": "<s>", "eos_token": "</s>", "added_tokens_decoder": decoder}
    v = vocabulary_from_folder(saved(backend, tmp_path, tokenizer_config=config, config={"vocab_size": 264}))
    kinds = dict(zip(v.tokens, v.types, strict=True))
    assert len(v.tokens) == 264
    assert v.tokens[258:] == ("<think>", "a b", "<|tool|>", "<note>", "[PAD262]", "[PAD263]")
    assert kinds["a b"] == TokenType.USER_DEFINED
    assert {kinds[t] for t in ("<think>", "<|tool|>", "<note>")} == {TokenType.CONTROL}
    assert {kinds[t] for t in ("[PAD262]", "[PAD263]")} == {TokenType.UNUSED}


def test_special_ids_come_from_names_then_from_numbers(tmp_path):
    config = {"text_config": {"eos_token_id": 7, "pad_token_id": 9, "vocab_size": 258}}
    names = {"bos_token": "<s>", "unk_token": "nowhere"}
    generation = {"eos_token_id": [7, 1, 12, 13]}
    folder = saved(gpt2(), tmp_path, tokenizer_config=names, config=config, generation_config=generation)
    v = vocabulary_from_folder(folder)
    # llama.cpp ends at </s> anyway
    assert v.ids == {"bos": 0, "eos": 7, "pad": 9, "eot": 12, "eom": 13}
    assert {1, 7, 12, 13} == set(Tokenizer(v).eog_ids)


def framed(template: str) -> object:
    return processors.TemplateProcessing(template, special_tokens=[("<s>", 0), ("</s>", 1)])


@pytest.mark.parametrize(
    ("processor", "config", "adds"),
    [
        (None, {}, (None, None)),
        (None, {"add_bos_token": True, "add_eos_token": False}, (True, False)),
        (processors.ByteLevel(), {"add_bos_token": True}, (False, False)),
        (framed("<s> $A"), {"add_bos_token": False}, (True, None)),
        (processors.Sequence([processors.ByteLevel(), framed("<s> $A </s>")]), {}, (True, True)),
    ],
)  # fmt: skip
def test_who_says_whether_bos_and_eos_are_added(processor, config, adds, tmp_path):
    backend = gpt2() if processor is None else gpt2(post_processor=processor)
    names = {"bos_token": "<s>", "eos_token": "</s>", **config}
    v = vocabulary_from_folder(saved(backend, tmp_path, tokenizer_config=names))
    assert (v.add_bos, v.add_eos) == adds


# -- added tokens: one list, whichever files name them ------------------------------------------------------------

ADDED = {"<|im_start|>": True, "<|im_end|>": True, "<note>": False}  # text → whether it is special
CHAT = "<|im_start|>user\nthe light<note> is on<|im_end|>\n"


def adding(tokenizer: dict, first: int, *sources: str) -> dict[str, object]:
    """The files of a tokenizer.json with ADDED, from id `first` on, in those of the sources that are named."""
    numbered = {first + i: {"content": t, "special": special} for i, (t, special) in enumerate(ADDED.items())}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    files = {
        "config": {"vocab_size": first + len(ADDED), "eos_token_id": 1},
        "tokenizer_config": {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"},
        "tokenizer": tokenizer,
    }
    if "tokenizer" in sources:
        files["tokenizer"] = tokenizer | {
            "added_tokens": [*tokenizer["added_tokens"], *({"id": i} | flags | t for i, t in numbered.items())]
        }
    if "tokenizer_config" in sources:
        decoder = {str(i): flags | t for i, t in numbered.items()}
        files["tokenizer_config"]["added_tokens_decoder"] = decoder
    if "added_tokens" in sources:
        files["added_tokens"] = {t["content"]: i for i, t in numbered.items()}
    return files


SOURCES = [("tokenizer",), ("tokenizer_config",), ("added_tokens",), ("tokenizer", "tokenizer_config", "added_tokens")]
each_source = pytest.mark.parametrize("sources", SOURCES, ids=" ".join)


@each_source
def test_added_tokens_have_the_ids_of_transformers(tmp_path, sources):
    backend = trained(next(splits for (splits, _), pre in HF_PRE_TOKENIZERS.items() if pre == "qwen2"))
    first = backend.get_vocab_size()
    v = vocabulary_from_folder(write_json(tmp_path, **adding(json.loads(backend.to_str()), first, *sources)))
    original = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert original.convert_tokens_to_ids(list(ADDED)) == [v.tokens.index(t) for t in ADDED]
    assert Tokenizer(v).encode(CHAT, parse_special=True).ids == original.encode(CHAT, add_special_tokens=False)
    assert v.ids["eos"] == original.eos_token_id == first + 1
    assert [v.types[v.tokens.index(t)] for t in ADDED] == [
        TokenType.CONTROL if special else TokenType.USER_DEFINED for special in ADDED.values()
    ]
    plain = Tokenizer(v).encode(CHAT).ids
    assert not {first, first + 1} & set(plain)
    assert first + 2 in plain


@each_source
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_added_tokens_beside_sentencepiece_have_the_ids_of_transformers(stories, tmp_path, name, sources):
    tokenizer = json.loads((stories / "tokenizer.json").read_text(encoding="utf-8"))
    write_json(tmp_path, **adding(tokenizer, 512, *sources))
    shutil.copy(stories / name, tmp_path) if name == "tokenizer.model" else None
    v = vocabulary_from_folder(tmp_path)
    original = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert original.convert_tokens_to_ids(list(ADDED)) == [512, 513, 514] == [v.tokens.index(t) for t in ADDED]
    ids, expected = Tokenizer(v).encode(CHAT, parse_special=True).ids, original.encode(CHAT)
    assert [i for i in ids if i >= 512] == [512, 514, 513]
    assert [i for i in expected if i in (512, 513)] == [512, 513]  # <note> is looked for behind a ▁ if none says how
    assert v.ids["eos"] == original.eos_token_id == 513
    if name == "tokenizer.model":  # what the sentencepiece model says of its own tokens counts
        assert v.types[:3] == (TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL)
        assert v.scores[:512] == vocabulary_from_folder(stories).scores


CLASHES = {
    "two ids for a text": ({"<|im_end|>": 9}, "'<|im_end|>' is 603 in tokenizer_config.json, but also 9"),
    "two texts for an id": ({"<other>": 603}, "603 is '<|im_end|>' in tokenizer_config.json, but also '<other>'"),
    "a trained text with another id": ({"a": 700}, "the added token 'a' with the id 700"),
    "another text for a trained id": ({"<b>": 5}, "the added token '<b>' with the id 5"),
}


@pytest.mark.parametrize("case", CLASHES)
def test_files_that_disagree_about_a_token_are_refused(tmp_path, case):
    added, reason = CLASHES[case]
    tokenizer = json.loads(gpt2().to_str())
    files = adding(tokenizer, 602, "tokenizer_config") | {"added_tokens": added, "config": {}}
    with pytest.raises(BaseModelError) as caught:
        vocabulary_from_folder(write_json(tmp_path, **files))
    assert reason in caught.value.what


@pytest.mark.parametrize("name", ["eos", "bos"])
@pytest.mark.parametrize("file", ["tokenizer_config", "special_tokens_map"])
def test_a_name_without_an_id_is_refused(tmp_path, name, file):
    names = {"tokenizer_config": {"eos_token" if name == "bos" else "bos_token": "<s>"}}
    names[file] = names.get(file, {}) | {f"{name}_token": {"content": "<|im_end|>"}}
    folder = saved(gpt2(), tmp_path, **names, config={"vocab_size": 258, "eos_token_id": 1, "bos_token_id": 0})
    with pytest.raises(BaseModelError) as caught:
        vocabulary_from_folder(folder)
    assert f"names '<|im_end|>' as {name}, and no file gives it an id" in caught.value.what


def test_special_tokens_map_names_what_tokenizer_config_does_not(tmp_path):
    folder = saved(gpt2(), tmp_path, tokenizer_config={"bos_token": "</s>"}, special_tokens_map={
        "eos_token": {"content": "</s>"}, "bos_token": "<s>", "pad_token": "<s>",
    })  # fmt: skip
    assert vocabulary_from_folder(folder).ids == {"bos": 1, "eos": 1, "pad": 0}


@pytest.mark.parametrize(("generation", "ends"), [({}, [7, 12, 13]), ({"eos_token_id": [7, 14]}, [7, 14])])
def test_several_ends_in_config_json(tmp_path, generation, ends):
    config = {"eos_token_id": [7, 12, 13], "bos_token_id": True}
    folder = saved(gpt2(), tmp_path, tokenizer_config={}, config=config, generation_config=generation)
    v = vocabulary_from_folder(folder)
    assert v.ids == dict(zip(("eos", "eot", "eom"), ends, strict=False))
    assert {1, *ends} == set(Tokenizer(v).eog_ids)  # llama.cpp ends at </s> anyway


# -- SentencePiece ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stories(shared_data):
    return shared_data / "models" / "stories260K"


def test_a_checkpoint_and_its_gguf_have_one_vocabulary(stories):
    found = vocabulary_from_folder(stories)
    of_gguf = vocabulary_from_gguf(GGUFFile(stories / "stories260K-f32.gguf"))
    assert (found.tokens, found.types, found.scores, found.ids) == (
        of_gguf.tokens,
        of_gguf.types,
        of_gguf.scores,
        of_gguf.ids,
    )
    assert Tokenizer(found).sha256 == Tokenizer(of_gguf).sha256


@pytest.fixture(scope="module")
def from_merges(stories, tmp_path_factory):
    """stories260K by its tokenizer.json alone, and by its GGUF."""
    folder = tmp_path_factory.mktemp("stories")
    shutil.copy(stories / "tokenizer.json", folder)
    shutil.copy(stories / "tokenizer_config.json", folder)
    model = Model(stories / "stories260K-f32.gguf", vocabulary_only=True)
    yield Tokenizer(vocabulary_from_folder(folder)), model
    model.close()


@ORACLE
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60) | TEXT)
def test_merges_tell_the_scores(from_merges, text):
    tokenizer, model = from_merges
    assert tokenizer.encode(text).ids == model.tokenize(text, parse_special=False)


@pytest.mark.parametrize(
    ("merges", "reason"),
    [
        ([["a", "b"], ["b", "c"], ["ab", "c"], ["b", "a"], ["a", "bc"]], "do not stand together"),
        ([["a", "b"], ["b", "c"], ["ab", "c"]], "'a' and 'bc'"),
        ([["a", "b"], ["b", "c"], ["ab", "c"], ["a", "bc"]], None),
    ],
)
def test_merges_that_no_score_can_say_are_refused(merges, reason, tmp_path):
    tokens = ["<unk>", "<s>", "</s>", *BYTE_TOKENS, "▁", *"abc", *dict.fromkeys(a + b for a, b in merges)]
    vocab = {token: i for i, token in enumerate(tokens)}
    model = {"type": "BPE", "vocab": vocab, "merges": merges, "byte_fallback": True, "unk_token": "<unk>"}
    normalizer = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    folder = write_json(tmp_path, tokenizer={"model": model, "normalizer": normalizer})
    if reason is None:
        assert not vocabulary_from_folder(folder).add_space_prefix
        return
    with pytest.raises(BaseModelError) as caught:
        vocabulary_from_folder(folder)
    assert reason in caught.value.what


def piece_model(**options: object) -> bytes:
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(ROWS), model_writer=out, minloglevel=2, **options)  # type: ignore[no-untyped-call]
    return out.getvalue()


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sentencepiece")
    raw = piece_model(
        vocab_size=420, model_type="bpe", byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, user_defined_symbols=["<note>"], character_coverage=0.98,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(raw)
    write_json(folder, config={"vocab_size": 432, "bos_token_id": 1, "eos_token_id": 2})
    return folder


@ORACLE
@given(TEXT)
def test_llama_cpp_gives_the_ids_of_sentencepiece(pieces, text):
    original = sentencepiece.SentencePieceProcessor(model_file=str(pieces / "tokenizer.model"))
    assert Tokenizer(vocabulary_from_folder(pieces)).encode(text).ids == original.encode(text)


def test_added_tokens_of_sentencepiece(pieces, tmp_path):
    shutil.copytree(pieces, tmp_path, dirs_exist_ok=True)
    decoder = {
        "0": {"content": "<unk>", "special": True}, "421": {"content": "<|user|>", "special": False},
        "422": {"content": "a▁b", "special": False}, "500": {"content": "<beyond>", "special": True},
    }  # fmt: skip
    config = {"eos_token": "<|user|>", "add_bos_token": False, "added_tokens_decoder": decoder}
    write_json(tmp_path, tokenizer_config=config, added_tokens={"<extra>": 420, "<|user|>": 421})
    v = vocabulary_from_folder(tmp_path)
    plain = vocabulary_from_folder(pieces)
    assert (plain.add_bos, plain.types[0], plain.tokens[-1]) == (None, TokenType.UNKNOWN, "[PAD431]")
    assert v.tokens[420:424] == ("<extra>", "<|user|>", "a b", "[PAD423]")
    expected = [TokenType.USER_DEFINED, TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNUSED]
    assert [*v.types[420:424]] == expected
    assert v.scores[420:424] == (-1000.0, -1000.0, -1000.0, -10000.0)
    assert (v.types[0], v.ids["eos"], v.add_bos) == (TokenType.CONTROL, 421, False)
    model = ids_of_llama_cpp(v, tmp_path / "v.gguf")
    for text in ("a b<extra>  a▁b<|user|>\nthe light", "<note> it's 🙂"):
        assert Tokenizer(v).encode(text, parse_special=True).ids == model.tokenize(text, parse_special=True)
    model.close()
    assert vocabulary_from_gguf(GGUFFile(tmp_path / "v.gguf")) == v


def test_white_space_behind_the_special_tokens_of_phi_3(pieces, tmp_path):
    shutil.copytree(pieces, tmp_path, dirs_exist_ok=True)
    stripping = {"1": "<s>", "2": "</s>", "420": "<|endoftext|>", "421": "<|user|>", "422": "<|end|>"}
    decoder = {
        i: {"content": text, "special": text != "</s>", "rstrip": text not in ("<s>", "<|endoftext|>")}
        for i, text in stripping.items()
    }
    write_json(tmp_path, tokenizer_config={"added_tokens_decoder": decoder})
    v = vocabulary_from_folder(tmp_path)
    assert v.strip_after_special
    model = ids_of_llama_cpp(v, tmp_path / "v.gguf")
    text = "<|user|>\n the light<|end|> \n<s>\n<|user|>"
    assert Tokenizer(v).encode(text, parse_special=True).ids == model.tokenize(text, parse_special=True)
    model.close()
    decoder["422"]["rstrip"] = False
    assert not vocabulary_from_folder(
        write_json(tmp_path, tokenizer_config={"added_tokens_decoder": decoder})
    ).strip_after_special


@pytest.mark.parametrize(("stated", "space"), [(None, True), (False, False)])
def test_the_space_in_front(pieces, tmp_path, stated, space):
    shutil.copytree(pieces, tmp_path, dirs_exist_ok=True)
    write_json(tmp_path, tokenizer_config={"add_prefix_space": stated})
    v = vocabulary_from_folder(tmp_path)
    assert v.add_space_prefix == space
    assert Tokenizer(v).decode(Tokenizer(v).encode(" a").ids) == " a"


def test_a_unigram_model_is_refused(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(piece_model(vocab_size=330, model_type="unigram", byte_fallback=True))
    with pytest.raises(BaseModelError) as caught:
        vocabulary_from_folder(tmp_path)
    assert "unigram" in caught.value.what


def test_a_sentencepiece_model_without_bytes_is_refused(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(piece_model(vocab_size=150, model_type="bpe"))
    with pytest.raises(BaseModelError) as caught:
        vocabulary_from_folder(tmp_path)
    assert "no tokens for 256 bytes" in caught.value.what


# -- broken folders -----------------------------------------------------------------------------------------------

WHOLE = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2, "</s>": 3}, "merges": ["a b"]}
PRE = {"type": "ByteLevel", "add_prefix_space": False}


def of(**changes: object) -> dict[str, object]:
    return {"tokenizer": {"model": WHOLE | changes, "pre_tokenizer": PRE}}


BROKEN_FOLDERS = {
    "nothing": {},
    "no model": {"tokenizer": {}},
    "a model of words": of(type="WordPiece"),
    "texts for ids": of(vocab={"a": "x"}),
    "negative ids": of(vocab={"a": -1}),
    "one id twice": of(vocab={"a": 0, "b": 1, "ab": 2, "</s>": 2}),
    "a merge of three": of(merges=[["a", "b", "ab"]]),
    "a merge of unknown words": of(merges=["a x"]),
    "dropout": of(dropout=0.1),
    "a prefix inside words": of(continuing_subword_prefix="##"),
    "fewer rows than ids": {**of(), "config": {"vocab_size": 2}},
    "rows without end": {**of(), "config": {"vocab_size": 1 << 40}},
    "rows that are a text": {**of(), "config": {"vocab_size": "many"}},
    "no end": {"tokenizer": of()["tokenizer"], "tokenizer_config": {}},
    "a config that is a list": {**of(), "config": []},
    "an added token without text": {**of(), "tokenizer_config": {"added_tokens_decoder": {"0": {}}}},
    "an added token that is there": {**of(), "tokenizer_config": {}, "added_tokens": []},
    "stages that are a text": {
        "tokenizer": {"model": WHOLE, "pre_tokenizer": {"type": "Sequence", "pretokenizers": "x"}}
    },
    "bytes as merges": {"tokenizer": {"model": WHOLE | {"byte_fallback": True}}},
    "normalizers that are a text": {
        "tokenizer": {"model": WHOLE | {"byte_fallback": True}, "normalizer": {"type": "Sequence", "normalizers": "x"}}
    },
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN_FOLDERS)
def test_a_broken_folder_is_a_typed_error(tmp_path, case):
    with pytest.raises(EdgeloraError):
        vocabulary_from_folder(write_json(tmp_path, **BROKEN_FOLDERS[case]))


def test_the_whole_of_what_was_broken_is_read(tmp_path):
    names = {"eos_token": "</s>"}
    assert vocabulary_from_folder(write_json(tmp_path, **of(), tokenizer_config=names)).merges == ("a b",)


def test_a_model_without_its_type_is_bpe(tmp_path):
    tokenizer = of()["tokenizer"] | {"model": {"vocab": WHOLE["vocab"], "merges": WHOLE["merges"]}}
    folder = write_json(tmp_path, tokenizer=tokenizer, tokenizer_config={"eos_token": "</s>"})
    assert vocabulary_from_folder(folder).merges == ("a b",)


def test_the_files_of_a_slow_tokenizer_alone_say_what_to_do(tmp_path):
    (write_json(tmp_path, vocab=WHOLE["vocab"]) / "merges.txt").write_text("a b\n")
    with pytest.raises(BaseModelError) as caught:
        vocabulary_from_folder(tmp_path)
    assert caught.value.fix == "save it with a fast tokenizer (tokenizer.save_pretrained)"


def test_ids_that_no_file_names_are_told_as_such(tmp_path):
    stated = {"add_bos_token": True}
    with pytest.raises(BaseModelError) as caught:
        vocabulary_from_folder(write_json(tmp_path, **of(), tokenizer_config=stated))
    assert "has no eos_token_id and no bos_token_id" in caught.value.what
    assert "token 11" in caught.value.why
    assert "eos_token, bos_token" in caught.value.fix


def test_tokens_of_any_length_are_read_in_time(tmp_path):
    vocab = WHOLE["vocab"] | {"x" * (1 << 20): 4}
    with pytest.raises(BaseModelError, match="longer than any real one"):
        vocabulary_from_folder(
            write_json(
                tmp_path,
                tokenizer={
                    "model": WHOLE | {"vocab": vocab, "byte_fallback": True},
                    "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
                },
            )
        )


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("raw", [b"", b"IQ== 0\nIg== 1\n", b"\x0a\xff\xff\xff\xff\x0f", b"no text"])
def test_a_broken_sentencepiece_model_is_a_typed_error(pieces, tmp_path, raw, beside):
    if raw == b"no text":
        raw = (pieces / "tokenizer.model").read_bytes().replace(b"<note>", b"<n\xffte>")
    (tmp_path / "tokenizer.model").write_bytes(raw)
    if beside:
        write_json(tmp_path, **of())
    with pytest.raises(FileFormatError) as caught:
        vocabulary_from_folder(tmp_path)
    assert "tokenizer.model" in caught.value.what
    if raw:
        assert ("remove tokenizer.model" in caught.value.fix) == beside


# -- broken GGUF files --------------------------------------------------------------------------------------------


def opened(tiny, **changes: Value | None) -> GGUFFile:
    """The tiny model's file with some of its tokenizer's keys changed (None: taken out)."""
    file = GGUFFile(tiny.path)
    for name, value in changes.items():
        file.metadata.pop(f"tokenizer.ggml.{name}", None)
        if value is not None:
            file.metadata[f"tokenizer.ggml.{name}"] = value
    return file


def text(value: str) -> Value:
    return Value(GGUFValueType.STRING, value)


def numbers(*values: float, kind: type = np.int32) -> Value:
    return Value(GGUFValueType.ARRAY, np.array(values, kind), GGUFValueType.INT32)


def words(*values: str) -> Value:
    raw = [v.encode() for v in values]
    ends = np.cumsum([len(r) for r in raw])
    strings = Strings(memoryview(b"".join(raw)), ends - [len(r) for r in raw], ends)
    return Value(GGUFValueType.ARRAY, strings, GGUFValueType.STRING)


def spm(**changes: Value | None) -> dict[str, Value | None]:
    tokens = ("<unk>", "<s>", "</s>", *BYTE_TOKENS)
    whole = {
        "model": text("llama"), "tokens": words(*tokens), "token_type": numbers(2, 3, 3, *[6] * 256), "merges": None,
        "scores": numbers(*[0.0] * 259, kind=np.float32),
    }  # fmt: skip
    return whole | changes


@pytest.mark.parametrize(
    "changes", [{"pre": text("deepseek-llm")}, {"pre": None}, {"model": text("t5")}, {"model": None}], ids=str
)
def test_an_unknown_tokenizer_is_refused(tiny, changes):
    with pytest.raises(BaseModelError) as caught:
        vocabulary_from_gguf(opened(tiny, **changes))
    assert "is not known" in caught.value.what
    assert "smollm" in caught.value.fix


BROKEN = {
    "no tokens": {"tokens": None},
    "no types": {"token_type": None},
    "too few types": {"token_type": numbers(1, 1, 1)},
    "a type that is none": {"token_type": numbers(*[7] * 512)},
    "a token twice": {"tokens": words(*"aa"), "token_type": numbers(1, 1), "merges": words()},
    "a merge of one word": {"merges": words("ab")},
    "a merge of unknown words": {"merges": words("中 中")},
    "a merge into an unknown word": {"tokens": words(*"ab"), "token_type": numbers(1, 1), "merges": words("a b")},
    "tokens that are numbers": {"tokens": numbers(*range(512))},
    "merges that are numbers": {"merges": numbers(1, 2)},
    "types that are texts": {"token_type": words(*["1?"] * 512)},
    "tokens that are a text": {"tokens": text("abc")},
    "no end": {"eos_token_id": None},
    "an end that is no token": {"eos_token_id": Value(GGUFValueType.UINT32, 512)},
    "a beginning that is none": {"bos_token_id": None, "add_bos_token": Value(GGUFValueType.BOOL, True)},
    "a byte that is none": {"token_type": numbers(*[6] * 512)},
    "a space that is a number": {"add_space_prefix": Value(GGUFValueType.UINT32, 1)},
    "too few scores": spm(scores=numbers(0.0, kind=np.float32)),
    "scores that are texts": spm(scores=words("1", "2")),
    "scores that are no numbers": spm(scores=numbers(*[float("nan")] * 259, kind=np.float32)),
    "not all bytes": spm(tokens=words("<unk>", "<s>", "</s>", *BYTE_TOKENS[1:], "x")),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_vocabulary_is_a_typed_error(tiny, case):
    with pytest.raises(EdgeloraError):
        vocabulary_from_gguf(opened(tiny, **BROKEN[case]))


def test_without_scores_all_are_equal(tiny):
    assert set(vocabulary_from_gguf(opened(tiny, **spm(scores=None))).scores) == {0.0}
    assert set(vocabulary_from_gguf(opened(tiny, **spm())).scores) == {0.0}


def test_a_broken_vocabulary_names_every_fault(tiny):
    with pytest.raises(BaseModelError) as caught:
        vocabulary_from_gguf(opened(tiny, tokens=words(*"aba"), eos_token_id=None))
    for fault in ("'a' stands in it 2 times", "3 tokens but 512 types", "is not of tokens", "no eos_token_id"):
        assert fault in caught.value.what


def test_an_id_beyond_the_vocabulary_is_ignored_as_llama_cpp_does(tiny):
    found = vocabulary_from_gguf(opened(tiny, padding_token_id=Value(GGUFValueType.UINT32, 512)))
    assert "pad" not in found.ids


def test_reading_alone_checks_nothing(tmp_path):
    assert read_folder(write_json(tmp_path, **of())).ids == {}
