"""The commands of a chat, and what one of them does to a conversation, with a service that says what it was asked."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest

from edgelora.data.conversation import Message, read_conversations
from edgelora.device import Choice
from edgelora.errors import AdapterError, ConfigError, EdgeloraError, EngineError
from runtime.chat import Chat, Settings, as_asked
from runtime.commands import COMMANDS, Answers, Facts, run_command
from runtime.service import AdapterInfo, Piece, Request, Sampling, Usage
from runtime.settings import FIELDS, values, with_setting

POEM = "# Roses\n\n**red** as `x`\n| a | b |\n|---|---|\n| 1 | 2 |\n\nviolets\nblue\n```python\nx = 1\n```\nend"
SLOW = {"count": 1000, "brief": 40}  # questions, and how many words they are answered with


class ScriptedStream:
    def __init__(self, words: list[str], seconds: float, request: Request) -> None:
        self._words, self._seconds, self._stop = words, seconds, threading.Event()
        self._request, self.usage = request, None

    def __iter__(self):
        said, finish = 0, "stop"
        for word in self._words:
            if self._stop.wait(self._seconds):
                finish = "cancelled"
                break
            if word == "!":
                raise EngineError("the model broke", "it was asked to", "ask something else")
            said += 1
            yield Piece(word, (said,))
        self.usage = Usage(10, 4, said, 0.5, 2.0, 0.25, 4_000_000, finish)

    def cancel(self) -> None:
        self._stop.set()


class Scripted:
    """A Service: SLOW questions, a `poem` in Markdown, `break` that is not answered to its end; it repeats others."""

    name, threads = "scripted", Choice("1", "it computes nothing")

    def __init__(self, *names: str, **known: AdapterInfo) -> None:
        self._adapters = {n: AdapterInfo(n, f"digest of {n}", Path(f"{n}.gguf"), 2_000_000) for n in names} | known
        self.requests: list[Request] = []

    @property
    def adapters(self):
        return dict(self._adapters)

    def load(self, name, path, *, allow_unverified):
        if not path.is_file():
            raise AdapterError(f"{path}: no such file", "the path is wrong", "check it")
        self._adapters[name] = AdapterInfo(name, str(allow_unverified), path, path.stat().st_size)
        return self._adapters[name]

    def unload(self, name, *, wait_seconds=0.0):  # noqa: ARG002
        del self._adapters[name]

    def generate(self, request):
        self.requests.append(request)
        question = request.prompt[-1].content
        who = "+".join(f"{name}:{scale:g}" for name, scale in request.adapters.items()) or "base"
        if question in SLOW:
            return ScriptedStream([f"{n} " for n in range(SLOW[question])], 0.02, request)
        words = {"poem": list(POEM), "break": ["half an ", "!"], "nothing": []}.get(
            question, [who, f" heard {question!r}"]
        )
        return ScriptedStream(words, 0.0, request)

    def close(self) -> None:
        pass


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGELORA_HOME", str(tmp_path / "home"))


@pytest.fixture
def chat():
    return Chat(Scripted("home", "poet"), Settings(max_tokens=8), {"home": 1.0})


def said(chat, line):
    """What a command says, answers read to their ends."""
    reply = run_command(chat, line)
    if isinstance(reply, Answers):
        return {title: "".join(stream) for title, stream in reply.streams}
    return dict(reply.rows) if isinstance(reply, Facts) else reply


def ask(chat, text):
    return "".join(chat.ask(text))


# -- who answers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "active"),
    [
        ("/use home:0.7 poet:0.3", {"home": 0.7, "poet": 0.3}),
        ("/use poet", {"poet": 1.0}),
        ("/use home:-1 poet:0", {"home": -1.0}),
        ("/use base", {}),
        ("/use base home:0.7", {"home": 0.7}),
        ("/adapter poet 0.5", {"poet": 0.5}),
        ("/adapter poet", {"poet": 1.0}),
        ("/adapter home 0", {}),
        ("/base", {}),
        ("/unload home", {}),
        ("/unload poet", {"home": 1.0}),
    ],
)
def test_who_answers(chat, line, active):
    run_command(chat, line)
    ask(chat, "hello")
    assert chat.active == active == chat.service.requests[-1].adapters


@pytest.mark.parametrize(
    ("line", "active"),
    [
        ("/use poet", {"poet": 0.8}),
        ("/use home poet:0.3", {"home": 1.0, "poet": 0.3}),
        ("/adapter poet", {"poet": 0.8}),
        ("/adapter poet 1", {"poet": 1.0}),
    ],
)
def test_an_adapter_answers_at_the_scale_it_was_attached_with(line, active):
    chat = Chat(Scripted("home", "poet"), scales={"home": 0.0, "poet": 0.8})  # at 0 it is only loaded
    run_command(chat, line)
    assert chat.active == active
    assert said(chat, "/compare poet home hello") == {"poet": "poet:0.8 heard 'hello'", "home": "home:1 heard 'hello'"}
    chat.unload("poet")
    assert chat.scale_of("poet") == 1.0


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("/use pot", "no adapter named pot, did you mean poet?"),
        ("/use home poet:17", "scale 17 for poet"),
        ("/use home:0.5 poet home", "/use home:0.5 poet home: a name twice"),
        ("/use home:nan", "nan is no number"),
        ("/use home:loud", "loud is no number"),
        ("/use", "/use: too few or too many words"),
        ("/adapter home 1 2", "/adapter home 1 2: too few or too many words"),
        ("/unload nobody", "no adapter named nobody"),
        ("/compare home", "/compare home: too few or too many words"),
        ("/compare home pote", "no adapter named pote, did you mean poet?"),
        ("/compare home base", "no question was asked yet"),
        ("/retry", "no question was asked yet"),
        ("/undo", "no question was asked yet"),
        ("/load nowhere.gguf", "nowhere.gguf: neither a file nor the name of a stored adapter"),
        ("/load {file} base", "base is no name for an adapter"),
        ("/load {file} a/b", "a/b is no name for an adapter"),
        ('/load "{file}', '/load "'),
        ("/save {file}", "a conversation of no messages"),
        ("/load-chat {file}", "1 broken line"),
        ("/load-chat nowhere.json", "nowhere.json: cannot be read"),
        ("/set temprature 1", "no setting named temprature, did you mean temperature?"),
        ("/ues home", "/ues: no such command, did you mean /use?"),
        ("/zzz", "/zzz: no such command"),
        ("/", "/: no such command"),
    ],
)
def test_what_cannot_be_done_changes_nothing(chat, tmp_path, line, what):
    file = tmp_path / "some.file"
    file.write_text("something", encoding="utf-8")
    with pytest.raises(EdgeloraError) as caught:
        said(chat, line.format(file=file))
    assert what in caught.value.what
    assert all((caught.value.why, caught.value.fix))
    assert (chat.active, chat.messages, chat.settings) == ({"home": 1.0}, [], Settings(max_tokens=8))
    assert file.read_text(encoding="utf-8") == "something"


def test_an_adapter_is_loaded_under_a_name_and_listed(chat, tmp_path):
    file = tmp_path / "my own.gguf"
    file.write_bytes(b"0" * 1_500_000)
    assert said(chat, f'/load "{file}"').startswith("loaded my-own;")
    assert said(chat, f'/load "{file}" home') == "loaded home"  # in place of the one that answers
    listed = said(chat, "/adapters")
    assert listed == {"* home": f"at 1, 1.5 MB, {file}", "  poet": "2.0 MB, poet.gguf", "  my-own": f"1.5 MB, {file}"}
    assert chat.service.adapters["home"].digest == "False"  # only a chat that was told to takes an unverified one
    chat.settings = Settings(allow_unverified=True)
    run_command(chat, f'/load "{file}" home')
    assert chat.service.adapters["home"].digest == "True"


# -- what was said ------------------------------------------------------------------------------------------------


def test_a_question_is_taken_back_and_an_answer_replaced(chat):
    ask(chat, "one")
    ask(chat, "two")
    run_command(chat, "/use poet:0.5")
    assert said(chat, "/retry") == {"": "poet:0.5 heard 'two'"}
    assert [m.content for m in chat.messages] == ["one", "home:1 heard 'one'", "two", "poet:0.5 heard 'two'"]
    assert said(chat, "/undo") == "taken back: two"
    assert [m.content for m in chat.messages] == ["one", "home:1 heard 'one'"]
    assert said(chat, "/reset") == "the conversation starts anew"
    assert chat.messages == []


def test_comparing_leaves_the_conversation_as_it_was(chat):
    ask(chat, "one")
    before = list(chat.messages), dict(chat.active)
    assert said(chat, "/compare home:0.5 base") == {"home:0.5": "home:0.5 heard 'one'", "base": "base heard 'one'"}
    asked = [[m.content for m in request.prompt] for request in chat.service.requests[-2:]]
    assert asked == [["one"], ["one"]]
    assert said(chat, "/compare base poet It's \"two\"") == {
        "base": "base heard 'It\\'s \"two\"'", "poet": "poet:1 heard 'It\\'s \"two\"'"
    }  # fmt: skip
    assert [m.content for m in chat.service.requests[-1].prompt] == ["one", "home:1 heard 'one'", 'It\'s "two"']
    assert (chat.messages, chat.active) == before


def test_an_answer_that_fails_leaves_the_conversation_as_it_was(chat):
    ask(chat, "one")
    before = list(chat.messages)
    with pytest.raises(EngineError):
        ask(chat, "break")
    assert chat.messages == before


def test_an_answer_that_is_left_is_cancelled_and_kept(chat):
    answer = chat.ask("count")
    began = time.monotonic()
    first = next(answer)
    answer.close()
    assert chat.messages[-1] == Message("assistant", first)
    assert chat.usage.finish == "cancelled"
    assert time.monotonic() - began < 10  # of 20 seconds


def test_a_second_try_is_drawn_under_another_seed(chat):
    run_command(chat, "/set seed 7")
    ask(chat, "one")
    run_command(chat, "/retry").streams[0][1].__next__()
    said(chat, "/compare home base")
    assert [r.sampling.seed for r in chat.service.requests] == [7, 8, 9, 9]  # what is compared is drawn alike
    run_command(chat, "/reset")
    ask(chat, "one")
    assert chat.service.requests[-1].sampling.seed == 7
    chat.settings = Settings(sampling=Sampling(seed=2**32 - 2))
    ask(chat, "two")
    assert chat.service.requests[-1].sampling.seed == 0  # the one behind it would mean "from the clock"


# -- how it is asked ----------------------------------------------------------------------------------------------


def info(name, **known):
    return AdapterInfo(name, name, Path(name), 1, **known)


JSON, RHYME = info("json", system="Answer in JSON.", single_turn=True), info("rhyme", system="Rhyme.")
PLAIN = info("plain")


@pytest.mark.parametrize(
    ("adapters", "system", "expected"),
    [
        ([], None, ["one", "1", "two"]),
        ([], "Be brief.", ["Be brief.", "one", "1", "two"]),
        ([], "", ["one", "1", "two"]),
        ([RHYME], None, ["Rhyme.", "one", "1", "two"]),
        ([RHYME], "", ["one", "1", "two"]),
        ([RHYME], "Be brief.", ["Be brief.", "one", "1", "two"]),
        ([JSON], None, ["Answer in JSON.", "two"]),
        ([JSON, RHYME], None, ["one", "1", "two"]),  # they disagree, and one of them knows conversations
        ([RHYME, PLAIN], None, ["one", "1", "two"]),
        ([JSON, info("twin", system="Answer in JSON.", single_turn=True)], None, ["Answer in JSON.", "two"]),
    ],
)
def test_adapters_are_asked_as_they_were_trained(adapters, system, expected):
    messages = [Message("user", "one"), Message("assistant", "1"), Message("user", "two")]
    assert [m.content for m in as_asked(messages, adapters, system)] == expected


def test_the_system_message_is_shown_and_set():
    chat = Chat(Scripted(json=JSON), active={"json": 1.0})
    assert said(chat, "/system").startswith("system: Answer in JSON. (with the adapters;")
    assert (
        said(chat, "/system Be brief.  And kind.") == "system: Be brief.  And kind. (/system auto follows the adapters)"
    )
    ask(chat, "hello")
    assert chat.service.requests[-1].prompt[0] == Message("system", "Be brief.  And kind.")
    assert said(chat, "/system").startswith("system: Be brief.")  # showing it does not change it
    assert said(chat, "/system off").startswith("system: none")
    ask(chat, "hello")
    assert [m.role for m in chat.service.requests[-1].prompt] == ["user"]
    assert said(chat, "/system auto").startswith("system: Answer in JSON.")


# -- settings -----------------------------------------------------------------------------------------------------

# one good and one bad value of every setting; a new field of Sampling is missed here
VALUES = {
    "temperature": ("0.7", "hot"), "top_k": ("40", "1.5"), "top_p": ("0.9", "2"), "min_p": ("0.05", "-1"),
    "repeat_penalty": ("1.1", "0"), "presence_penalty": ("0.5", "inf"), "frequency_penalty": ("-0.5", "nan"),
    "penalty_last_n": ("-1", "-2"), "dry_multiplier": ("0.8", "-1"), "dry_base": ("2", "0"),
    "dry_allowed_length": ("3", "0"), "dry_penalty_last_n": ("100", "x"), "xtc_probability": ("0.5", "1.5"),
    "xtc_threshold": ("0.2", "0.9"), "mirostat": ("0", "3"), "mirostat_tau": ("4", "0"), "mirostat_eta": ("0.2", "x"),
    "seed": ("42", "-1"), "logit_bias": ("12=-1.5 7=2", "12"), "stop": ("'two words' '###'", "''"),
    "grammar": ("{folder}/g.gbnf", "{folder}/none"), "json_schema": ("{folder}/s.json", "{folder}/g.gbnf"),
    "logprobs": ("3", "-1"), "max_tokens": ("100", "0"),
}  # fmt: skip


@pytest.mark.parametrize("name", FIELDS)
def test_every_setting_is_read_checked_and_shown(name, tmp_path):
    (tmp_path / "g.gbnf").write_text('root ::= "a"\n', encoding="utf-8")
    (tmp_path / "s.json").write_text('{"type": "string"}', encoding="utf-8")
    good, bad = (text.format(folder=tmp_path) for text in VALUES[name])
    before = Settings()
    after = with_setting(before, name, good)
    shown = {"grammar": "13 characters of GBNF", "json_schema": '{"type": "string"}'}.get(name, good)
    assert values(after)[name] == shown
    assert {k for k, v in values(after).items() if v != values(before)[k]} <= {name}
    with pytest.raises(ConfigError) as caught:
        with_setting(after, name, bad)
    assert caught.value.fix
    if name in ("stop", "grammar", "json_schema", "logprobs", "logit_bias"):
        assert with_setting(after, name, "off") == before


def test_settings_reach_the_next_answer(chat):
    assert said(chat, "/set temperature 0.7") == "temperature is 0.7"
    assert said(chat, "/set max_tokens 5") == "max_tokens is 5"
    assert said(chat, "/set temperature") == {"temperature": "0.7"}
    assert set(said(chat, "/set")) == set(FIELDS)
    ask(chat, "hello")
    request = chat.service.requests[-1]
    assert (request.sampling, request.max_tokens) == (Sampling(temperature=0.7), 5)


def test_stats_are_of_the_last_answer(chat):
    assert said(chat, "/stats") == "nothing was answered yet"
    ask(chat, "hello")
    assert said(chat, "/stats") == {
        "prompt": "10 tokens, 4 reused, 12 tokens/s",  # 6 in half a second
        "answer": "2 tokens, 1 tokens/s",
        "first token": "after 0.25 s",
        "ended by": "the model",
        "KV cache": "4.0 MB",
    }


# -- files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["chat.json", "chat.jsonl"])
def test_what_was_said_is_data_to_train_on_and_a_chat_to_go_on_with(chat, tmp_path, name):
    run_command(chat, "/system Say “hi”.")
    ask(chat, "größe\nof two lines")
    file = tmp_path / name
    assert said(chat, f"/save {file}") == f"saved 2 messages in {file}"
    (row,) = read_conversations(file)
    assert [(m.role, m.content) for m in row.messages] == [
        ("system", "Say “hi”."), ("user", "größe\nof two lines"), ("assistant", "home:1 heard 'größe\\nof two lines'")
    ]  # fmt: skip
    other = Chat(Scripted())
    assert said(other, f"/load-chat {file}").startswith("going on behind 2 messages; the last one: home:1 heard")
    assert (other.messages, other.settings.system) == (chat.messages, "Say “hi”.")


def test_nothing_that_was_saved_is_lost(chat, tmp_path):
    ask(chat, "one")
    rows, file = tmp_path / "rows.jsonl", tmp_path / "chat.json"
    rows.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}')
    assert said(chat, f"/save {rows}").endswith("as its row 2")
    assert said(chat, f"/save {rows}").endswith("as its row 3")
    assert [len(row.messages) for row in read_conversations(rows)] == [2, 2, 2]
    run_command(chat, f"/save {file}")
    with pytest.raises(EdgeloraError, match="exists already"):
        run_command(chat, f"/save {file}")
    rows.write_text("{\n", encoding="utf-8")
    with pytest.raises(EdgeloraError, match="1 broken line"):
        run_command(chat, f"/save {rows}")
    assert rows.read_text(encoding="utf-8") == "{\n"


def test_a_conversation_with_tools_is_none_to_go_on_with(chat, tmp_path):
    call = {"function": {"name": "lamp", "arguments": {}}}
    row = {"tools": [{"function": {"name": "lamp"}}], "messages": [
        {"role": "user", "content": "on"}, {"role": "assistant", "content": None, "tool_calls": [call]},
    ]}  # fmt: skip
    file = tmp_path / "tools.json"
    file.write_text(json.dumps(row), encoding="utf-8")
    with pytest.raises(EdgeloraError, match="with tools"):
        run_command(chat, f"/load-chat {file}")


def test_help_shows_the_table(chat):
    assert set(said(chat, "/help")) == {f"{name} {command.words}".strip() for name, command in COMMANDS.items()}
    assert run_command(chat, "/quit") is None
