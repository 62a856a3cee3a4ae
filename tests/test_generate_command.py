"""`edgelora generate`: one prompt, an answer for people or for programs, and an exit code."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
from test_export import make_adapter

from converters.adapter_to_gguf import write_adapter_gguf
from edgelora.base.model import open_base
from edgelora.cli import run
from edgelora.data.conversation import Message
from edgelora.peft.adapter import write_adapter
from runtime.engine import Engine
from runtime.service import EngineConfig, Request
from runtime.store import Store

SCHEMA = {
    "type": "object",
    "properties": {"on": {"type": "boolean"}},
    "required": ["on"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def files(tiny, tmp_path_factory):
    """A base, two adapters, and what limits an answer."""
    room, base = tmp_path_factory.mktemp("generate"), open_base(tiny.path)
    at = SimpleNamespace(room=room, base=tiny.path, home=room / "home.gguf", poet=room / "poet.gguf")
    for seed, path in enumerate((at.home, at.poet)):
        write_adapter_gguf(path, make_adapter(base, seed=seed, strength=0.5), base, path.stem)
    at.trained = room / "trained"
    write_adapter(at.trained, make_adapter(base))
    at.prompt, at.schema, at.grammar, at.text = (room / n for n in ("prompt.txt", "s.json", "g.gbnf", "not.json"))
    at.prompt.write_text("turn on the lamp", encoding="utf-8")
    at.schema.write_text(json.dumps(SCHEMA), encoding="utf-8")
    at.grammar.write_text('root ::= "yes" | "no"\n', encoding="utf-8")
    at.text.write_text("no schema", encoding="utf-8")
    return at


@pytest.fixture
def generate(files, capsys, monkeypatch):
    """`generate("--json", "hello")` → (exit code, standard output, standard error)"""
    monkeypatch.setenv("EDGELORA_HOME", str(files.room / "home"))

    def call(*words: str, stdin: str = ""):
        given = io.TextIOWrapper(io.BytesIO(stdin.encode()), encoding="utf-8")
        monkeypatch.setattr("sys.stdin", given)
        code = run(
            [
                "generate",
                str(files.base),
                "--threads",
                "1",
                "--context",
                "256",
                *(w.format(**vars(files)) for w in words),
            ]
        )
        return code, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def expected(files):
    """The engine's own answers: `expected(prompt, home=0.7)`"""
    with Engine.open(files.base, EngineConfig(context=256, threads=1)) as engine:
        for name in ("home", "poet"):
            engine.load(name, files.room / f"{name}.gguf")

        def answer(prompt, **adapters):
            asked = prompt if isinstance(prompt, list) else [Message("user", prompt)]
            return "".join(piece.text for piece in engine.generate(Request(asked, adapters, max_tokens=8)))

        yield answer


LAMP = "turn on the lamp"


@pytest.mark.parametrize(
    ("words", "stdin"),
    [((LAMP,), ""), ((), LAMP), (("-",), LAMP), (("--file", "{prompt}"), ""), (("--file", "-"), LAMP)],
)
def test_a_prompt_is_an_argument_a_file_or_standard_input(generate, expected, words, stdin):
    code, out, err = generate(*words, "--max-tokens", "8", stdin=stdin)
    assert (code, err) == (0, "")
    assert out == expected(LAMP).removesuffix("\n") + "\n"


@pytest.mark.parametrize(
    ("words", "adapters"),
    [
        (("{home}",), {"home": 1.0}),
        (("mine={home}:0.5",), {"mine": 0.5}),
        (("{home}:0.7", "{poet}:-0.3"), {"home": 0.7, "poet": -0.3}),
        (("{home}:0", "{poet}"), {"home": 0.0, "poet": 1.0}),
    ],
)
def test_all_adapters_answer_together(generate, expected, words, adapters):
    code, out, err = generate(LAMP, "--json", "--max-tokens", "8", *(w for one in words for w in ("--adapter", one)))
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["text"] == expected(LAMP, **{name.replace("mine", "home"): s for name, s in adapters.items()})
    assert {name: one["scale"] for name, one in found["adapters"].items()} == adapters
    assert all(len(one["digest"]) == 64 for one in found["adapters"].values())


def test_a_stored_adapter_goes_by_its_name(generate, expected, files):
    Store(files.room / "home" / "adapters").add("bard", files.poet)
    _, out, err = generate(LAMP, "--adapter", "bard:0.5", "--adapter", "house={home}", "--json", "--max-tokens", "8")
    assert err == ""
    assert json.loads(out)["text"] == expected(LAMP, poet=0.5, home=1.0)
    code, _, err = generate(LAMP, "--adapter", "bart")
    assert code == 1
    assert "bart: neither a file nor the name of a stored adapter" in err


def test_the_json_says_all_there_is(generate, files):
    code, out, err = generate(LAMP, "--json", "--max-tokens", "5", "--logprobs", "2")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert set(found) == {"text", "tokens", "finish", "usage", "adapters", "logprobs"}
    tokenizer = open_base(files.base).tokenizer
    assert tokenizer.decode(found["tokens"]) == found["text"]
    assert (len(found["tokens"]), found["finish"], found["usage"]["generated_tokens"]) == (5, "length", 5)
    assert [one["token"] for one in found["logprobs"]] == found["tokens"]
    assert all(one["top"][0]["token"] == one["token"] for one in found["logprobs"])  # greedy takes the likeliest
    assert all(len(one["top"]) == 2 and one["logprob"] <= 0 for one in found["logprobs"])


def test_raw_continues_a_text_and_a_system_message_stands_before_a_question(generate, expected, files):
    _, raw, _ = generate(LAMP, "--raw", "--json", "--max-tokens", "3")
    assert json.loads(raw)["usage"]["prompt_tokens"] == len(open_base(files.base).tokenizer.encode(LAMP).ids)
    _, out, _ = generate(LAMP, "--system", "Be brief.", "--max-tokens", "8", "--json")
    assert json.loads(out)["text"] == expected([Message("system", "Be brief."), Message("user", LAMP)])


def test_an_answer_keeps_to_its_form(generate):
    _, out, _ = generate(LAMP, "--json-schema", "{schema}", "--max-tokens", "60")
    assert set(json.loads(out)) == {"on"}
    assert generate(LAMP, "--grammar", "{grammar}")[1] in ("yes\n", "no\n")
    _, plain, _ = generate(LAMP, "--json", "--max-tokens", "30")
    text = json.loads(plain)["text"]
    stop = text[len(text) // 2 :][:2]
    _, out, _ = generate(LAMP, "--json", "--max-tokens", "30", "--stop", stop.replace("{", "{{").replace("}", "}}"))
    assert json.loads(out)["text"] == text[: text.index(stop)]
    assert json.loads(out)["finish"] == "stop"


def test_drawing_follows_its_seed(generate):
    def drawn(*words):
        return generate(LAMP, "--max-tokens", "12", "--temperature", "2", *words)[1]

    assert drawn("--seed", "1") == drawn("--seed", "1")
    assert len({drawn("--seed", str(seed)) for seed in range(4)}) > 1
    assert drawn("--seed", "1", "--top-k", "1") == drawn("--seed", "2", "--top-k", "1")


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ((LAMP, "--file", "{prompt}"), "a prompt and --file"),
        (("--file", "{room}/none"), "none: cannot be read"),
        ((LAMP, "--raw", "--system", "x"), "--system with --raw"),
        ((LAMP, "--logprobs", "2"), "--logprobs without --json"),
        ((LAMP, "--adapter", "{room}/none.gguf"), "none.gguf: cannot be read"),
        ((LAMP, "--adapter", "{trained}:0.5"), "trained: this is a training folder"),
        ((LAMP, "--adapter", "{home}", "--adapter", "home={poet}"), "two adapters named home"),
        ((LAMP, "--adapter", "base={home}"), "base is no name for an adapter"),
        ((LAMP, "--adapter", "{home}:nan"), "nan is no scale"),
        ((LAMP, "--temperature", "-1", "--top-p", "2"), "top_p is 2.0"),
        ((LAMP, "--logit-bias", "12"), "--logit-bias 12"),
        ((LAMP, "--json-schema", "{text}"), "no JSON schema"),
        ((LAMP, "--grammar", "{room}/none"), "none: cannot be read"),
        (("lamp " * 300,), "tokens"),
        ((LAMP, "--raw", "--max-tokens", "1", "--adapter", "{home}:1e9"), "scale"),
    ],
)
def test_what_cannot_be_is_three_lines(generate, words, what):
    code, out, err = generate(*words)
    assert (code, out) == (1, "")
    first, why, fix = err.splitlines()
    assert first.startswith("error: ")
    assert what in first
    assert (why[:7], fix[:7]) == ("  why: ", "  fix: ")


@pytest.mark.parametrize("words", [(), ("--worker",)])
def test_a_checkpoint_is_no_gguf_yet(stories, capsys, words):
    assert run(["generate", str(stories), LAMP, "--raw", *words]) == 1
    what, _, fix = capsys.readouterr().err.splitlines()
    assert what.endswith("a Hugging Face checkpoint, which llama.cpp cannot run")
    assert fix == f"  fix: run `edgelora convert {stories}` and pass the file it writes"


def test_no_prompt_on_a_terminal_is_said_at_once(files, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    assert run(["generate", str(files.base)]) == 1
    assert capsys.readouterr().err.splitlines()[0] == "error: no prompt"


def test_ctrl_c_ends_it_with_what_there_is(files):
    command = [sys.executable, "-m", "edgelora", "generate", str(files.base), "--raw", "--threads", "1", "x"]
    free = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen([*command, "--logit-bias", "2=-inf", "--logit-bias", "0=-inf"], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True, env=free) as child:  # fmt: skip
        begun = child.stdout.read(4)
        child.send_signal(signal.SIGINT)
        rest, said = child.communicate(timeout=30)
    assert child.returncode == 130
    assert (begun + rest).endswith("\n")
    assert said.strip() == "stopped; what was not finished was not written"
