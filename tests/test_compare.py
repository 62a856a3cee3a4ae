"""Which tokens a file is checked on: those of the user's rows, their answers first of all."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from test_export import make_adapter

from edgelora.base.model import open_base
from edgelora.cli import run
from edgelora.data.conversation import Conversation, Message
from edgelora.errors import DataError
from edgelora.peft.adapter import write_adapter
from edgelora.pipeline.said import Said, _examples
from edgelora.pipeline.tokenize import Tokenized, tokenize_chat


def chat(question: str, answer: str) -> Conversation:
    return Conversation((Message("user", question), Message("assistant", answer)))


@pytest.mark.parametrize("command", ["merge", "quantize"])
def test_rows_that_a_model_without_a_template_cannot_read_are_refused_before_the_work(
    make_tiny, tmp_path, capfd, command
):
    base, rows, out = make_tiny(template=None).path, tmp_path / "rows.jsonl", str(tmp_path / "out.gguf")
    row = {"messages": [{"role": "user", "content": "lights"}, {"role": "assistant", "content": "on"}]}
    rows.write_text(json.dumps(row) + "\n", encoding="utf-8")
    write_adapter(tmp_path / "mine", make_adapter(open_base(base)))
    more = ["--adapter", str(tmp_path / "mine"), "--out", out] if command == "merge" else [out, "Q8_0"]
    assert run([command, str(base), *more, "--data", str(rows)]) == DataError.exit_code
    said = capfd.readouterr().err
    assert said.startswith(f"error: {base}: it has no chat template, and your rows are conversations")
    assert "fix: leave --data out" in said
    assert {p.name for p in tmp_path.iterdir()} == {"rows.jsonl", "mine"}


def test_rows_are_never_dropped_in_silence(make_tiny):
    base = make_tiny(template=None).path
    with pytest.raises(DataError, match="it has no chat template, and your rows are conversations"):
        Said.read(open_base(base), 256, [chat("lights", "on")])


def test_of_a_long_conversation_the_answer_is_compared(tiny):
    base, room = open_base(tiny.path), 64
    rows = [chat(f"{word} " * 300, answer) for word, answer in (("on", "off"), ("lamp", "on off"), ("lights", "lamp"))]
    chats = [tokenize_chat(base.tokenizer, base.template, row) for row in rows]
    for row, example in zip(chats, _examples(chats, room), strict=True):
        answer = [token for token, learned in zip(row.ids, row.learned, strict=True) if learned]
        assert row.learned.index(True) > room >= len(example)
        assert example.input_ids.tolist()[-len(answer) :] == answer
        assert example.loss_mask[-len(answer) :].all()
        assert example.input_ids[0] == row.ids[0]  # BOS, where there is one


def test_of_a_long_answer_the_end_is_compared(tiny):
    base = open_base(tiny.path)
    row = tokenize_chat(base.tokenizer, base.template, chat("lights", "on off " * 200))
    (example,) = _examples([row], 64)
    end = 1 + int(np.flatnonzero(row.learned)[-1])
    assert example.input_ids.tolist() == [row.ids[0], *row.ids[end - 63 : end]]


@pytest.mark.parametrize("learned", [[True] * 4 + [False] * 96, None], ids=["an early answer", "a text"])
def test_what_begins_early_is_compared_from_its_beginning(learned):
    (example,) = _examples([Tokenized("", list(range(100)), learned)], 64)
    assert example.input_ids.tolist() == list(range(64))


def test_llama_cpps_half_of_a_check_starts_without_torch():
    code = "import sys, edgelora.pipeline.foreign, runtime.scorer; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
