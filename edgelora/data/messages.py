"""One message of a row, as OpenAI's chat format or ShareGPT has it → a `Message`. ValueError says what is wrong."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from edgelora.data.rows import ROLES, Message

# who speaks in ShareGPT's `from`, with the names that its many exporters use
SPEAKERS = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "chatgpt": "assistant", "bard": "assistant", "bing": "assistant", "model": "assistant",
    "function_call": "assistant", "tool_call": "assistant",
    "tool": "tool", "observation": "tool", "function_response": "tool", "tool_response": "tool",
}  # fmt: skip
OWNERS = {"tool_calls": "assistant", "reasoning_content": "assistant", "weight": "assistant", "tool_call_id": "tool"}
CALLING = ("function_call", "tool_call")


def parse_messages(value: Any, field: str) -> tuple[Message, ...]:
    """A list of messages, in either format. Raises ValueError with the reason."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"`{field}` is not a list with at least one message")
    return tuple(parse_message(from_sharegpt(m) if isinstance(m, dict) and "from" in m else m) for m in value)


def parse_message(m: Any) -> Message:
    """`{"role", "content", …}`. Raises ValueError with the reason."""
    if not isinstance(m, dict) or m.get("role") not in ROLES:
        raise ValueError(f"every message needs a `role` ({', '.join(ROLES)}) and a text `content`")
    calls = tuple(_with_object(call) for call in parse_functions(m.get("tool_calls"), "tool_calls"))
    if not isinstance(m.get("content"), str) and not (calls and m.get("content") is None):
        raise ValueError("every message needs a `role` and a text `content` (null only beside `tool_calls`)")
    for field, role in OWNERS.items():
        if m.get(field) and m["role"] != role:
            raise ValueError(f"`{field}` in a message by `{m['role']}`: only one by `{role}` has it")
    for field in ("content", "tool_call_id", "name", "reasoning_content"):
        if m.get(field) is not None and not isinstance(m[field], str):
            raise ValueError(f"`{field}` is not a text")
        check_unicode(m.get(field), field)
    return Message(
        m["role"], m.get("content"), calls, m.get("tool_call_id"), m.get("name"), m.get("reasoning_content"),
        _weight(m.get("weight")) if m["role"] == "assistant" else 1.0,
    )  # fmt: skip


def from_sharegpt(m: Mapping[str, Any]) -> dict[str, Any]:
    """`{"from": "human", "value": …}` in the words of the chat format."""
    speaker, said = m["from"], m.get("value")
    if not isinstance(speaker, str) or speaker not in SPEAKERS:
        raise ValueError(f"`from` is {speaker!r}; known are {', '.join(SPEAKERS)}")
    kept = {field: m[field] for field in ("weight", "name") if field in m}
    if speaker not in CALLING:
        return {"role": SPEAKERS[speaker], "content": said, **kept}
    calls = from_json(said, "the `value` of a call")
    listed = [{"type": "function", "function": call} for call in (calls if isinstance(calls, list) else [calls])]
    return {"role": "assistant", "content": None, "tool_calls": listed, **kept}


def parse_functions(value: Any, field: str) -> tuple[Mapping[str, Any], ...]:
    """A list of `{"function": {"name": …}}`, as both `tools` and `tool_calls` are."""
    if value is None:
        return ()
    if not isinstance(value, list):
        raise ValueError(f"`{field}` is not a list")
    for item in value:
        function = item.get("function") if isinstance(item, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise ValueError(
                f'every item of `{field}` needs the form {{"type": "function", "function": {{"name": …}}}}'
            )
    check_unicode(value, field)
    return tuple(value)


def parse_tools(value: Any) -> tuple[Mapping[str, Any], ...]:
    """`tools` as a list, as such a list written as JSON in a text, and with bare functions in it (both in ShareGPT)."""
    if isinstance(value, str):
        value = from_json(value, "`tools`") if value.strip() else None
    if isinstance(value, list):
        value = [
            {"type": "function", "function": item} if isinstance(item, dict) and "function" not in item else item
            for item in value
        ]
    return parse_functions(value, "tools")


def from_json(text: Any, what: str) -> Any:
    """What a text holds as JSON."""
    with contextlib.suppress(ValueError, RecursionError, TypeError):
        return json.loads(text)
    raise ValueError(f"{what} is not JSON in a text")


def require_answer(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The messages, if the last one is something to learn to say."""
    last = messages[-1]
    if last.role != "assistant" or not ((last.content or "").strip() or last.tool_calls):
        raise ValueError("no assistant turn to learn: the last message must be a non-empty one by `assistant`")
    return tuple(messages)


def check_unicode(value: Any, field: str) -> None:
    """Raise ValueError for half of a surrogate pair anywhere in `value`."""
    if value is None or (isinstance(value, str) and value.isascii()):
        return
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as e:
        raise ValueError(
            f"half of a surrogate pair (\\ud83d …) in a `{field}`: no text, and no tokenizer reads it"
        ) from e
    except (TypeError, RecursionError) as e:  # dates and bytes of a Parquet file are nothing that JSON has
        raise ValueError(f"`{field}` is nested too deeply, or holds what JSON does not have") from e


def _weight(value: Any) -> float:
    if value is None:
        return 1.0
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError("`weight` is not a number from 0 up")
    return float(value)


def _with_object(call: Mapping[str, Any]) -> Mapping[str, Any]:
    """The call with its arguments as an object: OpenAI sends them as JSON in a text, templates expect the object."""
    arguments = call["function"].get("arguments", {})
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError, RecursionError):
            arguments = json.loads(arguments)
    if not isinstance(arguments, dict):
        raise ValueError("the `arguments` of a tool call are neither an object nor one written as JSON")
    return {**call, "function": {**call["function"], "arguments": arguments}}
