"""THE TABLE of data formats: how a row is recognised by its keys, and read. One function and one line for a new one."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from edgelora.data.messages import check_unicode, parse_messages, parse_tools, require_answer
from edgelora.data.rows import Conversation, Document, Message, Preference, Rated, Row, Tokenized, unlearned
from edgelora.errors import ConfigError

AUTO = "auto"
IGNORED = -100  # the label of a token without loss, in files for transformers

RawRow = Mapping[str, Any]


@dataclass(frozen=True)
class DataFormat:
    """`keys`: what a row of this kind has, with blanks between them. `parse` raises ValueError with the reason."""

    keys: str
    parse: Callable[[RawRow], Row]

    def fits(self, keys: Container[str]) -> bool:
        return all(key in keys for key in self.keys.split())


# -- conversations ------------------------------------------------------------------------------------------------


def parse_chat(row: RawRow) -> Conversation:
    """`{"messages": [{"role", "content"}, …]}`, OpenAI's chat format, with `tools`, `tool_calls` and `weight`."""
    return _conversation(row, _messages(row["messages"], "messages"))


def parse_sharegpt(row: RawRow) -> Conversation:
    """`{"conversations": [{"from": "human", "value": …}, …]}`, with `system` and `tools` beside them in some files."""
    messages = _messages(row["conversations"], "conversations")
    return _conversation(row, (*_system(row), *messages))


def parse_alpaca(row: RawRow) -> Conversation:
    """`{"instruction", "input", "output"}` (Stanford Alpaca), with `system` and `history` in LLaMA-Factory's files."""
    asked = _text(row, "instruction")
    extra = _text(row, "input") if row.get("input") else ""
    earlier = row.get("history") or []
    if not isinstance(earlier, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in earlier):
        raise ValueError("`history` is not a list of [question, answer]")
    turns = [(f"{asked}\n\n{extra}" if extra else asked, _text(row, "output"))]
    turns = [(_as_text(q, "history"), _as_text(a, "history")) for q, a in earlier] + turns
    spoken = [Message(role, said) for turn in turns for role, said in zip(("user", "assistant"), turn, strict=True)]
    return _conversation(row, (*_system(row), *spoken))


def parse_completion(row: RawRow) -> Conversation:
    """`{"prompt", "completion"}`: two texts, a question and its answer in the model's own template; or two lists of
    messages. What the assistant says in the prompt is not learned."""
    prompt, completion = _said(row["prompt"], "prompt", "user"), _said(row["completion"], "completion", "assistant")
    return _conversation(row, (*_system(row), *unlearned(prompt), *completion))


def parse_kto(row: RawRow) -> Rated:
    """`{"prompt", "completion", "label": true}`, as TRL has it."""
    if not isinstance(row["label"], bool):
        raise ValueError("`label` is neither true nor false (the format completion does without it)")
    return Rated(parse_completion(row), row["label"])


def parse_preference(row: RawRow) -> Preference:
    """`{"prompt", "chosen", "rejected"}`, each a text or a list of messages.

    Without a `prompt`, `chosen` and `rejected` are whole conversations, and what they begin with alike is the prompt.
    `chosen` and `rejected` may also repeat the messages of the prompt, as UltraFeedback does.
    """
    answers = [_said(row[side], side, "assistant") for side in ("chosen", "rejected")]
    if row.get("prompt") is None:
        if isinstance(row["chosen"], str) or isinstance(row["rejected"], str):
            raise ValueError("`chosen` and `rejected` are texts, and there is no `prompt` that they answer")
        prompt: tuple[Message, ...] = ()
    else:
        prompt = _said(row["prompt"], "prompt", "user")
    if all(answer[: len(prompt)] == prompt for answer in answers):
        prompt = _common(*answers)
        answers = [answer[len(prompt) :] for answer in answers]
    if answers[0] == answers[1]:
        raise ValueError("`chosen` and `rejected` are the same")
    if not all(answers):
        raise ValueError("`chosen` and `rejected` are one the beginning of the other")
    first = (*_system(row), *unlearned(prompt))
    return Preference(*(_conversation(row, (*first, *answer)) for answer in answers))


def _conversation(row: RawRow, messages: Sequence[Message]) -> Conversation:
    group = row.get("group")
    if group is not None and not isinstance(group, str):
        raise ValueError("`group` is not a text")
    return Conversation(require_answer(messages), group, parse_tools(row.get("tools")))


def _said(value: Any, field: str, role: str) -> tuple[Message, ...]:
    return _messages(value, field) if isinstance(value, list) else (Message(role, _as_text(value, field)),)


def _messages(value: Any, field: str) -> tuple[Message, ...]:
    if isinstance(value, list) and any(isinstance(m, dict) and m.get("function_call") for m in value):
        raise ValueError(
            "`function_call` in a message is OpenAI's older form: write "
            '`"tool_calls": [{"type": "function", "function": …}]` with what it holds'
        )
    return parse_messages(value, field)


def _system(row: RawRow) -> tuple[Message, ...]:
    return (Message("system", _text(row, "system")),) if row.get("system") else ()


def _common(left: Sequence[Message], right: Sequence[Message]) -> tuple[Message, ...]:
    return tuple(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False)))


def _text(row: RawRow, key: str) -> str:
    return _as_text(row.get(key), key)


def _as_text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"`{field}` is not a text")
    check_unicode(value, field)
    return value


# -- what is no conversation --------------------------------------------------------------------------------------


def parse_document(row: RawRow) -> Document:
    """`{"text": …}`: a document, learned from its first word to its end."""
    text = _text(row, "text")
    if not text.strip():
        raise ValueError("`text` is empty")
    return Document(text)


def parse_tokenized(row: RawRow) -> Tokenized:
    """`{"input_ids": […]}`, with `labels` (-100 where nothing is learned) or a `loss_mask`; without: all is learned.

    Padding, where `attention_mask` is 0, is taken out.
    """
    ids = _whole_numbers(row["input_ids"], "input_ids")
    learned = [True] * len(ids)
    if row.get("labels") is not None:
        labels = _whole_numbers(row["labels"], "labels", len(ids), least=IGNORED)
        learned = [label != IGNORED for label in labels]
        if any(label not in (token, IGNORED) for token, label in zip(ids, labels, strict=True)):
            raise ValueError("`labels` are other tokens than `input_ids`: each must be the token itself, or -100")
    if row.get("loss_mask") is not None:
        mask = _whole_numbers(row["loss_mask"], "loss_mask", len(ids))
        learned = [bool(m) and here for m, here in zip(mask, learned, strict=True)]
    if row.get("attention_mask") is not None:
        seen = _whole_numbers(row["attention_mask"], "attention_mask", len(ids))
        ids = [i for i, kept in zip(ids, seen, strict=True) if kept]
        learned = [here for here, kept in zip(learned, seen, strict=True) if kept]
    if len(ids) < 2:
        raise ValueError("`input_ids` has fewer than two tokens: nothing follows anything")
    return Tokenized(tuple(ids), tuple(learned))


def _whole_numbers(value: Any, field: str, length: int | None = None, least: int = 0) -> list[int]:
    if not isinstance(value, list) or not all(isinstance(n, int) and least <= n < 1 << 31 for n in value):
        raise ValueError(f"`{field}` is not a list of whole numbers")
    if length is not None and len(value) != length:
        raise ValueError(f"`{field}` has {len(value)} items, `input_ids` {length}")
    return [int(n) for n in value]


# -- the table ----------------------------------------------------------------------------------------------------

# The first one whose keys a row has is taken: UltraFeedback's pairs have `messages` too, Alpaca's rows have `text`.
DATA_FORMATS: dict[str, DataFormat] = {
    "preference": DataFormat("chosen rejected", parse_preference),
    "kto": DataFormat("prompt completion label", parse_kto),
    "chat": DataFormat("messages", parse_chat),
    "sharegpt": DataFormat("conversations", parse_sharegpt),
    "alpaca": DataFormat("instruction output", parse_alpaca),
    "completion": DataFormat("prompt completion", parse_completion),
    "tokenized": DataFormat("input_ids", parse_tokenized),
    "text": DataFormat("text", parse_document),
}


def parse_row(row: Any, data_format: str = AUTO) -> tuple[str, Row]:
    """The name of the format and the row, read. Raises ValueError with the reason."""
    if not isinstance(row, dict):
        raise ValueError("a row must be a JSON object")
    if data_format != AUTO:
        chosen = DATA_FORMATS[data_format]
        if not chosen.fits(row):
            raise ValueError(f"the format {data_format} needs the keys {chosen.keys}; this row has {_listed(row)}")
        return data_format, chosen.parse(row)
    filled = {key for key, value in row.items() if value is not None}  # rows of one shape: null is what they lack
    for keys in (filled, row):
        for name, known in DATA_FORMATS.items():
            if known.fits(keys):
                return name, known.parse(row)
    raise ValueError(f"no format has the keys of this row: {_listed(row)}{_nearest(row)}")


def known_formats() -> str:
    """`chat (messages), alpaca (instruction, output) …`."""
    return ", ".join(f"{name} ({', '.join(known.keys.split())})" for name, known in DATA_FORMATS.items())


def require_format(name: str) -> str:
    """`name`, if it is `auto` or stands in the table. Raises ConfigError with the nearest name."""
    if name == AUTO or name in DATA_FORMATS:
        return name
    near = difflib.get_close_matches(name, [AUTO, *DATA_FORMATS], 1)
    raise ConfigError(
        what=f"the data format {name}" + (f", did you mean {near[0]}?" if near else ""),
        why=f"known are {', '.join([AUTO, *DATA_FORMATS])}",
        fix="name one of these; auto recognises each row by its keys",
    )


NEAR = 0.75  # of difflib's ratio: a letter or two apart


def _nearest(row: RawRow) -> str:
    """`; the nearest is alpaca (instruction, output), with `output` for `outptu``; empty where none is near."""
    found: dict[str, dict[str, str]] = {}
    for name, known in DATA_FORMATS.items():
        near = {
            key: match
            for key in known.keys.split()
            if (match := difflib.get_close_matches(key, map(str, row), 1, NEAR))
        }
        found[name] = {key: match[0] for key, match in near.items()}
    name = max(found, key=lambda one: len(found[one]) / len(DATA_FORMATS[one].keys.split()))
    if not found[name]:
        return ""
    other = [f"`{key}` for `{mine}`" for key, mine in found[name].items() if key != mine]
    said = f"; the nearest is {name} ({', '.join(DATA_FORMATS[name].keys.split())})"
    return said + (f", with {', '.join(other)}" if other else "")


def _listed(row: RawRow) -> str:
    return (", ".join(map(str, list(row)[:8])) + (" …" if len(row) > 8 else "")) or "none"
