"""Rows of every format: what they are read as, and how each is recognised."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from edgelora.data.formats import AUTO, DATA_FORMATS, parse_row, require_format
from edgelora.data.rows import Conversation, Document, Message, Preference, Rated, Tokenized
from edgelora.errors import ConfigError

ASKED, SAID = Message("user", "Hi"), Message("assistant", "Hello")
CHAT = Conversation((ASKED, SAID))
WORSE = Conversation((ASKED, Message("assistant", "Go away")))
ROLE_USER, ROLE_SAYS = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
ROLE_WORSE = {"role": "assistant", "content": "Go away"}
FUNCTION = {"name": "light", "arguments": {"on": True}}
CALL = {"type": "function", "function": FUNCTION}
TOOL = {"type": "function", "function": {"name": "light"}}

# format → rows of it, and what they are read as
GOOD = {
    "chat": [
        ({"messages": [ROLE_USER, ROLE_SAYS]}, CHAT),
        ({"messages": [ROLE_USER, {**ROLE_SAYS, "weight": 0}]}, Conversation((ASKED, replace(SAID, weight=0.0)))),
        ({"messages": [ROLE_USER, {**ROLE_SAYS, "weight": 2.5}]}, Conversation((ASKED, replace(SAID, weight=2.5)))),
        ({"messages": [{**ROLE_USER, "weight": 0}, ROLE_SAYS]}, CHAT),
        ({"messages": [ROLE_USER, {**ROLE_SAYS, "function_call": None}]}, CHAT),
        (
            {"messages": [ROLE_USER, {"role": "assistant", "tool_calls": [CALL]}], "tools": json.dumps([TOOL])},
            Conversation((ASKED, Message("assistant", None, (CALL,))), tools=(TOOL,)),
        ),
    ],
    "sharegpt": [
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}, CHAT),
        ({"conversations": [ROLE_USER, ROLE_SAYS]}, CHAT),
        (
            {"conversations": [{"from": "user", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "system": "Brief."},
            Conversation((Message("system", "Brief."), ASKED, SAID)),
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "Hi"}, {"from": "function_call", "value": json.dumps(FUNCTION)},
                    {"from": "observation", "value": "done"}, {"from": "gpt", "value": "Hello", "weight": 0.5},
                ],
                "tools": json.dumps([TOOL["function"]]),
            },
            Conversation(
                (ASKED, Message("assistant", None, (CALL,)), Message("tool", "done"), replace(SAID, weight=0.5)),
                tools=(TOOL,),
            ),
        ),
    ],
    "alpaca": [
        ({"instruction": "Hi", "output": "Hello"}, CHAT),
        ({"instruction": "Hi", "input": "", "output": "Hello", "text": "Below is …"}, CHAT),
        (
            {"instruction": "Add", "input": "1 2", "output": "3", "system": "Brief.", "history": [["Hi", "Hello"]]},
            Conversation((
                Message("system", "Brief."), ASKED, SAID, Message("user", "Add\n\n1 2"), Message("assistant", "3"),
            )),
        ),
    ],
    "completion": [
        ({"prompt": "Hi", "completion": "Hello"}, CHAT),
        ({"prompt": [ROLE_USER], "completion": [ROLE_SAYS]}, CHAT),
        (
            {"prompt": [ROLE_USER, ROLE_SAYS, ROLE_USER], "completion": "Hello", "group": "greetings"},
            Conversation((ASKED, replace(SAID, weight=0.0), ASKED, SAID), "greetings"),
        ),
    ],
    "text": [({"text": "Once upon a time"}, Document("Once upon a time"))],
    "preference": [
        ({"prompt": "Hi", "chosen": "Hello", "rejected": "Go away"}, Preference(CHAT, WORSE)),
        ({"prompt": [ROLE_USER], "chosen": [ROLE_SAYS], "rejected": [ROLE_WORSE]}, Preference(CHAT, WORSE)),
        ({"chosen": [ROLE_USER, ROLE_SAYS], "rejected": [ROLE_USER, ROLE_WORSE]}, Preference(CHAT, WORSE)),
        (  # UltraFeedback's rows
            {
                "prompt": "Hi", "chosen": [ROLE_USER, ROLE_SAYS], "rejected": [ROLE_USER, ROLE_WORSE],
                "messages": [ROLE_USER, ROLE_SAYS],
            },
            Preference(CHAT, WORSE),
        ),
        (  # what both say first is the prompt, and not learned
            {"chosen": [ROLE_SAYS, ROLE_USER, ROLE_SAYS], "rejected": [ROLE_SAYS, ROLE_USER, ROLE_WORSE]},
            Preference(*(Conversation((replace(SAID, weight=0.0), *c.messages)) for c in (CHAT, WORSE))),
        ),
    ],
    "kto": [
        ({"prompt": "Hi", "completion": "Hello", "label": True}, Rated(CHAT, True)),
        ({"prompt": [ROLE_USER], "completion": [ROLE_WORSE], "label": False}, Rated(WORSE, False)),
    ],
    "tokenized": [
        ({"input_ids": [5, 6, 7]}, Tokenized((5, 6, 7), (True, True, True))),
        ({"input_ids": [5, 6, 7], "labels": [-100, 6, -100]}, Tokenized((5, 6, 7), (False, True, False))),
        ({"input_ids": [5, 6, 7], "loss_mask": [0, 0, 1]}, Tokenized((5, 6, 7), (False, False, True))),
        ({"input_ids": [5, 6, 0], "attention_mask": [1, 1, 0]}, Tokenized((5, 6), (True, True))),
    ],
}  # fmt: skip
CASES = [(name, row, read) for name in DATA_FORMATS for row, read in GOOD[name]]


@pytest.mark.parametrize(("name", "row", "read"), CASES)
def test_a_good_row_of_every_format(name, row, read):
    assert parse_row(row) == parse_row(row, name) == (name, read)
    assert set(DATA_FORMATS[name].keys.split()) <= set(row)


@pytest.mark.parametrize(("name", "row"), [case[:2] for case in CASES])
def test_a_row_is_also_read_as_another_format_whose_keys_it_has(name, row):
    for other, known in DATA_FORMATS.items():
        if other == name:
            continue
        if set(known.keys.split()) <= set(row):
            assert parse_row(row, other)[0] == other
        else:
            with pytest.raises(ValueError, match=f"the format {other} needs the keys"):
                parse_row(row, other)


# rows of files whose rows have all keys, null where there is nothing → the format
NULLS = [
    ({"messages": [ROLE_USER, ROLE_SAYS], "chosen": None, "rejected": None}, "chat"),
    ({"prompt": "Hi", "completion": "Hello", "label": None}, "completion"),
    ({"messages": None, "text": "Once"}, "text"),
    ({"instruction": None, "output": None, "text": "Once"}, "text"),
    ({"prompt": None, "chosen": [ROLE_USER, ROLE_SAYS], "rejected": [ROLE_USER, ROLE_WORSE]}, "preference"),
]


@pytest.mark.parametrize(("row", "name"), NULLS)
def test_a_key_that_is_null_makes_no_format(row, name):
    without = {key: value for key, value in row.items() if value is not None}
    assert parse_row(row) == parse_row(without) == (name, parse_row(row, name)[1])


# row → why it is refused
BAD = {
    "sharegpt by nobody": ({"conversations": [{"from": "narrator", "value": "Hi"}]}, "`from` is 'narrator'"),
    "sharegpt without a value": ({"conversations": [{"from": "gpt"}]}, "a text `content`"),
    "a call that is no JSON": ({"conversations": [{"from": "function_call", "value": "on"}]}, "is not JSON in a text"),
    "sharegpt that ends with a question": (
        {"conversations": [{"from": "gpt", "value": "a"}, {"from": "human", "value": "b"}]}, "no assistant turn",
    ),
    "tools in broken JSON": ({"messages": [ROLE_USER, ROLE_SAYS], "tools": "[{"}, "`tools` is not JSON"),
    "alpaca without an answer": ({"instruction": "Hi", "output": " "}, "no assistant turn to learn"),
    "alpaca with a number": ({"instruction": "Hi", "output": 3}, "`output` is not a text"),
    "alpaca with half a history": ({"instruction": "a", "output": "b", "history": [["q"]]}, "`history`"),
    "a completion that is null": ({"prompt": "Hi", "completion": None}, "`completion` is not a text"),
    "OpenAI's older calls": (
        {"messages": [ROLE_USER, {**ROLE_SAYS, "function_call": FUNCTION}]}, "`function_call` in a message",
    ),
    "older calls without words": (
        {"prompt": "a", "completion": [{"role": "assistant", "content": None, "function_call": FUNCTION}]},
        'write `"tool_calls": [{"type": "function", "function": …}]`',
    ),
    "messages that are null": ({"messages": None}, "`messages` is not a list"),
    "half a surrogate pair": ({"prompt": "\ud83d", "completion": "a"}, "half of a surrogate pair"),
    "an empty text": ({"text": " \n"}, "`text` is empty"),
    "a text that is a list": ({"text": ["a"]}, "`text` is not a text"),
    "two equal answers": ({"prompt": "a", "chosen": "b", "rejected": "b"}, "are the same"),
    "answers to nothing": ({"chosen": "b", "rejected": "c"}, "there is no `prompt` that they answer"),
    "an answer that goes on": (
        {"chosen": [ROLE_USER, ROLE_SAYS], "rejected": [ROLE_USER, ROLE_SAYS, ROLE_USER, ROLE_SAYS]},
        "one the beginning of the other",
    ),
    "a label that is a number": ({"prompt": "a", "completion": "b", "label": 1}, "neither true nor false"),
    "ids that are texts": ({"input_ids": ["a", "b"]}, "`input_ids` is not a list of whole numbers"),
    "negative ids": ({"input_ids": [1, -100]}, "`input_ids` is not a list of whole numbers"),
    "one id": ({"input_ids": [1]}, "fewer than two tokens"),
    "other labels": ({"input_ids": [1, 2], "labels": [1, 3]}, "`labels` are other tokens"),
    "labels of another length": ({"input_ids": [1, 2], "labels": [1]}, "`labels` has 1 items, `input_ids` 2"),
    "a mask of another length": ({"input_ids": [1, 2], "loss_mask": [1]}, "`loss_mask` has 1 items"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_refused_with_its_reason(case):
    row, why = BAD[case]
    with pytest.raises(ValueError) as caught:
        parse_row(row)
    assert why in str(caught.value)


def test_an_unknown_format_is_refused_with_the_nearest_name():
    for name in (AUTO, *DATA_FORMATS):
        assert require_format(name) == name
    with pytest.raises(ConfigError) as caught:
        require_format("sharegtp")
    assert caught.value.what == "the data format sharegtp, did you mean sharegpt?"
    assert caught.value.why == ("known are auto, preference, kto, chat, sharegpt, alpaca, completion, tokenized, text")
    assert caught.value.fix == "name one of these; auto recognises each row by its keys"
