"""The live engine: whatever was loaded, switched or asked before, an answer is that of a cold run."""

from __future__ import annotations

import random
import threading
import time
from dataclasses import replace

import pytest
from live_walk import strong_adapters

from edgelora.base.model import open_base
from edgelora.errors import AdapterError, ConfigError, DataError, EngineError
from runtime.binding import Context, Model
from runtime.engine import Engine
from runtime.scheduler import Scheduler
from runtime.service import EngineConfig, Request, Sampling

NAMES = ("one", "two", "three")
PROMPT = tuple(range(5, 30))
CONFIG = EngineConfig(context=256, chunk=8, threads=1)


pytestmark = pytest.mark.usefixtures("own_home")


@pytest.fixture(scope="module")
def adapters(tiny, tmp_path_factory):
    return strong_adapters(open_base(tiny.path), tmp_path_factory.mktemp("adapters"), NAMES)


@pytest.fixture
def engine(tiny, adapters):
    with Engine.open(tiny.path, CONFIG) as engine:
        for name, path in adapters.items():
            engine.load(name, path)
        yield engine


def ask(engine, prompt=PROMPT, adapters=None, n=6, **more):
    stream = engine.generate(Request(tuple(prompt), adapters or {}, max_tokens=n, **more))
    return [token for piece in stream for token in piece.tokens], stream.usage


def test_an_answer_streams_and_says_what_it_cost(engine):
    tokens, usage = ask(engine)
    again, warm = ask(engine)
    assert tokens == again
    assert len(tokens) == usage.generated_tokens == 6
    assert (usage.prompt_tokens, usage.reused_tokens, warm.reused_tokens) == (25, 0, 24)
    assert usage.finish == "length"


@pytest.fixture(scope="module")
def cold(tiny, adapters):
    """`cold(active, prompt)`: the tokens of a fresh engine that has never seen anything else."""
    known = {}

    def run(active, prompt, n=6):
        key = (tuple(sorted(active.items())), tuple(prompt), n)
        if key not in known:
            with Engine.open(tiny.path, CONFIG) as engine:
                for name in active:
                    engine.load(name, adapters[name])
                known[key] = ask(engine, prompt, active, n)[0]
        return known[key]

    return run


SETTINGS = ({}, {"one": 1.0}, {"two": 1.0}, {"one": 0.5}, {"one": 1.0, "three": -0.7})
PROMPTS = ([*range(5, 30)], [*range(5, 25), 99, 98], [*range(5, 30), 40, 41, 42])


def random_walk(engine, adapters, cold, steps):
    """Random switches, blends and reloads over prompts that begin alike; counts answers unlike a cold run's."""
    draw, wrong = random.Random(0), 0
    for _ in range(steps):
        active, prompt = draw.choice(SETTINGS), draw.choice(PROMPTS)
        if draw.random() < 0.2:
            engine.unload("two")
            engine.load("two", adapters["two"])
        wrong += ask(engine, prompt, active)[0] != cold(active, prompt)
    return wrong


def test_no_state_of_one_adapter_answers_for_another(engine, adapters, cold):
    assert random_walk(engine, adapters, cold, 150) == 0
    assert len({tuple(cold(a, p)) for a in SETTINGS for p in PROMPTS}) > 5  # the settings do answer differently
    assert engine.stats().snapshots > 3  # and what was switched away from was kept


def test_the_walk_notices_when_keys_are_left_out(engine, adapters, cold, monkeypatch):
    """The control: keyed by tokens alone, as llama-cpp-python reuses its prefix, answers are wrong."""
    monkeypatch.setattr("runtime.states.named", lambda _: b"")
    assert random_walk(engine, adapters, cold, 40) > 0


def test_eight_threads_may_call_at_once(tiny, adapters, cold):
    wrong = []

    def client(number):
        draw = random.Random(number)
        for _ in range(6):
            active, prompt = draw.choice(SETTINGS), draw.choice(PROMPTS)
            if ask(engine, prompt, active)[0] != cold(active, prompt):
                wrong.append((active, prompt))

    for active in SETTINGS:
        for prompt in PROMPTS:
            cold(active, prompt)
    with Engine.open(tiny.path, EngineConfig(context=256, chunk=8, threads=1, conversations=3)) as engine:
        for name, path in adapters.items():
            engine.load(name, path)
        threads = [threading.Thread(target=client, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert engine.stats().running == engine.stats().waiting == 0
    assert wrong == []


def test_the_same_name_with_new_bytes_is_a_new_adapter(engine, adapters, cold):
    first = ask(engine, adapters={"one": 1.0})[0]
    engine.load("one", adapters["two"])
    assert ask(engine, adapters={"one": 1.0})[0] == cold({"two": 1.0}, PROMPT) != first


def test_the_same_bytes_under_two_names_add_up(engine, adapters, cold):
    engine.load("copy", adapters["one"])
    once = ask(engine, adapters={"one": 1.0})[0]
    both = ask(engine, adapters={"one": 0.25, "copy": 0.25})[0]
    assert both == cold({"one": 0.5}, PROMPT) != once
    engine.unload("one")
    assert ask(engine, adapters={"copy": 1.0})[0] == once
    assert ask(engine, adapters={"copy": 0.0})[0] == cold({}, PROMPT)


@pytest.fixture
def slowly(monkeypatch):
    """Answers come at a pace that leaves time to do something meanwhile."""
    step = Scheduler.step
    monkeypatch.setattr(Scheduler, "step", lambda self: time.sleep(0.005) or step(self))


@pytest.mark.usefixtures("slowly")
def test_what_is_in_use_is_not_freed(engine):
    stream = engine.generate(Request(PROMPT, {"one": 1.0}, max_tokens=10_000))
    pieces = iter(stream)
    next(pieces)
    with pytest.raises(EngineError, match="one is in use"):
        engine.unload("one")
    threading.Timer(0.05, stream.cancel).start()
    engine.unload("one", wait_seconds=30)
    list(pieces)
    assert stream.usage.finish == "cancelled"
    with pytest.raises(AdapterError, match="no adapter named one"):
        ask(engine, adapters={"one": 1.0})


@pytest.mark.usefixtures("slowly")
def test_an_answer_that_nobody_reads_on_ends(engine):
    for _ in engine.generate(Request(PROMPT, max_tokens=10_000)):
        break
    assert engine.stats().running == 0


@pytest.mark.usefixtures("slowly")
def test_closing_ends_what_runs_and_refuses_what_comes(tiny):
    engine = Engine.open(tiny.path, CONFIG)
    streams = [engine.generate(Request(PROMPT, max_tokens=10_000)) for _ in range(2)]
    pieces = iter(streams[0])
    next(pieces)
    engine.close()
    engine.close()
    for rest in (pieces, streams[1]):
        with pytest.raises(EngineError, match="the engine is closed"):
            list(rest)
    for call in (engine.stats, lambda: ask(engine), lambda: engine.unload("one")):
        with pytest.raises(EngineError, match="the engine is closed"):
            call()


def test_the_context_ends_an_answer(engine):
    tokens, usage = ask(engine, [5] * 250, n=10**9)
    assert (len(tokens), usage.finish) == (7, "length")


@pytest.mark.parametrize(
    ("prompt", "fault"),
    [
        ([5] * 256, "256 tokens"),
        ([], "empty prompt"),
        ([512], "the token 512"),
        ("\ud800", "half a character"),
        ("", "empty prompt"),
    ],
)
def test_prompts_that_cannot_be_are_refused(engine, prompt, fault):
    with pytest.raises((DataError, EngineError), match=fault):
        engine.generate(Request(prompt))


@pytest.mark.parametrize("scale", [17.0, -17.0, float("nan"), float("inf")])
def test_scales_beyond_reason_are_refused(engine, scale):
    with pytest.raises(EngineError, match="scale"):
        ask(engine, adapters={"one": scale})


def test_settings_that_cannot_be_are_named_together(tiny):
    with pytest.raises(ConfigError) as fault:
        Engine.open(tiny.path, EngineConfig(context=513, chunk=0, hot_adapters=-1))
    assert all(word in str(fault.value) for word in ("context is 513", "chunk is 0", "hot_adapters is -1"))


def test_guesses_change_the_pace_and_not_the_answer(tiny, adapters, cold, monkeypatch):
    """Over an F32 base; the prompt repeats itself, so that what follows a pair of tokens is guessed."""
    prompt = [*range(5, 15)] * 4
    widths, decode = [], Context.decode
    monkeypatch.setattr(Context, "decode", lambda self, entries: widths.append(len(entries)) or decode(self, entries))
    with Engine.open(tiny.path, replace(CONFIG, draft_tokens=4)) as engine:
        engine.load("one", adapters["one"])
        for active in ({}, {"one": 1.0}):
            expected = cold(active, prompt, 60)
            widths.clear()
            assert ask(engine, prompt, active, 60)[0] == expected
            assert max(widths[5:]) > 1
            assert len(widths) < 5 + 59  # 5 parts of the prompt, and a decode less for each right guess


def test_sampling_stop_strings_and_log_probabilities_reach_the_answer(engine):
    free = "".join(piece.text for piece in engine.generate(Request(PROMPT, max_tokens=12)))
    stop = Sampling(stop=(free[3:6],), logprobs=2)
    pieces = list(engine.generate(Request(PROMPT, sampling=stop, max_tokens=12)))
    assert "".join(piece.text for piece in pieces) == free[: free.index(free[3:6])]
    said = [entry for piece in pieces for entry in piece.logprobs]
    assert all(entry.top[0] == (entry.token, entry.logprob) and len(entry.top) == 2 for entry in said)
    drawn = [ask(engine, n=12, sampling=Sampling(temperature=2.0, seed=seed))[0] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    with pytest.raises(ConfigError, match="temperature"):
        ask(engine, sampling=Sampling(temperature=float("nan")))


@pytest.mark.parametrize(
    "settings",
    [{"kv_type": "f32"}, {"kv_type": "q8_0"}, {"kv_type": "q4_0", "flash_attention": "on"}, {"flash_attention": "off"},
     {"mmap": False}, {"mlock": True}, {"gpu_layers": -1}],
    ids=str,
)  # fmt: skip
def test_every_way_to_hold_a_base_answers(tiny, adapters, settings):
    with Engine.open(tiny.path, replace(CONFIG, **settings)) as engine:
        engine.load("one", adapters["one"])
        first, second = (ask(engine, adapters={"one": 1.0}, n=8) for _ in range(2))
        assert first[0] == second[0]
        assert second[1].reused_tokens == 24
        token_bytes = {"f32": 4, "q8_0": 34 / 32, "q4_0": 18 / 32}.get(settings.get("kv_type"), 2) * 2 * 2 * 128
        assert first[1].kv_bytes / 32 == pytest.approx(token_bytes, rel=0.05)  # keys and values, 2 layers, 128 wide


def test_what_llama_cpp_cannot_hold_is_a_typed_error(tiny):
    """Quantized values need flash attention; nothing is left open, and the next engine opens."""
    for _ in range(2):
        with pytest.raises(EngineError, match="cannot make a context"):
            Engine.open(tiny.path, replace(CONFIG, kv_type="q8_0", flash_attention="off"))
    Engine.open(tiny.path, CONFIG).close()


def test_a_fault_while_opening_frees_what_was_opened(tiny, monkeypatch):
    freed = []
    for kind in (Context, Model):
        close = kind.close
        monkeypatch.setattr(kind, "close", lambda self, close=close: freed.append(type(self)) or close(self))
    monkeypatch.setattr("runtime.engine.choose_threads", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Engine.open(tiny.path, replace(CONFIG, threads=None))
    assert freed == [Context, Model]
