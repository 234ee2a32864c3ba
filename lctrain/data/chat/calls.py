"""Forms of tool calls: templates differ in how they read a turn that calls tools."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

Messages = list[dict[str, Any]]


class CallForm(NamedTuple):
    """Form of the turns with tool calls, as one template reads them.

    Attributes:
        blank: Content of a turn with tool calls and no text: None, or ""; KEPT leaves it as it is.
        as_text: Whether the arguments of a call are JSON text, and not an object.
    """

    blank: Any
    as_text: bool


KEPT = object()
AS_GIVEN = CallForm(KEPT, False)
_FORMS = [CallForm(blank, as_text) for as_text in (False, True) for blank in (KEPT, None, "")]
_NAME, _VALUE, _NULL = "a_function", "a value", "None"
_ARGUMENTS = {"key": _VALUE}
_UNWANTED = (_NULL, str(_ARGUMENTS), repr(json.dumps(_ARGUMENTS)))


def find_form(render: Callable[[Messages], str | None]) -> CallForm:
    """Returns the first form in which a template writes a call with its arguments.

    A template that writes the Python repr of an object expects JSON text, unless it also writes
    that of the text: it writes whole calls as they are.

    Args:
        render: Renders messages; None if the template refuses them.

    Returns:
        The form; AS_GIVEN if there is none, as for a template without tools.
    """
    function = {"name": _NAME, "arguments": _ARGUMENTS}
    call = {"type": "function", "id": "123456789", "function": function}
    messages: Messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "b"},
        {"role": "assistant", "content": "c"},
    ]
    for form in _FORMS:
        text = render(in_form(messages, form)) or ""
        is_written = _NAME in text and _VALUE in text
        if is_written and not any(unwanted in text for unwanted in _UNWANTED):
            return form
    return AS_GIVEN


def in_form(messages: Messages, form: CallForm) -> Messages:
    """Returns messages whose tool calls have the form that a template reads.

    Args:
        messages: Messages as `read_conversation` returns them, which are not changed.
        form: The form.
    """
    if form == AS_GIVEN:
        return messages
    return [_message(message, form) if "tool_calls" in message else message for message in messages]


def _message(message: dict[str, Any], form: CallForm) -> dict[str, Any]:
    found = {**message, "tool_calls": [_call(call, form) for call in message["tool_calls"]]}
    if form.blank is not KEPT and not str(message.get("content") or "").strip():
        found["content"] = form.blank
    return found


def _call(call: Mapping[str, Any], form: CallForm) -> dict[str, Any]:
    function = dict(call["function"])
    if form.as_text and not isinstance(function["arguments"], str):
        function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
    return {**call, "function": function}
