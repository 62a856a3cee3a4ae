"""Who computes next: fair between sets of adapters, prompts and answers by turns, and what a set costs to change."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from dataclasses import replace

import gguf
import numpy as np
import pytest
from gguf.constants import GGUFValueType
from live_walk import strong_adapters
from test_preflight import write_foreign

from edgelora.base.model import open_base
from edgelora.errors import EngineError
from runtime.binding import Context, Entry, Lora, Model
from runtime.engine import Engine
from runtime.lanes import Lane
from runtime.scheduler import QUANTUM
from runtime.service import EngineConfig, Request

NAMES = ("one", "two")
CONFIG = EngineConfig(context=512, chunk=8, threads=1, conversations=4)
PROMPT = tuple(range(5, 30))


pytestmark = pytest.mark.usefixtures("own_home")


@pytest.fixture(scope="module")
def adapters(tiny, tmp_path_factory):
    return strong_adapters(open_base(tiny.path), tmp_path_factory.mktemp("adapters"), NAMES)


@pytest.fixture
def decodes(monkeypatch):
    """What was evaluated, in order: ("prompt" or "answers", the set of adapters, tokens)."""
    seen, evaluate, step = [], Lane.evaluate, Lane.step

    def on_evaluate(self, part, slot, **more):
        seen.append(("prompt", part.key, len(part.tokens)))
        return evaluate(self, part, slot, **more)

    def on_step(self, key, work):
        seen.append(("answers", key, len(work)))
        return step(self, key, work)

    monkeypatch.setattr(Lane, "evaluate", on_evaluate)
    monkeypatch.setattr(Lane, "step", on_step)
    return seen


def opened(tiny, adapters, **settings):
    engine = Engine.open(tiny.path, replace(CONFIG, **settings))
    for name, path in adapters.items():
        engine.load(name, path)
    return engine


def all_at_once(engine, requests):
    """Streams of requests that were all there before the first decode."""
    return engine._owner.call(lambda: [engine.generate(request) for request in requests])


def asked(name=None, prompt=PROMPT, n=60):
    return Request(prompt, {name: 1.0} if name else {}, max_tokens=n)


def test_no_set_of_adapters_computes_for_long_while_others_wait(tiny, adapters, decodes):
    with opened(tiny, adapters) as engine:
        for stream in all_at_once(engine, [*[asked("one", n=200)] * 3, asked("two", n=200)]):
            assert sum(len(piece.tokens) for piece in stream) == 200
    answers = [entry for entry in decodes if entry[0] == "answers"]
    ends = {key: i for i, (_, key, _) in enumerate(answers)}
    together = answers[: min(ends.values())]  # while both are at work
    turns = [
        sum(n for _, _, n in group) for _, group in itertools.groupby(together, key=lambda entry: entry[1])
    ]  # fmt: skip
    assert len(turns) > 6
    assert max(turns) <= QUANTUM + 2  # a decode of three may go two beyond
    total = Counter()
    for _, key, n in together:
        total[key] += n
    assert max(total.values()) - min(total.values()) <= 2 * QUANTUM


def test_a_long_prompt_and_answers_go_by_turns(tiny, adapters, decodes):
    with opened(tiny, adapters) as engine:
        short, long = asked(n=200), asked(prompt=(7,) * 80, n=2)
        for stream in all_at_once(engine, [short, long]):
            list(stream)
    first = next(i for i, entry in enumerate(decodes) if entry[0] == "answers")
    last = max(i for i, entry in enumerate(decodes) if entry[0] == "prompt")
    between = [len(list(group)) for kind, group in itertools.groupby(decodes[first:last], key=lambda e: e[0])]
    assert max(between) <= QUANTUM  # 1 part of a prompt, 16 tokens of an answer, 1 part …
    assert all(
        n == 1 for kind, n in zip(itertools.cycle(("answers", "prompt")), between, strict=False) if kind == "prompt"
    )


def test_those_that_wait_are_let_in_by_turns(tiny, adapters, decodes):
    with opened(tiny, adapters, conversations=1) as engine:
        for stream in all_at_once(engine, [*[asked("one", n=3)] * 3, asked("two", n=3)]):
            list(stream)
    order = [key for key, _ in itertools.groupby(key for _, key, _ in decodes)]
    assert len(order) == 3  # one, two, one one
    assert order[0] == order[2] != order[1]


def test_answers_of_one_set_get_sequences_side_by_side(tiny, adapters, monkeypatch):
    """llama.cpp evaluates only such in one go; the second answer of a set comes when others are there already."""
    together, step = set(), Lane.step

    def on_step(self, key, work):
        together.add(tuple(slot.sequence for slot, _, _ in work))
        return step(self, key, work)

    monkeypatch.setattr(Lane, "step", on_step)
    with opened(tiny, adapters) as engine:
        for stream in all_at_once(engine, [asked(name, n=100) for name in ("one", "two", "one", "two")]):
            list(stream)
    assert {pair for pair in together if len(pair) > 1} == {(0, 1), (2, 3)}


@pytest.mark.parametrize(("hot", "changes"), [(0, 8), (2, 2)])
def test_a_hot_set_keeps_its_context(tiny, adapters, monkeypatch, hot, changes):
    with opened(tiny, adapters, hot_adapters=hot) as engine:
        calls, real = [], Context.set_adapters
        monkeypatch.setattr(Context, "set_adapters", lambda self, pairs: calls.append(pairs) or real(self, pairs))
        for name in (None, *["one", "two"] * 4):
            list(engine.generate(asked(name, n=3)))
        stats = engine.stats()
        assert len(calls) == changes
        assert stats.contexts == 1 + hot
        assert stats.kv_bytes == (1 + hot) * 4 * 512 * engine._token_bytes


def test_an_adapter_that_is_replaced_answers_to_the_end(tiny, adapters, monkeypatch):
    freed, close = [], Lora.close
    monkeypatch.setattr(Lora, "close", lambda self: freed.append(self) or close(self))
    step = Lane.step
    monkeypatch.setattr(Lane, "step", lambda self, key, work: time.sleep(0.005) or step(self, key, work))
    with opened(tiny, adapters) as engine:
        expected = [token for piece in engine.generate(asked("one")) for token in piece.tokens]
        stream = engine.generate(asked("one"))
        pieces = iter(stream)
        tokens = list(next(pieces).tokens)
        engine.load("one", adapters["two"])
        assert freed == []
        assert tokens + [token for piece in pieces for token in piece.tokens] == expected
        engine.stats()
        assert len(freed) == 1


def test_a_decode_that_fails_ends_its_own_answer_only(tiny, adapters, monkeypatch):
    step = Lane.step

    def failing(self, key, work):
        if key:
            raise EngineError("llama.cpp could not evaluate it", "a test", "none")
        return step(self, key, work)

    with opened(tiny, adapters) as engine:
        expected = [piece.tokens for piece in engine.generate(asked())]
        monkeypatch.setattr(Lane, "step", failing)
        good, bad = all_at_once(engine, [asked(), asked("one")])
        with pytest.raises(EngineError, match="could not evaluate"):
            list(bad)
        assert [piece.tokens for piece in good] == expected
        monkeypatch.setattr(Lane, "step", lambda *_: 1 / 0)  # a fault of ours
        with pytest.raises(EngineError, match="the engine failed"):
            list(engine.generate(asked()))
        monkeypatch.setattr(Lane, "step", step)
        assert [piece.tokens for piece in engine.generate(asked())] == expected


# -- aLoRA ------------------------------------------------------------------------------------------------------------

INVOCATION = (300, 301)


@pytest.fixture(scope="module")
def invoked(adapters, tmp_path_factory):
    """The first adapter, as one that waits for its invocation."""
    reader = gguf.GGUFReader(adapters["one"])
    tensors = {t.name: np.array(t.data) for t in reader.tensors}
    alpha = float(reader.fields["adapter.lora.alpha"].contents())
    kind = {"adapter.alora.invocation_tokens": (list(INVOCATION), GGUFValueType.ARRAY, GGUFValueType.UINT32)}
    return write_foreign(tmp_path_factory.mktemp("alora") / "a.gguf", tensors, ("float32", alpha), **kind)


def by_hand(tiny, path, prompt, begin, n):
    """Greedy tokens: the base up to `begin`, then the adapter, each token by itself."""
    model = Model(tiny.path)
    context, lora = Context(model, n_ctx=512, n_sequences=1, threads=1), Lora(model, path)
    tokens = []
    for position in range(len(prompt) + n - 1):
        if position == begin:
            context.set_adapters([(lora, 1.0)])
        token = prompt[position] if position < len(prompt) else tokens[-1]
        rows = context.decode([Entry(token, position, 0, True)])
        if position >= len(prompt) - 1:
            tokens.append(int(rows[0].argmax()))
    context.close()
    lora.close()
    model.close()
    return tokens


def test_an_alora_answers_from_its_last_invocation_on(tiny, adapters, invoked, decodes):
    prompt = [*range(5, 17), *INVOCATION, *range(20, 33), *INVOCATION, 40, 41]
    with opened(tiny, adapters, conversations=1) as engine:
        info = engine.load("a", invoked, allow_unverified=True)
        assert info.invocation == INVOCATION
        list(engine.generate(asked(prompt=tuple(prompt), n=8)))
        decodes.clear()
        stream = engine.generate(asked("a", tuple(prompt), n=8))
        tokens = [token for piece in stream for token in piece.tokens]
        assert tokens == by_hand(tiny, invoked, prompt, 27, 8)
        assert tokens != by_hand(tiny, invoked, prompt, 12, 8)
        assert stream.usage.reused_tokens == 24  # of the base, up to the last cut before
        assert [(bool(key), n) for _, key, n in decodes[:2]] == [(False, 3), (True, 4)]


def test_an_alora_that_is_not_invoked_is_the_base(tiny, adapters, invoked):
    with opened(tiny, adapters, conversations=1) as engine:
        engine.load("a", invoked, allow_unverified=True)
        base, asleep = (list(engine.generate(asked(name, n=8))) for name in (None, "a"))
        assert asleep == base
