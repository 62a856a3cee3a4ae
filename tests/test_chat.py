"""Chat as a person sees it: through a real terminal, with a real model, and with one that says what is expected."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pexpect
import pytest
from test_export import make_adapter

from converters.adapter_to_gguf import write_adapter_gguf
from edgelora.base.model import open_base
from edgelora.data.conversation import read_conversations
from edgelora.errors import EdgeloraError
from runtime.chat import Chat, Settings
from runtime.commands import COMMANDS
from runtime.engine import Engine
from runtime.service import EngineConfig, Usage

CONFIG = EngineConfig(context=256, threads=1)
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]|\r")
PROMPT, SENT = "\x1b[?2004h", "\x1b[?2004l"  # what begins and ends the editing of a line
SCRIPTED = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_commands import Scripted
from runtime.chat import Chat
from runtime.terminal import talk
talk(Chat(Scripted("home", "poet"), active={"home": 1.0}), Path(sys.argv[2]))
"""


@pytest.fixture(scope="module")
def files(tiny, tmp_path_factory):
    folder, base = tmp_path_factory.mktemp("chat"), open_base(tiny.path)
    for seed, name in enumerate(("home", "poet")):
        write_adapter_gguf(folder / f"{name}.gguf", make_adapter(base, seed=seed, strength=0.5), base, name)
    return folder


@pytest.fixture(scope="module")
def engine(tiny, files):
    with Engine.open(tiny.path, CONFIG) as engine:
        for name in ("home", "poet"):
            engine.load(name, files / f"{name}.gguf")
        yield engine


@pytest.fixture
def chat(engine):
    return Chat(engine, Settings(max_tokens=8))


class Screen:
    """A process on a terminal of its own."""

    def __init__(self, home: Path, *arguments: str, width: int = 100) -> None:
        known = {"TERM": "xterm-256color", "PROMPT_TOOLKIT_NO_CPR": "1", "EDGELORA_HOME": str(home)}
        self.process = pexpect.spawn(
            sys.executable, list(arguments), timeout=60, encoding="utf-8", dimensions=(40, width),
            env={name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")} | known,
        )  # fmt: skip

    def wait(self, text: str = PROMPT) -> str:
        """What was shown until `text` came, or the next prompt, without what moves and colours."""
        self.process.expect_exact(text)
        return ESCAPES.sub("", self.process.before)

    def type(self, keys: str, expected: str = "") -> str:
        """Press keys and Enter; what is shown then, until the next prompt."""
        self.process.send(f"{keys}\r")
        self.wait(SENT)
        shown = self.wait()
        assert expected in shown
        return shown

    def end(self, keys: str) -> None:
        self.process.send(keys)
        self.process.expect(pexpect.EOF)
        self.process.close()
        assert self.process.exitstatus == 0


# -- on a terminal ------------------------------------------------------------------------------------------------


def test_every_command_on_a_terminal(tiny, files, tmp_path):
    screen = Screen(
        tmp_path, "-m", "edgelora", "chat", str(tiny.path), "--adapter", f"home={files / 'home.gguf'}:0.9",
        "--max-tokens", "8", "--threads", "1",
    )  # fmt: skip
    assert "answering with home at 0.9" in screen.wait()
    typed = {
        f"/load {files / 'poet.gguf'} poet": "loaded poet",
        "/adapters": "* home",
        "/use home:0.7 poet:0.3": "answering with home at 0.7, poet at 0.3",
        "/adapter poet 0.5": "answering with poet at 0.5",
        "/base": "answering with the base alone",
        "hello": "",
        "/retry": "",
        "/compare home base": "base",
        "/compare poet base turn on the lamp": "base",
        "/stats": "tokens/s",
        "/set temperature 0.7": "temperature is 0.7",
        "/system Be brief.": "system: Be brief.",
        f"/save {tmp_path / 'chat.json'}": "saved 2 messages",
        "/undo": "taken back: hello",
        f"/load-chat {tmp_path / 'chat.json'}": "going on behind 2 messages",
        "/reset": "the conversation starts anew",
        "/unload poet": "unloaded poet",
        "/help": "this list",
        "/adapter nobody": "no adapter named nobody",
        "/what": "no such command",
    }
    for line, expected in typed.items():
        screen.type(line, expected)
    assert {line.split()[0] for line in typed} >= set(COMMANDS) - {"/quit"}
    screen.end("/quit\r")
    assert [m.role for m in read_conversations(tmp_path / "chat.json")[0].messages] == ["system", "user", "assistant"]
    assert "hello" in (tmp_path / "chat-history").read_text(encoding="utf-8")


@pytest.fixture
def screen(tmp_path):
    screen = Screen(tmp_path, "-c", SCRIPTED, str(Path(__file__).parent), str(tmp_path / "history"))
    screen.wait()
    yield screen
    screen.process.close(force=True)


def test_editing_completion_and_history(screen, tmp_path):
    (tmp_path / "saved.json").write_text(
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "from a file"}]}'
    )
    screen.process.send("/ada\t\t")
    screen.wait(SENT)
    assert "/adapter  /adapters" in screen.wait()  # two begin so
    screen.type("s", "* home")
    screen.type("/us\tpo\t:0.5", "answering with poet at 0.5")
    screen.type("/set temp\t0.5", "temperature is 0.5")
    screen.type("/comp\tpo\t ba\t hi there", "base heard 'hi there'")
    screen.type(f"/load-c\t{tmp_path}/sav\t", "from a file")
    screen.type("one\x1b\rtwo", r"heard 'one\ntwo'")  # Alt-Enter
    screen.type("one\\\rtwo", r"heard 'one\ntwo'")
    screen.type("\x1b[200~a paste\nof lines\x1b[201~", r"heard 'a paste\nof lines'")
    screen.type("\x1b[A", r"heard 'a paste\nof lines'")  # the line before
    screen.process.send("not sent\x03")
    screen.wait(SENT)
    assert "/quit ends the chat" in screen.wait()
    screen.end("\x04")
    history = tmp_path / "history"
    assert "+a paste\n+of lines" in history.read_text(encoding="utf-8")
    assert "not sent" not in history.read_text(encoding="utf-8")
    assert history.stat().st_mode & 0o077 == 0  # what one asks is nobody else's


def test_ctrl_c_stops_the_answer_not_the_chat(screen):
    screen.process.send("count\r")
    screen.wait("10 11 12")
    screen.process.sendintr()
    shown = screen.wait()
    assert "999" not in shown
    assert "Traceback" not in shown
    screen.type("/undo", "taken back: count")  # what was said is kept
    screen.process.send("/compare home base count\r")
    screen.wait("10 11 12")
    screen.process.sendintr()
    screen.wait()
    assert "ended by     you" in screen.type("/stats", "KV cache")
    screen.process.send("brief\r")
    screen.wait("10 11 12")
    screen.process.send("typed ahead")
    assert "typed" not in screen.wait()  # nothing is mixed into the answer
    screen.type("", "heard 'typed ahead'")  # it stands in the next line
    screen.end("\x04")


def test_answers_as_they_look(screen):
    shown = screen.type("poem", "end")
    # what was drawn over stands between and in front of what stays
    lines = (line.rstrip() for line in shown.split("\n"))
    stays = ["Roses", "red as x", " a  b", " ────", " 1  2", "violets", "blue", "```python", "x = 1", "```", "end"]
    assert [part for part in stays if not any(line.endswith(part) for line in lines)] == []  # in this order
    assert "… no answer" in screen.type("nothing")
    wide = screen.type("/compare home poet hello", "poet:1 heard 'hello'")
    assert re.search(r"home:1 heard 'hello' +poet:1 heard 'hello'", wide)
    screen.process.setwinsize(24, 40)
    screen.wait()  # the prompt is drawn anew
    narrow = screen.type("/compare home poet hello", "poet:1 heard 'hello'")
    assert re.search(r"── home ──\n.*home:1 heard 'hello'\n+── poet ──\n.*poet:1 heard 'hello'", narrow)
    assert "error: the model broke" in screen.type("break", "ask something else")
    screen.end("\x04")


# -- through pipes ------------------------------------------------------------------------------------------------


def test_input_from_a_pipe(tiny, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "edgelora", "chat", str(tiny.path), "--max-tokens", "4", "--threads", "1"],
        input="/adapters\nhello\\\nthere\n/undo\n/help", capture_output=True, text=True, timeout=60,
        env=os.environ | {"EDGELORA_HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "no adapters are loaded" in done.stdout
    assert "taken back: hello\nthere\n" in done.stdout
    assert [line for line in done.stdout.splitlines() if line.startswith("/undo ")]
    assert (done.stderr, "\x1b" in done.stdout) == ("", False)
    assert list(tmp_path.iterdir()) == []  # a program's lines are no history


# -- with a model -------------------------------------------------------------------------------------------------


def test_answers_do_not_depend_on_what_was_switched_before(chat):
    def ask(**active):
        chat.reset()
        chat.use(active)
        return "".join(chat.ask("turn on the lamp"))

    fresh = {name: ask(**{name: 1.0}) for name in ("home", "poet")} | {"base": ask()}
    assert len(set(fresh.values())) == 3
    assert ask(home=1.0) == fresh["home"]
    assert ask() == fresh["base"]
    assert ask(poet=1.0) == fresh["poet"]
    assert "".join(chat.compare({"home": 1.0})) == fresh["home"]


def test_a_turn_is_kept_and_a_failed_one_is_not(chat):
    answer = "".join(chat.ask("hello"))
    assert [m.role for m in chat.messages] == ["user", "assistant"]
    assert chat.messages[1].content == answer
    assert isinstance(chat.usage, Usage)
    before = list(chat.messages)
    with pytest.raises(EdgeloraError, match="tokens"):
        list(chat.ask("lamp " * 400))
    assert chat.messages == before


@pytest.mark.parametrize("single_turn", [True, False])
def test_an_adapter_brings_how_it_was_trained(tiny, tmp_path, single_turn):
    """A value of the last command would slip into the next answer of one that never saw a second turn."""
    base = open_base(tiny.path)
    adapter = make_adapter(base)
    known = {"system": "Answer in JSON.", "single_turn": single_turn}
    trained = replace(adapter, contract=adapter.contract.model_copy(update=known))
    write_adapter_gguf(tmp_path / "a.gguf", trained, base, "a")
    prompts = []
    with Engine.open(base, CONFIG) as engine:
        engine.load("a", tmp_path / "a.gguf")
        real = engine.generate
        engine.generate = lambda request: prompts.append([m.content for m in request.prompt]) or real(request)
        chat = Chat(engine, Settings(max_tokens=2), {"a": 1.0})
        said = ["".join(chat.ask(question)) for question in ("first words", "second words")]
        chat.use({})
        list(chat.ask("third words"))
    earlier = ["first words", said[0]]
    assert prompts[:2] == [
        ["Answer in JSON.", "first words"], ["Answer in JSON.", *([] if single_turn else earlier), "second words"]
    ]  # fmt: skip
    assert prompts[2] == [*earlier, "second words", said[1], "third words"]  # the base sees the conversation
