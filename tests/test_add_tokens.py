"""A base with more tokens: llama.cpp and transformers read each as one id, and of all others nothing changes."""

from __future__ import annotations

import json
import random
from functools import partial

import numpy as np
import pytest
import torch
import transformers
from gguf import GGUFReader
from gguf.constants import GGMLQuantizationType as Type
from gguf.constants import TokenType
from test_export import make_adapter
from test_resume import data, settings  # noqa: F401
from test_tokenizer import AWKWARD, byte_level, merged, sentencepiece, write  # noqa: F401

from converters.adapter_to_gguf import write_adapter_gguf
from converters.add_tokens import write_with_tokens
from converters.add_tokens_to_hf import write_folder_with_tokens
from converters.base_to_gguf import write_base_gguf
from converters.untie import write_untied
from edgelora.base import ggml
from edgelora.base.decoder import build_decoder
from edgelora.base.model import open_base
from edgelora.cli import run
from edgelora.data.new_tokens import with_tokens
from edgelora.data.tokenizer import Tokenizer
from edgelora.errors import AdapterError, CertificateError, ConfigError, ExportError
from edgelora.evaluate.fidelity import fidelity
from edgelora.peft.adapter import read_adapter, write_adapter
from edgelora.peft.inject import attach
from edgelora.pipeline.add_tokens import add_tokens
from edgelora.pipeline.export import export
from edgelora.training.run import run_training
from edgelora.training.trained_tokens import tokens_of
from runtime.binding import Model
from runtime.scorer import ScoringEngine

pytestmark = pytest.mark.usefixtures("own_home")

NEW = ("<|tool|>", "<tool arg>", "größer🙂")
IDS = np.random.default_rng(0).integers(3, 512, 40).tolist()


def enlarged(base, out, texts=NEW, control=False):
    grown = with_tokens(base.tokenizer, texts, control=control, source=base.path)
    write_with_tokens(out, base, grown)
    return grown, open_base(out)


@pytest.fixture(scope="module")
def larger(tiny, tmp_path_factory):
    """The F32 model with a tied head, and NEW."""
    return enlarged(open_base(tiny.path), tmp_path_factory.mktemp("larger") / "new.gguf")[1]


def in_llama_cpp(base, ids, adapter=None) -> np.ndarray:
    with ScoringEngine(base, n_ctx=64, threads=1) as engine:
        if adapter is not None:
            engine.load("a", adapter)
            engine.use({"a": 1.0})
        return engine.logits([ids], [list(range(len(ids)))])


# -- its ids ------------------------------------------------------------------------------------------------------

KINDS = {
    "merges": partial(byte_level, pre="smollm"),
    "whole words first": partial(byte_level, pre="llama-bpe"),
    "scores": lambda _: sentencepiece(),
    "white space stripped": lambda _: sentencepiece(strip_after_special=True),
}


@pytest.mark.parametrize("control", [False, True], ids=["user-defined", "control"])
@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_gives_the_ids_that_we_give(merged, tmp_path, kind, control):  # noqa: F811
    before = Tokenizer(KINDS[kind](merged))
    grown = with_tokens(before, NEW, control=control, source=tmp_path)
    after, draw = Tokenizer(grown.vocabulary), random.Random(0)
    model = Model(write(tmp_path / "vocabulary.gguf", grown.vocabulary), vocabulary_only=True)
    awkward = [part for part in AWKWARD if part != "\0"]
    try:
        for special in (True, False):
            for text in ["".join(draw.choices([*awkward, *NEW * 8], k=12)) for _ in range(60)]:
                assert after.encode(text, parse_special=special).ids == model.tokenize(text, parse_special=special)
            assert after.encode("".join(NEW), parse_special=True).ids == list(grown.ids)
            plain = "".join(draw.choices(awkward, k=200))
            assert after.encode(plain, parse_special=special).ids == before.encode(plain, parse_special=special).ids
        found = model.tokenize(" ".join(NEW), parse_special=False)
        assert set(found).isdisjoint(grown.ids) if control else set(found) >= set(grown.ids)
    finally:
        model.close()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "'' is empty"),
        ("<|im_end|>", "'<|im_end|>' is a token already (2)"),
        (" the", "' the' is a token already ("),
        ("<|im_end|>user", "holds a control token, which would no longer be read"),
        ("a\0b", "is no text that a GGUF can hold"),
        ("[PAD900]", "is what padding is called"),
        ("<|eot_id|>", "'<|eot_id|>' is a control token to llama.cpp, by its name"),
    ],
)
def test_what_cannot_be_a_new_token_is_refused(tiny, tmp_path, text, said):
    with pytest.raises(ConfigError) as e:
        enlarged(open_base(tiny.path), tmp_path / "new.gguf", ["<fine>", text])
    assert said in e.value.what
    assert "<fine>" not in e.value.what
    assert not (tmp_path / "new.gguf").exists()


def test_all_faults_of_a_list_are_named_and_of_many_a_few(tiny, tmp_path):
    texts = ["<x>", "<x>", "", *(chr(i) for i in range(ord("a"), ord("a") + 6))]
    with pytest.raises(ConfigError, match=r"'<x>' is named 2 times; '' is empty; 'a' is .* and 3 more\n"):
        enlarged(open_base(tiny.path), tmp_path / "new.gguf", texts)


def test_a_control_token_that_plain_text_would_give_is_refused(merged, tmp_path):  # noqa: F811
    """Its halves are tokens, and neighbours that make a token merge; or it is a word, and whole words go first."""
    for vocabulary, text in ((sentencepiece(), "1é"), (byte_level(merged, "llama-bpe"), "tooling")):
        with pytest.raises(ConfigError, match=f"'{text}' would be read out of plain text too"):
            with_tokens(Tokenizer(vocabulary), [text], control=True, source=tmp_path)


def test_one_that_changes_what_others_are_is_refused(merged, tmp_path):  # noqa: F811
    vocabulary = byte_level(merged, "smollm")
    with pytest.raises(ConfigError, match=r"beside one of these llama\.cpp takes '</s>' for a token of another kind"):
        with_tokens(Tokenizer(vocabulary), ["<|tool_response>"], control=True, source=tmp_path)


# -- a GGUF -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "tied"), [(Type.F32, True), (Type.F32, False), (Type.Q8_0, True), (Type.Q4_0, False), (Type.Q4_K, True)]
)
def test_earlier_ids_keep_their_bytes_and_their_logits(make_tiny, tmp_path, kind, tied):
    base = open_base(make_tiny(kind, tied=tied).path)
    grown, made = enlarged(base, tmp_path / "new.gguf")
    for name, info in base.file.tensors.items():
        np.testing.assert_array_equal(made.file.rows(name)[: len(base.file.rows(name))], base.file.rows(name))
        if name in ("token_embd.weight", "output.weight"):
            floats = ggml.dequantize(base.file.rows(name), info.type, 256)
            means = np.stack([floats[list(pieces)].mean(0) for pieces in grown.pieces])
            np.testing.assert_array_equal(made.file.rows(name)[512:515], ggml.quantize(means, kind))
    # 512 rows are a multiple of 64: with another number llama.cpp would leave its fast kernels, and other bits come out
    assert made.config.vocab_size == made.file.get("llama.vocab_size", int) == 576
    now = in_llama_cpp(made, IDS)
    np.testing.assert_array_equal(now[:, :512], in_llama_cpp(base, IDS))
    assert set(now.argmax(1)) <= {*range(515)}
    assert (made.template_source, made.quant, made.lineage) == (base.template_source, base.quant, ())


def test_padding_gives_its_rows_first(larger, tmp_path):
    """As Qwen's models have some; here it is that of the first new tokens."""
    grown, made = enlarged(larger, tmp_path / "more.gguf", ["<one>", "<two>"], control=True)
    assert (list(grown.ids), grown.padding, made.config.vocab_size) == ([515, 516], 0, 576)
    before, after = (base.file.rows("token_embd.weight") for base in (larger, made))
    assert np.flatnonzero((before != after).any(1)).tolist() == [515, 516]
    assert made.vocabulary == grown.vocabulary
    assert [made.vocabulary.types[i] for i in (514, 515, 516, 517)] == [
        TokenType.USER_DEFINED, TokenType.CONTROL, TokenType.CONTROL, TokenType.UNUSED,
    ]  # fmt: skip
    kept = [i for i in range(576) if i not in grown.ids]
    np.testing.assert_array_equal(in_llama_cpp(made, IDS)[:, kept], in_llama_cpp(larger, IDS)[:, kept])


def test_with_the_new_ids_torch_and_llama_cpp_agree(larger):
    ids = [*IDS[:8], 512, 514, *IDS[8:16], 513]
    found = fidelity([(build_decoder(larger).logits(torch.tensor(ids)).numpy(), in_llama_cpp(larger, ids))])
    assert found.kl_mean <= 1e-5
    assert found.same_top == 1.0


def test_an_adapter_belongs_to_the_base_it_was_trained_on(tiny, larger, tmp_path):
    """With new tokens texts have other ids than those it has seen."""
    write_adapter(tmp_path / "old", make_adapter(open_base(tiny.path)))
    with pytest.raises(AdapterError, match="vocab_size is 576, expected 512; the vocabulary is another one"):
        export(larger.path, tmp_path / "old", tmp_path / "old.gguf")
    adapter, ids = make_adapter(larger), [*IDS[:8], 512, 514]
    write_adapter_gguf(tmp_path / "mine.gguf", adapter, larger, "mine", "F32")
    decoder = build_decoder(larger)
    attach(decoder, adapter)
    theirs = in_llama_cpp(larger, ids, tmp_path / "mine.gguf")
    assert fidelity([(decoder.logits(torch.tensor(ids)).numpy(), theirs)]).kl_mean <= 1e-5
    with pytest.raises(AdapterError, match="vocab_size is 512, expected 576"):
        in_llama_cpp(open_base(tiny.path), IDS, tmp_path / "mine.gguf")


@pytest.mark.parametrize(
    "tied",
    [pytest.param(False, id="a head of its own", marks=pytest.mark.exhaustive), pytest.param(True, id="untied")],
)
def test_rows_are_trained_by_the_tokens_texts_and_run_in_llama_cpp(make_tiny, settings, tmp_path, tied):  # noqa: F811
    _, base = enlarged(open_base(make_tiny(tied=tied).path), tmp_path / "new.gguf")
    if tied:
        write_untied(tmp_path / "untied.gguf", base)
        base = open_base(tmp_path / "untied.gguf")
    texts = ("<|tool|>", "größer🙂")
    config = settings(
        tmp_path / "mine",
        base=base.path,
        method="token_rows",
        train_tokens=texts,
        max_steps=2,
        valid=None,
        eval_every=None,
    )
    run_training(config)
    adapter = read_adapter(config.out, base.layers)
    assert {name: ids.tolist() for name, (ids, _) in adapter.token_rows.items()} == {
        "model.embed_tokens": [512, 514], "lm_head": [512, 514],
    }  # fmt: skip
    assert export(base.path, config.out, tmp_path / "mine.gguf").passed
    decoder, ids = build_decoder(base), [*IDS[:8], 512, 514]
    attach(decoder, adapter)
    theirs = in_llama_cpp(base, ids, tmp_path / "mine.gguf")
    assert fidelity([(decoder.logits(torch.tensor(ids)).numpy(), theirs)]).kl_mean <= 1e-5
    assert np.abs(theirs - in_llama_cpp(base, ids)).max() > 1e-3


def test_a_number_that_is_an_added_tokens_text_is_no_id(tiny, settings, tmp_path):  # noqa: F811
    _, base = enlarged(open_base(tiny.path), tmp_path / "new.gguf", ["77"])
    digits = base.tokenizer.tokens.index("7")  # a piece of words: 7 is an id all the same

    def ids(*words):
        return tokens_of(settings(tmp_path / "mine", method="token_rows", train_tokens=words), base).train_tokens

    assert digits != 7
    assert ids("512", "077", "7") == ("7", "77", "512")
    with pytest.raises(ConfigError) as caught:
        ids("77")
    assert str(caught.value).splitlines() == [
        "train_tokens: 77 is an id, and the text of the token 512",
        "  why: the row of the one or of the other would be trained",
        "  fix: pass 512 for the token with this text, 077 for the one with this id",
    ]


@pytest.mark.parametrize("kind", [Type.F32, Type.Q8_0], ids=lambda kind: kind.name)
def test_a_file_with_one_wrong_row_is_not_kept_for_it(make_tiny, tmp_path, monkeypatch, kind):
    """Torch and llama.cpp agree over it; the certificate must say that it is not the base's."""
    base = make_tiny(kind).path

    def write_wrongly(draft, of, grown, _):
        write_with_tokens(draft, of, grown)
        row = of.tokenizer.encode("the").ids[0]
        table = next(one for one in GGUFReader(draft, "r+").tensors if one.name == "token_embd.weight")
        table.data[row] = table.data[row + 1]

    monkeypatch.setattr("edgelora.pipeline.add_tokens.write_with_tokens", write_wrongly)
    with pytest.raises(CertificateError) as caught:
        add_tokens(base, NEW, tmp_path / "new.gguf")
    assert "against the base, on earlier ids: mean KL" in caught.value.what
    assert "against torch" not in caught.value.what
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        "new.gguf.rejected", "new.gguf.rejected.certificate.json",
    ]  # fmt: skip


# -- a checkpoint -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(make_tiny, transformers_model, write_tokenizer, vocabulary, tmp_path_factory):
    """A checkpoint in several shards, its head its own."""
    path = tmp_path_factory.mktemp("checkpoint")
    transformers_model(make_tiny(tied=False)).save_pretrained(path, max_shard_size="2MB")
    write_tokenizer(path, vocabulary, "{% for m in messages %}{{ m.content }}{% endfor %}")
    return path


def test_transformers_reads_and_computes_a_folder_as_we_do(folder, tmp_path):
    made = add_tokens(folder, NEW, tmp_path / "new")
    written = open_base(tmp_path / "new")
    assert made.tokens == {text: 512 + i for i, text in enumerate(NEW)}
    theirs = transformers.AutoTokenizer.from_pretrained(made.path)
    text = "Turn <|tool|><|tool|> on, <tool arg>größer🙂 größer."
    ids = theirs(text, add_special_tokens=False)["input_ids"]
    assert ids == written.tokenizer.encode(text, parse_special=True).ids
    assert [i for i in ids if i >= 512] == [512, 512, 513, 514]
    model = transformers.AutoModelForCausalLM.from_pretrained(made.path).eval()
    with torch.no_grad():
        torch.testing.assert_close(
            build_decoder(written).logits(torch.tensor(ids)), model(torch.tensor([ids])).logits[0], atol=1e-4, rtol=1e-4
        )
        before = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()(torch.tensor([IDS])).logits[0]
        torch.testing.assert_close(model(torch.tensor([IDS])).logits[0, :, :512], before, atol=1e-5, rtol=0)
    # its name says to llama.cpp's converter, and so to ours, what kind it is
    assert ["'<|tool|>' is a control token once this is a GGUF" in note for note in made.notes] == [True]
    assert not made.certificate.faults


def test_a_folders_tokens_stay_when_it_becomes_a_gguf(folder, tmp_path):
    base = open_base(folder)
    grown = with_tokens(base.tokenizer, NEW, control=True, source=folder)
    (tmp_path / "new").mkdir()
    write_folder_with_tokens(tmp_path / "new", base, grown, control=True)
    written = open_base(tmp_path / "new")
    more = with_tokens(written.tokenizer, ["<more>"], control=False, source=folder)
    (tmp_path / "more").mkdir()
    write_folder_with_tokens(tmp_path / "more", written, more, control=False)  # into padding, as Qwen's folders have it
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "more")
    assert theirs("<more><|tool|>", add_special_tokens=False)["input_ids"] == [515, 512]
    assert open_base(tmp_path / "more").vocabulary == more.vocabulary
    write_base_gguf(tmp_path / "new.gguf", written, "F32")
    assert open_base(tmp_path / "new.gguf").vocabulary == written.vocabulary == grown.vocabulary
    assert open_base(tmp_path / "new.gguf").fingerprint == written.fingerprint


@pytest.mark.parametrize("with_json", [True, False], ids=["both files", "tokenizer.model alone"])
def test_a_sentencepiece_folder_keeps_its_tokens(stories, tmp_path, with_json):
    (tmp_path / "base").mkdir()
    for file in stories.iterdir():
        if with_json or file.name != "tokenizer.json":
            (tmp_path / "base" / file.name).write_bytes(file.read_bytes())
    base = open_base(tmp_path / "base")
    grown = with_tokens(base.tokenizer, ["<tool>", "größer🙂"], control=False, source=base.path)
    (tmp_path / "new").mkdir()
    write_folder_with_tokens(tmp_path / "new", base, grown, control=False)
    assert open_base(tmp_path / "new").vocabulary == grown.vocabulary
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "new")
    assert theirs("<tool>größer🙂", add_special_tokens=False)["input_ids"] == [512, 513]


def test_a_folder_whose_ids_transformers_would_count_otherwise_is_refused(folder, tmp_path):
    """Its vocabulary has a gap, and the `tokenizers` library numbers added tokens by its size."""
    (tmp_path / "base").mkdir()
    for file in folder.iterdir():
        (tmp_path / "base" / file.name).write_bytes(file.read_bytes())
    path = tmp_path / "base" / "tokenizer.json"
    told = json.loads(path.read_text())
    gap = next(t for t, i in told["model"]["vocab"].items() if i == 400)
    told["model"]["merges"] = [m for m in told["model"]["merges"] if gap not in (*m.split(" "), m.replace(" ", ""))]
    del told["model"]["vocab"][gap]
    path.write_text(json.dumps(told))
    with pytest.raises(ExportError, match="transformers would read '<fine>' as") as e:
        add_tokens(tmp_path / "base", ["<fine>"], tmp_path / "new")
    assert "edgelora convert" in e.value.fix


# -- the command --------------------------------------------------------------------------------------------------


def test_the_command_writes_it_and_refuses_a_token_a_second_time(tiny, tmp_path, capsys):
    out, more = tmp_path / "new.gguf", tmp_path / "more.txt"
    more.write_bytes("\ufeffgrößer🙂\r\n\n<b\u2028\f>\n".encode())  # as Notepad writes it
    words = ["add-tokens", str(tiny.path), "--token", "<a>", "--token", "77", "--from-file", str(more)]
    assert run([*words, "--out", str(out), "--json"]) == 0
    shown = capsys.readouterr()
    told, untied = json.loads(shown.out), tmp_path / "new-untied.gguf"
    assert told["tokens"] == {"<a>": 512, "77": 513, "größer🙂": 514, "<b\u2028\f>": 515}
    texts = [json.loads(line).get("text", "") for line in shown.err.splitlines()]
    nexts = [text for text in texts if text.startswith(("next: ", "then: "))]
    assert f"edgelora untie {out} --out {untied} " in nexts[0]
    assert f"edgelora train {untied} ROWS " in nexts[1]
    # digits are taken for an id, and the last cannot be typed
    assert "--train-tokens '<a>' --train-tokens 513 --train-tokens 'größer🙂' --train-tokens 515 " in nexts[1]
    assert (told["vocab_size"], told["padding"]) == (576, 60)
    assert told["certificate"]["passed"]
    assert told["certificate"]["same_bits"]
    assert told["size_bytes"] == out.stat().st_size
    assert run(["tokenize", str(out), "--text", "a <a>77 größer🙂", "--check", "--json"]) == 0
    assert [i for i in json.loads(capsys.readouterr().out)["rows"][0]["ids"] if i >= 512] == [512, 513, 514]
    assert run(["add-tokens", str(out), "--token", "<a>", "--out", str(tmp_path / "again.gguf")]) == 1
    assert capsys.readouterr().err.splitlines() == [
        f"error: {out}: '<a>' is a token already (512)",
        "  why: a new token is one that llama.cpp reads as one id wherever its text stands, and nothing else changes",
        "  fix: leave these out or name them otherwise; a token that is there is trained as it is (--train-tokens)",
    ]


def test_a_folder_becomes_a_folder(folder, tmp_path):
    with pytest.raises(ConfigError, match="a Hugging Face folder becomes a folder"):
        add_tokens(folder, NEW, tmp_path / "new.gguf")
    with pytest.raises(ConfigError, match="no token to add"):
        add_tokens(folder, [], tmp_path / "new")
