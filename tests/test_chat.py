"""Chat as a person sees it: through a real terminal."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pexpect
import pytest
from test_export import make_adapter

from converters.adapter_to_gguf import write_adapter_gguf
from edgelora.base.model import open_base
from edgelora.errors import EdgeloraError
from runtime.chat import Chat, Settings
from runtime.scorer import ScoringEngine as Engine


@pytest.fixture(scope="module")
def files(tiny, tmp_path_factory):
    folder, base = tmp_path_factory.mktemp("chat"), open_base(tiny.path)
    for seed, name in enumerate(("home", "poet")):
        write_adapter_gguf(folder / f"{name}.gguf", make_adapter(base, seed=seed, strength=0.5), base, name)
    return folder


@pytest.fixture
def chat(tiny, files):
    with Engine(open_base(tiny.path), n_ctx=256, threads=1) as engine:
        for name in ("home", "poet"):
            engine.load(name, files / f"{name}.gguf")
        yield Chat(engine, Settings(max_tokens=8))


def test_a_conversation_on_a_terminal(tiny, files):
    terminal = pexpect.spawn(
        sys.executable,
        ["-m", "edgelora", "chat", str(tiny.path), "--adapter", f"home={files / 'home.gguf'}", "--adapter",
         f"poet={files / 'poet.gguf'}", "--max-tokens", "8"],
        timeout=120, encoding="utf-8", dimensions=(24, 200),
    )  # fmt: skip
    terminal.expect("answering with home")
    terminal.expect_exact("> ")
    for line, answer in (
        ("/adapters", r"\* home at 1"),
        ("/adapter poet 0.5", "answering with poet at 0.5"),
        ("/adapters", r"\* poet at 0.5"),
        ("/adapter nobody", "no adapter named nobody"),
        ("/adapter poet loud", "loud is no number"),
        ("/what", "no such command"),
        ("/base", "answering with the base alone"),
        ("/reset", "the conversation starts anew"),
    ):
        terminal.sendline(line)
        terminal.expect(answer)
        terminal.expect_exact("> ")
    terminal.sendline("hello")
    terminal.expect_exact("> ")
    terminal.sendintr()
    terminal.expect("/quit ends the chat")
    terminal.sendline("/quit")
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert terminal.exitstatus == 0


def test_answers_do_not_depend_on_what_was_switched_before(chat):
    def ask(**active):
        chat.command("/reset")
        chat.engine.use(active)
        return "".join(chat.ask("turn on the lamp"))

    fresh = {name: ask(**{name: 1.0}) for name in ("home", "poet")} | {"base": ask()}
    assert len(set(fresh.values())) == 3
    assert ask(home=1.0) == fresh["home"]
    assert ask() == fresh["base"]
    assert ask(poet=1.0) == fresh["poet"]


def test_a_turn_is_kept_and_a_failed_one_is_not(chat):
    answer = "".join(chat.ask("hello"))
    assert [m.role for m in chat.messages] == ["user", "assistant"]
    assert chat.messages[1].content == answer
    before = list(chat.messages)
    with pytest.raises(EdgeloraError, match="tokens"):
        list(chat.ask("lamp " * 400))
    assert chat.messages == before


def test_an_answer_broken_off_keeps_what_was_said(chat):
    answer = chat.ask("hello")
    first = next(answer)
    answer.close()
    assert chat.messages[-1].content == first


def test_input_from_a_pipe(tiny):
    done = subprocess.run(
        [sys.executable, "-m", "edgelora", "chat", str(tiny.path), "--max-tokens", "4"],
        input="/adapters\nhello\n", capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "no adapters are loaded" in done.stdout
    assert done.stderr == ""


def test_an_adapter_brings_the_system_message_it_was_trained_with(tiny, tmp_path):
    base = open_base(tiny.path)
    adapter = make_adapter(base)
    trained = replace(adapter, contract=adapter.contract.model_copy(update={"system": "Answer in JSON."}))
    write_adapter_gguf(tmp_path / "a.gguf", trained, base, "a")
    prompts = []
    with Engine(base, n_ctx=256, threads=1) as engine:
        engine.load("a", tmp_path / "a.gguf")
        chat = Chat(engine, Settings(max_tokens=1))
        engine.stream = lambda prompt, *_: prompts.append(base.tokenizer.decode(prompt)) or iter(())
        for active in ({"a": 1.0}, {}):
            engine.use(active)
            list(chat.ask("hello"))
        list(Chat(engine, Settings(system="Be brief.")).ask("hello"))
    assert ["Answer in JSON." in p for p in prompts] == [True, False, False]
    assert "Be brief." in prompts[2]


@pytest.mark.parametrize("single_turn", [True, False])
def test_an_adapter_of_single_questions_is_asked_one_at_a_time(tiny, tmp_path, single_turn):
    """A value of the last command would slip into the next answer: it never saw a second turn."""
    base = open_base(tiny.path)
    adapter = make_adapter(base)
    trained = replace(adapter, contract=adapter.contract.model_copy(update={"single_turn": single_turn}))
    write_adapter_gguf(tmp_path / "a.gguf", trained, base, "a")
    prompts = []
    with Engine(base, n_ctx=256, threads=1) as engine:
        engine.load("a", tmp_path / "a.gguf")
        chat = Chat(engine, Settings(max_tokens=2))
        said = chat.command("/adapter a")
        real = engine.stream
        engine.stream = lambda prompt, *rest: prompts.append(base.tokenizer.decode(prompt)) or real(prompt, *rest)
        for question in ("first words", "second words"):
            list(chat.ask(question))
        chat.command("/base")
        list(chat.ask("third words"))
    assert ["first words" in p for p in prompts] == [True, not single_turn, True]  # the base sees the conversation
    assert ("by itself" in said) is single_turn
