"""Tests that records of all formats become the same conversations, and what is refused."""

import json
from datetime import datetime

import pytest

from lctrain.data.chat.conversation import read_conversation
from lctrain.data.fields import FieldError

PLAIN = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


def messages(record, **options):
    return json.loads(read_conversation(record, **options))["messages"]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": PLAIN},
        {"messages": json.dumps(PLAIN)},
        {"messages": [{**turn, "name": None} for turn in PLAIN], "id": 3},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {"conversations": PLAIN},
        {"prompt": "Hi", "completion": "Hello"},
        {"prompt": PLAIN[:1], "completion": PLAIN[1:]},
        {"prompt": PLAIN[:1], "completion": "Hello"},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, PLAIN[1]]},
    ],
)
def test_formats(record):
    assert messages(record) == PLAIN


def test_a_field_of_another_name():
    assert messages({"doc": {"chat": PLAIN}, "messages": []}, field="doc.chat") == PLAIN


def test_system_texts_beside_the_turns():
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    record = {"system": "Be brief.", "conversations": turns}
    assert messages(record) == [SYSTEM, *PLAIN]
    assert messages({"system": "Be brief. ", "messages": [SYSTEM, *PLAIN]}) == [SYSTEM, *PLAIN]
    with pytest.raises(FieldError, match="system must be left out of a record whose messages beg"):
        messages({"system": "Be loud.", "messages": [SYSTEM, *PLAIN]})
    record = {"system": "Be brief.", "prompt": "Hi", "completion": "Hello"}
    assert json.loads(read_conversation(record)) == {"messages": [SYSTEM, *PLAIN], "prompt": 2}


@pytest.mark.parametrize(
    "text",
    [
        *("[1, 2, 3]", "[]", '{"a": 1}', '[{"name": "Bob"}]'),
        json.dumps(PLAIN),
    ],
)
def test_a_prompt_or_completion_that_is_json_stays_text(text):
    user, assistant = PLAIN
    found = messages({"prompt": "Hi", "completion": text})
    assert found == [user, {**assistant, "content": text}]
    found = messages({"prompt": text, "completion": "Hello"})
    assert found == [{**user, "content": text}, assistant]


@pytest.mark.parametrize(
    "call",
    [
        CALL,
        {"function": {"name": "f", "arguments": '{"x": 1}'}},
        {"name": "f", "arguments": {"x": 1}},
    ],
)
def test_tool_calls(call):
    tools = [{"type": "function", "function": {"name": "f"}}]
    record = {
        "messages": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": {"y": 2}, "name": "f"},
            {"role": "assistant", "content": "Hello", "tool_calls": []},
        ],
        "tools": json.dumps(tools),
    }
    found = json.loads(read_conversation(record))
    assert found["tools"] == tools
    _, asked, result, said = found["messages"]
    assert asked["tool_calls"][0]["function"] == CALL["function"]
    assert asked["tool_calls"][0]["type"] == "function"
    assert "content" not in asked
    assert result == {"role": "tool", "content": {"y": 2}, "name": "f"}
    assert said == PLAIN[1]


def test_calls_of_sharegpt():
    turns = [
        {"from": "human", "value": "Hi"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"from": "observation", "value": "2"},
        {"from": "gpt", "value": "Hello"},
    ]
    roles = [(m["role"], m.get("tool_calls")) for m in messages({"conversations": turns})]
    assert roles == [("user", None), ("assistant", [CALL]), ("tool", None), ("assistant", None)]


def test_nulls_of_a_table_are_no_arguments():
    call = {"name": "f", "arguments": {"x": 1, "y": None}}
    record = {"messages": [PLAIN[0], {"role": "assistant", "content": None, "tool_calls": [call]}]}
    of_a_table = messages(record, without_nulls=True)[1]["tool_calls"][0]["function"]
    assert of_a_table["arguments"] == {"x": 1}
    of_a_line = messages(record)[1]["tool_calls"][0]["function"]
    assert of_a_line["arguments"] == {"x": 1, "y": None}


def test_time_stamps_of_a_table_become_text():
    record = {"messages": [PLAIN[0] | {"time": datetime(2026, 1, 2, 3)}, PLAIN[1]]}
    assert messages(record)[0]["time"] == "2026-01-02T03:00:00"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([1], "a record must be an object, got list"),
        ({"text": "a"}, r"must have messages, conversations, or prompt .* got fields \['text'\]"),
        ({"prompt": "a", "completion": None}, "must have messages, conversations, or prompt"),
        ({"prompt": "a", "completion": " "}, "completion must hold text, got an empty one"),
        ({"prompt": "a", "completion": 3}, "completion must be text, got int"),
        ({"messages": []}, "messages must hold at least one message, got none"),
        ({"messages": "Hi"}, "messages must be a list of messages, got str"),
        ({"messages": ["Hi"]}, r"messages\[0\] must be an object with role and content, got str"),
        ({"messages": [{"content": "a"}]}, r"messages\[0\].role must be one of .*, got None"),
        ({"messages": [{"role": "boss", "content": "a"}]}, r"role must be one of .*, got 'boss'"),
        ({"messages": [PLAIN[0], {"role": "assistant", "content": " "}]}, "got an empty turn"),
        ({"messages": [PLAIN[0], {"role": "assistant"}]}, "must have content or tool_calls"),
        ({"messages": [PLAIN[1]]}, "must begin with a user turn, got assistant in message 0"),
        ({"messages": [SYSTEM]}, "must begin with a user turn, got none"),
        ({"messages": [*PLAIN, {"role": "tool", "content": "a"}]}, "must follow a tool call, got"),
        ({"messages": [{"role": "user", "content": 3}]}, r"messages\[0\].content must be text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]},
            r"messages\[0\].content must be text, got parts of type image",
        ),
        (
            {"messages": [PLAIN[0], {"role": "assistant", "tool_calls": [{"arguments": {}}]}]},
            r"messages\[1\].tool_calls must name a function, got",
        ),
        (
            {"messages": [PLAIN[0], {"role": "assistant", "tool_calls": [3]}]},
            r"messages\[1\].tool_calls must be objects with a function, got int",
        ),
        ({"messages": PLAIN, "tools": "weather"}, "tools must be a list of objects, got str"),
        (
            {"messages": [{"role": "user", "content": [{"type": ["text"], "text": "a"}, {}]}]},
            r"messages\[0\].content must be text, got parts of type \['text'\], text",
        ),
        ({"messages": "[" * 100_000}, "a record must not be nested this deeply"),
        (
            {"messages": [PLAIN[0] | {"blob": b"a"}, PLAIN[1]]},
            "must hold only values of JSON, dates and times, got bytes",
        ),
    ],
)
def test_records_that_hold_no_conversation(record, message):
    with pytest.raises(FieldError, match=message):
        read_conversation(record)
