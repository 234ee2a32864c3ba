"""read_conversation: reads a record of `messages`, ShareGPT, or prompt and completion.

The result is JSON text, so that conversations can be split, cached and hashed like any other
documents: `{"messages": [...], "tools": [...], "prompt": 2}`. `tools` is absent if there are none.
`prompt` is present for records with prompt and completion: the number of messages in the prompt.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import date, time
from typing import Any

from lctrain.data.fields import FieldError, find_field, kind

ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_call": "assistant",  # its text is a call, or a list of calls, in JSON
}
"""Names of roles in data sets -> roles of chat templates."""
FIELDS = ("messages", "conversations")
USED = (*FIELDS, "prompt", "completion", "system", "tools")
_REMEDY = "Fix or remove it."


def read_conversation(record: Any, field: str | None = None, without_nulls: bool = False) -> str:
    """Returns the conversation of a record as JSON text.

    Args:
        record: A mapping, such as a JSON object.
        field: Name of the field that holds the messages; None takes `messages`, `conversations`, or
            `prompt` and `completion`, whichever the record has.
        without_nulls: Whether to leave out keys without a value at any depth: columns of Parquet
            have every key of every row.

    Raises:
        FieldError: if the record holds no conversation, or one that cannot be trained on.
    """
    try:
        return _read(record, field, without_nulls)
    except RecursionError as error:
        raise FieldError(f"a record must not be nested this deeply. {_REMEDY}") from error


def _read(record: Any, field: str | None, without_nulls: bool) -> str:
    if not isinstance(record, Mapping):
        raise FieldError(f"a record must be an object, got {kind(record)}. {_REMEDY}")
    if without_nulls:
        record = _without_nulls(record)
    found: dict[str, Any] = {}
    messages = _messages(record, field, found)
    system = _text(record.get("system") or "", "system")
    if messages[0]["role"] in ("system", "developer"):
        if system.strip() not in ("", str(messages[0].get("content", "")).strip()):
            raise FieldError(
                f"system must be left out of a record whose messages begin with a "
                f"{messages[0]['role']} turn, got another text in each. {_REMEDY}"
            )
    elif system:
        messages.insert(0, {"role": "system", "content": system})
        if "prompt" in found:
            found["prompt"] += 1
    _check_order(messages)
    tools = _decoded(record.get("tools"))
    if tools:
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            raise FieldError(f"tools must be a list of objects, got {kind(tools)}. {_REMEDY}")
        found["tools"] = tools
    conversation = {"messages": messages, **found}
    return json.dumps(conversation, ensure_ascii=False, separators=(",", ":"), default=_plain)


def _messages(
    record: Mapping[str, Any], field: str | None, found: dict[str, Any]
) -> list[dict[str, Any]]:
    """Returns the messages of a record; for prompt and completion, sets found["prompt"]."""
    name = field or next((name for name in FIELDS if record.get(name) is not None), None)
    if name is not None:
        return _turns(find_field(record, name), name)
    if record.get("prompt") is None or record.get("completion") is None:
        raise FieldError(
            "a record must have messages, conversations, or prompt and completion, got fields "
            f"{sorted(map(str, record))}. Set data.field to the field that holds the messages."
        )
    prompt = _side(record["prompt"], "prompt", "user")
    completion = _side(record["completion"], "completion", "assistant")
    found["prompt"] = len(prompt)
    return prompt + completion


def _side(value: Any, name: str, role: str) -> list[dict[str, Any]]:
    """Returns the messages of a prompt or a completion; a string is one message with that text."""
    if isinstance(value, list):
        return _turns(value, name)
    if not _text(value, name).strip():
        raise FieldError(f"{name} must hold text, got an empty one. {_REMEDY}")
    return [{"role": role, "content": value}]


def _turns(value: Any, name: str) -> list[dict[str, Any]]:
    turns = _decoded(value)
    if not isinstance(turns, list):
        raise FieldError(f"{name} must be a list of messages, got {kind(turns)}. {_REMEDY}")
    if not turns:
        raise FieldError(f"{name} must hold at least one message, got none. {_REMEDY}")
    return [_message(turn, f"{name}[{index}]") for index, turn in enumerate(turns)]


def _message(turn: Any, name: str) -> dict[str, Any]:
    """Returns a message with its role, content and tool calls, by the names of chat templates."""
    if not isinstance(turn, Mapping):
        raise FieldError(f"{name} must be an object with role and content, got {kind(turn)}.")
    given = turn.get("role", turn.get("from"))
    role = ROLES.get(given) if isinstance(given, str) else None
    if role is None:
        raise FieldError(f"{name}.role must be one of {', '.join(ROLES)}, got {given!r}. {_REMEDY}")
    message = {
        key: value
        for key, value in turn.items()
        if value is not None and key not in ("role", "from", "content", "value")
    }
    content = turn.get("content", turn.get("value"))
    if given == "function_call":
        calls = _decoded(content)
        message["tool_calls"] = calls if isinstance(calls, list) else [calls]
        content = None
    if message.get("tool_calls"):
        message["tool_calls"] = [_call(call, f"{name}.tool_calls") for call in turn_calls(message)]
    else:
        message.pop("tool_calls", None)
    if content is not None or role != "assistant":
        message["content"] = _content(content, role, name)
    blank = not str(message.get("content", "")).strip()
    if role == "assistant" and blank and "tool_calls" not in message:
        raise FieldError(f"{name} must have content or tool_calls, got an empty turn. {_REMEDY}")
    return {"role": role, **message}


def turn_calls(message: Mapping[str, Any]) -> list[Any]:
    """Returns the tool calls of a message, which may be stored as JSON text."""
    calls = _decoded(message["tool_calls"])
    return calls if isinstance(calls, list) else [calls]


def _content(content: Any, role: str, name: str) -> Any:
    """Returns the content of a message: text, or the JSON value of a tool's result."""
    if isinstance(content, list) and all(isinstance(part, Mapping) for part in content):
        kinds = {str(part.get("type") or "text") for part in content}
        if kinds <= {"text"} and all(isinstance(part.get("text"), str) for part in content):
            return "".join(part["text"] for part in content)
        if role != "tool":
            raise FieldError(
                f"{name}.content must be text, got parts of type {', '.join(sorted(kinds))}. Leave "
                "records with images or sound out."
            )
    if role == "tool" and content is not None:
        return content
    return "" if content is None else _text(content, f"{name}.content")


def _call(call: Any, name: str) -> dict[str, Any]:
    """Returns a tool call; arguments that are JSON text become an object."""
    if not isinstance(call, Mapping):
        raise FieldError(f"{name} must be objects with a function, got {kind(call)}. {_REMEDY}")
    inner = call.get("function", call)
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        raise FieldError(f"{name} must name a function, got {str(call)[:80]}. {_REMEDY}")
    function = {**inner, "arguments": _decoded(inner.get("arguments", {}))}
    return (
        {"type": "function", **call, "function": function}
        if "function" in call
        else {
            "type": "function",
            "function": function,
        }
    )


def _check_order(messages: list[dict[str, Any]]) -> None:
    """Raises FieldError if the roles of a conversation are out of order."""
    roles = [message["role"] for message in messages]
    first = next((i for i, role in enumerate(roles) if role not in ("system", "developer")), None)
    if first is None or roles[first] != "user":
        got = "none" if first is None else f"{roles[first]} in message {first}"
        raise FieldError(f"a conversation must begin with a user turn, got {got}. {_REMEDY}")
    for index, role in enumerate(roles):
        before = messages[index - 1]
        called = before["role"] == "tool" or before.get("tool_calls")
        if role == "tool" and not called:
            raise FieldError(
                f"a tool turn must follow a tool call, got message {index} after "
                f"{before['role']} without tool_calls. {_REMEDY}"
            )


def _decoded(value: Any) -> Any:
    """Returns the parsed value of text that is a JSON list or object; other values unchanged."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def _plain(value: Any) -> str:
    """Returns a date or time of a table, such as a turn's time stamp, as text of JSON."""
    if isinstance(value, date | time):
        return value.isoformat()
    raise FieldError(
        f"a conversation must hold only values of JSON, dates and times, got {kind(value)}. "
        f"{_REMEDY}"
    )


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise FieldError(f"{name} must be text, got {kind(value)}. {_REMEDY}")
    return value


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
