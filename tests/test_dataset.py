"""A data set: every row encoded once, cut where it must be, kept in memory or in a file, in an order that is a pure
function of seed and step."""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import TEMPLATE
from hypothesis import given, settings
from hypothesis import strategies as st

from edgelora.base.model import open_base
from edgelora.data.check import Tally
from edgelora.data.dataset import EncodedRow, Options, encode_rows, load_examples, load_labelled, load_pairs
from edgelora.data.encode import Example, encode_conversation, encode_document
from edgelora.data.fit import Cut, Encoder, split
from edgelora.data.order import Order, n_steps
from edgelora.data.rows import Conversation, Document, Message, Tokenized
from edgelora.data.store import Store
from edgelora.data.template import ChatTemplate
from edgelora.data.tokenizer import Tokenizer
from edgelora.errors import BaseModelError, ConfigError, DataError, OutputError

END = 2  # <|im_end|>
quick = settings(max_examples=50, deadline=None)


@pytest.fixture(scope="module")
def base(tiny):
    return open_base(tiny.path)


def chat(*contents, system=None, weights=()) -> Conversation:
    """Contents in turn: user, assistant, user, …; weights of the assistant's."""
    first = [] if system is None else [Message("system", system)]
    turns = [Message("assistant" if i % 2 else "user", text) for i, text in enumerate(contents)]
    for i, weight in enumerate(weights):
        turns[2 * i + 1] = replace(turns[2 * i + 1], weight=weight)
    return Conversation((*first, *turns))


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def row(*contents, **more):
    messages = [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(contents)]
    return {"messages": messages, **more}


def same(a: Example, b: Example) -> bool:
    both = a.weights is None and b.weights is None
    return (
        a.input_ids.tolist() == b.input_ids.tolist() and a.loss_mask.tolist() == b.loss_mask.tolist()
        and (both or a.weights.tolist() == b.weights.tolist())
    )  # fmt: skip


def said(base, example) -> str:
    """What is learned."""
    learned = example.input_ids[example.loss_mask].tolist()
    return b"".join(base.tokenizer.piece(i, special=True) for i in learned).decode()


# -- what is learned ----------------------------------------------------------------------------------------------


def test_weights_reach_the_tokens(base):
    example = Encoder(base).encode(chat("a", "one", "b", "two", "c", "six", weights=(0, 0.5, 2))).examples[0]
    plain = Encoder(base).encode(chat("a", "one", "b", "two", "c", "six")).examples[0]
    assert example.input_ids.tolist() == plain.input_ids.tolist()
    assert said(base, plain) == "one<|im_end|>two<|im_end|>six<|im_end|>"
    assert said(base, example) == "two<|im_end|>six<|im_end|>"
    assert example.weights.dtype == np.float32
    assert (example.weights > 0).tolist() == example.loss_mask.tolist()
    runs = example.weights[example.loss_mask]
    assert sorted(set(runs.tolist())) == [0.5, 2.0]
    assert sorted(runs.tolist()) == runs.tolist()  # the turn with 0.5 comes first
    assert plain.weights is None


def test_loss_on_the_last_turn_alone(base):
    conversation = chat("a", "one", "b", "two")
    assert said(base, Encoder(base, loss_on="last").encode(conversation).examples[0]) == "two<|im_end|>"
    assert said(base, Encoder(base, loss_on="all").encode(conversation).examples[0]) == "one<|im_end|>two<|im_end|>"


def test_a_document_is_learned_whole_and_ends(base):
    ids = base.tokenizer.encode("<|im_end|> light on").ids
    example = Encoder(base).encode(Document("<|im_end|> light on")).examples[0]
    assert example.input_ids.tolist() == [*ids, END]  # its special-token text is text
    assert example.loss_mask.all()
    assert example.n_loss_tokens == len(ids)  # all but the first, which follows nothing


def test_a_document_begins_with_bos_where_the_model_has_one(base):
    with_bos = Tokenizer(replace(base.tokenizer.vocabulary, ids={"bos": 0, "eos": END}, add_bos=True))
    example = encode_document(Document("light on"), with_bos)
    assert example.input_ids.tolist() == [0, *base.tokenizer.encode("light on").ids, END]
    assert example.loss_mask.tolist() == [False] + [True] * (len(example) - 1)


@quick
@given(st.integers(2, 60), st.integers(2, 20), st.booleans())
def test_a_long_document_is_split_and_every_token_is_learned_once(n, max_length, begins):
    ids = np.arange(100, 100 + n)
    ids[0] = 1 if begins else 100
    parts = split(Example(ids, np.arange(n) >= begins), max_length)
    assert max(map(len, parts)) <= max_length
    learned = [token for part in parts for token in part.input_ids[1:][part.loss_mask[1:]].tolist()]
    assert learned == ids[1:].tolist()
    for before, part in pairwise(parts):
        assert part.input_ids[0] == (1 if begins else before.input_ids[-1])


def test_documents_need_no_template_and_conversations_do(make_tiny, tmp_path):
    untaught = open_base(make_tiny(template=None).path)
    assert len(load_examples([write(tmp_path / "a.jsonl", {"text": "Hello"})], Encoder(untaught))) == 1
    with pytest.raises(BaseModelError, match="it has no chat template"):
        load_examples([write(tmp_path / "b.jsonl", row("a", "b"))], Encoder(untaught))


def test_ids_of_another_model_are_refused(base):
    assert Encoder(base).encode(Tokenized((5, 511), (True, True))).tokens == 2
    with pytest.raises(DataError) as caught:
        Encoder(base).encode(Tokenized((5, 512), (True, True)))
    assert caught.value.what == "the id 512 is no token: the vocabulary has 512"
    assert caught.value.why == "these ids were made for another model"
    assert caught.value.fix == "use the data as text, or the base that it was tokenized for"


# -- truncation ---------------------------------------------------------------------------------------------------

LONG = chat("q1", "one one one", "q2", "two two two", "q3", "six six six", system="Be brief.")


def test_truncation_keeps_whole_turns_the_system_message_and_the_first_question(base):
    lengths = [len(Encoder(base).encode(replace(LONG, messages=LONG.messages[:n])).examples[0]) for n in (3, 5, 7)]
    for max_length in range(lengths[0], lengths[2]):
        found = Encoder(base, max_length, truncate=True).encode(LONG)
        kept = 3 if max_length < lengths[1] else 5
        whole = encode_conversation(replace(LONG, messages=LONG.messages[:kept]), base.tokenizer, base.template)
        assert same(found.examples[0], whole)
        assert found.cut == Cut(lengths[2], len(whole), (7 - kept) // 2, 0)
    assert Encoder(base, lengths[2], truncate=True).encode(LONG).cut is None


def test_truncation_cuts_inside_an_answer_only_where_the_first_does_not_fit(base):
    first = Encoder(base).encode(replace(LONG, messages=LONG.messages[:3])).examples[0]
    answer = int(np.argmax(first.loss_mask))
    whole = Encoder(base).encode(LONG).tokens
    for max_length in range(8, len(first)):
        found = Encoder(base, max_length, truncate=True).encode(LONG)
        if max_length <= answer:  # not even a word of the answer is left
            assert found.examples == ()
            assert found.cut == Cut(whole, 0, 3, 0)
        else:
            assert same(found.examples[0], first[:max_length])
            assert found.cut == Cut(whole, max_length, 2, 1)
            assert found.examples[0].n_loss_tokens == max_length - answer


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.text(min_size=1, max_size=9), st.sampled_from(["a", "one two", "x " * 20])), min_size=1),
    st.integers(8, 120),
    st.sampled_from(["all", "last"]),
)
def test_whatever_is_cut_fits_and_is_accounted_for(base, turns, max_length, loss_on):
    conversation = chat(*[text for turn in turns for text in turn])
    encoder = Encoder(base, max_length, truncate=True, loss_on=loss_on)
    found, whole = encoder.encode(conversation), Encoder(base, loss_on=loss_on).encode(conversation)
    assert found.tokens == whole.tokens
    if whole.tokens <= max_length:
        assert found.cut is None
        assert same(found.examples[0], whole.examples[0])
        return
    assert found.cut.kept == sum(map(len, found.examples)) <= max_length
    assert found.cut.turns + found.cut.ends <= len(turns)
    for example in found.examples:
        assert example.input_ids.tolist() == whole.examples[0].input_ids[: len(example)].tolist()
        assert example.n_loss_tokens > 0


def test_pairs_lose_ends_and_ids_too(base, tmp_path):
    path = write(tmp_path / "a.jsonl", {"prompt": "q", "chosen": "one " * 20, "rejected": "no"})
    (pair,) = load_pairs([path], Encoder(base, 30, truncate=True))
    assert (len(pair.chosen), len(pair.rejected)) == (30, len(encode_conversation(
        chat("q", "no"), base.tokenizer, base.template)))  # fmt: skip
    found = Encoder(base, 3, truncate=True).encode(Tokenized(tuple(range(5, 12)), (True,) * 7))
    assert (found.examples[0].input_ids.tolist(), found.cut) == ([5, 6, 7], Cut(7, 3, 0, 1))


# weights of three answers, in which of them max_length lies → what is learned, turns and ends that are lost
LOST = {
    "all": ((1, 1, 1), 1, "one<|im_end|>", 2, 0),
    "the first": ((1, 0, 0), 1, "one<|im_end|>", 0, 0),
    "the last, far away": ((0, 0, 1), 1, "", 1, 0),
    "the last": ((0, 0, 1), 2, "six six", 0, 1),
    "one that is cut": ((0, 1, 0.5), 1, "two two", 1, 1),
    "one on each side": ((1, 0, 1), 2, "one<|im_end|>", 1, 0),
    "none": ((0, 0, 0), 1, "", 0, 0),
}


@pytest.mark.parametrize("case", LOST)
def test_only_answers_that_are_learned_can_be_lost(base, case):
    weights, cut_in, learned, turns, ends = LOST[case]
    contents = ["a", "one", "b", "two two two", "c", "six six six"]
    until_there = Encoder(base).encode(chat(*contents[: 2 * cut_in + 2])).examples[0]
    max_length = len(until_there) - len(base.tokenizer.encode(contents[2 * cut_in + 1][-4:]).ids) - 2
    found = Encoder(base, max_length, truncate=True).encode(chat(*contents, weights=weights))
    assert (found.cut.turns, found.cut.ends) == (turns, ends)
    assert "".join(said(base, example) for example in found.examples) == learned
    assert found.cut.kept == sum(map(len, found.examples))


def test_with_the_loss_on_the_last_answer_no_other_takes_its_place(base):
    conversation = chat("a", "one", "b", "two two two")
    whole = Encoder(base, loss_on="last").encode(conversation).examples[0]
    start = int(np.argmax(whole.loss_mask))
    for max_length in range(8, len(whole)):
        found = Encoder(base, max_length, truncate=True, loss_on="last").encode(conversation)
        if max_length <= start:
            assert (found.examples, found.cut) == ((), Cut(len(whole), 0, 1, 0))
        else:
            assert same(found.examples[0], whole[:max_length])
            assert found.cut == Cut(len(whole), max_length, 0, 1)


def test_a_pair_that_is_left_alike_is_left_out(base, tmp_path):
    alike = {"prompt": "q", "chosen": "one " * 20 + "on", "rejected": "one " * 20 + "off"}
    one_fits = {"prompt": "q", "chosen": "on", "rejected": "on and on and on"}
    path, tally = write(tmp_path / "a.jsonl", alike, one_fits), Tally(base.tokenizer)
    whole = [found.encoded.tokens for found in encode_rows(path, Encoder(base), "dpo")]
    data = load_pairs([path], Encoder(base, 30, truncate=True), options=Options(on_row=tally.add))
    first, second = (found.encoded for found in encode_rows(path, Encoder(base, 30, truncate=True), "dpo"))
    assert (first.examples, first.cut) == ((), Cut(whole[0], 0, 2, 0))
    assert (len(data), len(second.examples), second.cut) == (1, 2, None)
    c = tally.result()
    assert (c.rows, c.left_out, c.cut, c.lost_tokens, c.lost_turns, c.lost_ends) == (2, 1, 1, whole[0], 2, 0)


# -- the data set -------------------------------------------------------------------------------------------------

MIXED = [
    row("a", "one"), {"text": "Once upon a time"}, {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
    {"prompt": "a", "completion": "b"}, row("größe?", "ça va", "b", "two"),
]  # fmt: skip


def test_rows_come_back_as_they_were_encoded(base, tmp_path):
    path = write(tmp_path / "a.jsonl", *MIXED)
    encoder = Encoder(base)
    wanted = [e for found in encode_rows(path, encoder) for e in found.encoded.examples]
    data = load_examples([path], encoder)
    assert (len(data), data.counts) == (5, (5,))
    assert all(same(a, b) for a, b in zip(data, wanted, strict=True))
    assert data.lengths.tolist() == [len(e) for e in wanted]
    assert data.n_tokens == sum(map(len, wanted))
    assert (data[0].input_ids.dtype, data[0].loss_mask.dtype) == (np.int64, bool)
    with pytest.raises(IndexError):
        data[5]


def test_on_disk_it_is_the_same(base, tmp_path):
    path = write(tmp_path / "a.jsonl", *MIXED, {"messages": [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0.5},
    ]})  # fmt: skip
    room = tmp_path / "run"
    kept, stored = load_examples([path], Encoder(base)), load_examples([path], Encoder(base), Options(folder=room))
    on_disk = load_examples([path], Encoder(base), Options(folder=room, in_memory_bytes=64))
    assert 4 * on_disk.n_tokens > 64  # bytes: so it is on disk
    assert kept.sha256 == stored.sha256 == on_disk.sha256
    for number in (5, 0, 3, 5):
        assert same(kept[number], on_disk[number])
    assert set(kept[5].weights.tolist()) == {0.0, 0.5}
    assert list(room.iterdir()) == []  # whatever ends the process, no file is left


def test_data_larger_than_memory_stays_out_of_it(tmp_path):
    draw = np.random.default_rng(0)
    wanted = [draw.integers(0, 1 << 17, 1000) for _ in range(3)]
    tracemalloc.start()
    try:
        with Store(tmp_path, in_memory_bytes=1 << 16) as store:
            for i in range(2000):  # 16 MB
                store.append(Example(wanted[i % 3], np.ones(1000, bool)))
        assert store[1999].input_ids.tolist() == wanted[1999 % 3].tolist()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20
    assert store.on_disk


def test_a_full_disk_is_a_typed_error(tmp_path, monkeypatch):
    store = Store(tmp_path, in_memory_bytes=16)

    def full(_):
        raise OSError(28, "No space left on device")

    for file in store._files:
        file.close()
    monkeypatch.setattr(store, "_files", (SimpleNamespace(write=full, close=lambda: None),) * 2)
    with pytest.raises(OutputError) as caught, store:
        store.append(Example(np.arange(3), np.ones(3, bool)))
    assert caught.value.what == f"{tmp_path}: the encoded rows could not be written here (No space left on device)"
    assert caught.value.fix == "free some space, or choose a folder on another disk"


@pytest.mark.parametrize(
    "changed",
    [
        [row("a", "one"), row("b", "twq")],
        [row("b", "two"), row("a", "one")],
        [row("a", "one")],
        [row("a", "one"), row("b", "two"), row("b", "two")],
        [row("a", "one"), {"messages": [
            {"role": "user", "content": "b"}, {"role": "assistant", "content": "two", "weight": 2}]}],
    ],
    ids=["a letter", "the order", "fewer", "more", "a weight"],
)  # fmt: skip
def test_the_digest_tells_changed_data(base, tmp_path, changed):
    rows = [row("a", "one"), row("b", "two")]
    first = load_examples([write(tmp_path / "a.jsonl", *rows)], Encoder(base)).sha256
    assert load_examples([write(tmp_path / "b.json", rows)], Encoder(base)).sha256 == first
    assert load_examples([write(tmp_path / "c.jsonl", *changed)], Encoder(base)).sha256 != first


def test_pairs_and_labelled_rows(base, tmp_path):
    pairs = write(
        tmp_path / "pairs.jsonl", *[{"prompt": "a", "chosen": f"yes {i}", "rejected": "no"} for i in range(3)]
    )
    data = load_pairs([pairs], Encoder(base), "orpo")
    assert [(said(base, p.chosen), said(base, p.rejected)) for p in data] == [
        (f"yes {i}<|im_end|>", "no<|im_end|>") for i in range(3)
    ]
    assert data.lengths.tolist() == [len(p.chosen) + len(p.rejected) for p in data]
    rated = [{"prompt": "a", "completion": "b", "label": label} for label in (True, False)]
    kto = load_labelled([write(tmp_path / "kto.jsonl", *rated)], Encoder(base))
    assert [(said(base, r.example), r.desirable) for r in kto] == [("b<|im_end|>", True), ("b<|im_end|>", False)]
    turned = load_labelled([write(tmp_path / "kto2.jsonl", *rated[::-1])], Encoder(base))
    assert turned.sha256 != kto.sha256


def test_rows_of_another_objective_are_refused(base, tmp_path):
    path = write(tmp_path / "a.jsonl", row("a", "b"))
    with pytest.raises(DataError) as caught:
        load_pairs([path], Encoder(base), "ipo")
    assert caught.value.what == f"{path}:1: a row of the format chat"
    assert caught.value.why == "ipo learns from rows with `chosen` and `rejected`"
    with pytest.raises(ConfigError):
        load_examples([path], Encoder(base), Options(data_format="chatt"))


def test_rows_in_which_nothing_is_learned_are_left_out(base, tmp_path):
    silent = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]}
    data = load_examples([write(tmp_path / "a.jsonl", silent, row("a", "b"), silent)], Encoder(base))
    assert (len(data), data.counts) == (1, (1,))


def test_at_most_ten_long_rows_are_named(base, tmp_path):
    path = write(tmp_path / "a.jsonl", *[row("a", "b")] * 13)
    with pytest.raises(
        DataError, match=r"^13 rows are longer than 8 tokens: (\S+:\d+ \(\d+\), ){9}\S+:10 .* and 3 more"
    ):
        load_examples([path], Encoder(base, 8))


def test_long_rows_are_refused_by_their_places_or_cut(base, tmp_path):
    rows = [row("a", "b"), row("a", "b " * 40), row("a " * 60, "b"), {"text": "a " * 100}]
    path = write(tmp_path / "a.jsonl", *rows)
    lengths = [found.encoded.tokens for found in encode_rows(path, Encoder(base))]
    with pytest.raises(DataError) as caught:
        load_examples([path], Encoder(base, 40))
    assert caught.value.what == (f"2 rows are longer than 40 tokens: {path}:2 ({lengths[1]}), {path}:3 ({lengths[2]})")
    assert caught.value.fix == f"pass --max-length {max(lengths[:3])} or --truncate, or shorten these rows"
    seen: list[EncodedRow] = []
    data = load_examples([path], Encoder(base, 40, truncate=True), Options(on_row=seen.append))
    assert [one.encoded.cut for one in seen] == [
        None, Cut(lengths[1], 40, 0, 1), Cut(lengths[2], 0, 1, 0), None,
    ]  # fmt: skip
    assert [bool(one.encoded.examples) for one in seen] == [True, True, False, True]
    assert max(data.lengths) <= 40
    assert data.counts == (2 + -(-(lengths[3] - 1) // 39),)  # the document became several rows


@pytest.mark.parametrize("spare", [0, -1])
def test_a_length_that_the_base_does_not_see_is_not_offered(base, tmp_path, spare):
    path = write(tmp_path / "a.jsonl", row("a", "b " * 40), row("a", "b"))
    longest = Encoder(base).encode(chat("a", "b " * 40)).tokens
    with pytest.raises(DataError) as caught:
        load_examples([path], Encoder(base, 40, context=longest + spare))
    assert (caught.value.why, caught.value.fix) == {
        0: (
            "cutting them would teach answers that break off",
            f"pass --max-length {longest} or --truncate, or shorten these rows",
        ),
        -1: (
            f"the base sees no more than {longest - 1} tokens, and cutting them would teach answers that break off",
            "pass --truncate, or shorten these rows",
        ),
    }[spare]


def test_rows_that_the_template_refuses_are_named_at_once(base, tmp_path):
    picky = ChatTemplate(TEMPLATE.replace("{% for", "{% if messages[0].content == 'x' %}{{ 1/0 }}{% endif %}{% for", 1))
    speech = SimpleNamespace(tokenizer=base.tokenizer, template=picky)
    path = write(tmp_path / "a.jsonl", row("a", "b"), row("x", "b"), row("c", "d"), row("x", "e"))
    with pytest.raises(DataError) as caught:
        load_examples([path], Encoder(speech))
    lines = caught.value.what.split("\n  ")
    assert lines[0] == "2 rows cannot be learned"
    assert [line.split(": ")[0] for line in lines[1:]] == [f"{path}:2", f"{path}:4"]
    with pytest.raises(DataError) as caught:
        load_examples([write(tmp_path / "b.jsonl", row("x", "b"))], Encoder(speech))
    assert caught.value.what.startswith(f"{tmp_path / 'b.jsonl'}:1: the chat template refused a conversation")


def test_what_all_conversations_have_in_common(base, tmp_path):
    system = {"role": "system", "content": "Brief."}
    with_system = [{"messages": [system, *row("a", "b")["messages"]]} for _ in range(2)]
    data = load_examples([write(tmp_path / "a.jsonl", *with_system)], Encoder(base))
    assert (data.system, data.single_turn) == ("Brief.", True)
    data = load_examples([write(tmp_path / "b.jsonl", *with_system, row("a", "b", "c", "d"))], Encoder(base))
    assert (data.system, data.single_turn) == (None, False)
    assert load_examples([write(tmp_path / "c.jsonl", {"text": "a b"})], Encoder(base)).single_turn is False


def test_sources_are_counted_apart(base, tmp_path):
    paths = [write(tmp_path / f"{n}.jsonl", *[row("a", str(i)) for i in range(n)]) for n in (3, 2)]
    data = load_examples(paths, Encoder(base))
    assert (data.counts, len(data)) == ((3, 2), 5)


@pytest.mark.parametrize("name", ["sql", "style"])
def test_real_data(base, shared_data, tmp_path, name):
    path = shared_data / "datasets" / f"{name}.train.jsonl"
    tally = Tally(base.tokenizer)
    options = Options(folder=tmp_path, in_memory_bytes=1024, on_row=tally.add)
    data, c = load_examples([path], Encoder(base, 200, truncate=True), options), tally.result()
    assert len(data) + c.left_out == c.rows == len(path.read_text(encoding="utf-8").splitlines())
    assert max(data.lengths) <= 200
    assert c.cut > 0
    assert all(example.n_loss_tokens for example in data)


# -- the order ----------------------------------------------------------------------------------------------------

sizes = st.lists(
    st.tuples(st.integers(1, 12), st.sampled_from([0.25, 0.5, 1.0, 1.5, 2.0, 3.0])), min_size=1, max_size=4
)


@quick
@given(st.integers(1, 30), st.integers(1, 12), st.integers(0, 5))
def test_one_source_is_shuffled_as_it_always_was(n, batch_rows, seed):
    """The order of the runs that were made before there were mixtures: an epoch's permutation after the other."""
    shuffle, flat = np.random.default_rng(seed), []
    while len(flat) < 4 * batch_rows:
        flat += shuffle.permutation(n).tolist()
    order = Order([n], batch_rows, seed)
    assert [i for step in range(4) for i in order.rows(step)] == flat[: 4 * batch_rows]


@quick
@given(sizes, st.integers(1, 9), st.lists(st.integers(0, 40), min_size=1, max_size=8))
def test_a_step_is_the_same_whatever_was_asked_before(sources, batch_rows, asked):
    counts, weights = [n for n, _ in sources], [w for _, w in sources]
    order = Order(counts, batch_rows, 7, weights)
    for step in asked:
        assert order.rows(step) == Order(counts, batch_rows, 7, weights).rows(step)
        assert len(order.rows(step)) == batch_rows


@quick
@given(sizes, st.integers(0, 3))
def test_an_epoch_sees_each_row_as_often_as_its_weight_says(sources, seed):
    counts, weights = [n for n, _ in sources], [w for _, w in sources]
    order = Order(counts, 1, seed, weights)
    for epoch in range(3):
        seen = [order.rows(epoch * order.epoch_rows + i)[0] for i in range(order.epoch_rows)]
        first = 0
        for n, weight in sources:
            times = [seen.count(i) for i in range(first, first + n)]
            assert set(times) <= {int(weight), int(weight) + 1}
            assert sum(times) == max(1, int(weight) * n + round(weight % 1 * n))
            first += n
        assert len(seen) == sum(1 for i in seen if i < first)


def test_half_a_source_is_another_half_each_epoch_and_sources_are_mixed():
    order = Order([100, 100], 100, 0, [0.5, 0.5])
    first, second = set(order.rows(0)), set(order.rows(1))
    assert len(first) == len(second) == 100
    assert first != second
    assert 20 < sum(i < 100 for i in order.rows(0)[:80]) < 60


def test_a_step_far_away_is_near():
    order = Order([8], 8, 0)
    far = order.rows(20_000)
    assert sorted(far) == list(range(8))
    assert far == Order([8], 8, 0).rows(20_000)


def test_the_number_of_steps_and_the_epoch():
    order = Order([20, 10], 8, 0, [1.0, 0.5])  # 25 rows an epoch
    assert (order.epoch_rows, order.n_steps(2.0), order.n_steps(2.0, 3), order.n_steps(2.0, 100)) == (25, 7, 3, 7)
    assert n_steps(24, 8, 2.0) == Order([24], 8, 0).n_steps(2.0) == 6
    assert (n_steps(24, 8, 0.5), n_steps(1, 8, 0.1)) == (2, 1)  # 1.5 rounded up; never none
    assert order.epoch_at(5) == 1.6
