"""Markers: private-use characters that show where messages end in a rendered conversation.

A marker stands at the end of each message. A cut is a further private-use character, inside the
text of a special token in a message.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FIRST, _CUT = 0x100000, "\U0010fffd"  # first marker, and the cut: private-use characters
PRIVATE = re.compile("[\U00100000-\U0010fffd]")
Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Marked:
    """A rendered text after its markers were removed, with their positions.

    Attributes:
        text: The text, without markers.
        ends: Position of each message's last marker, by the number of the message.
        last: Number of the message whose marker comes last in the text; None without markers.
        cuts: Positions inside those texts of special tokens that are ordinary text.
    """

    text: str
    ends: dict[int, int]
    last: int | None
    cuts: list[int]

    @property
    def tail(self) -> str:
        """The text after the last marker."""
        return self.text if self.last is None else self.text[self.ends[self.last] :]


def mark(messages: Messages, protected: re.Pattern[str] | None, ends: bool = True) -> Messages:
    """Returns messages with a marker at each end, and cuts inside texts of special tokens.

    Args:
        messages: The messages.
        protected: Pattern of special tokens that get a cut; None for none.
        ends: Whether to put markers at the ends.
    """

    def leaf(text: str, marker: str) -> str:
        body = text.rstrip()
        return body + marker + text[len(body) :] if body and marker else text

    def walk(value: Any, marker: str) -> Any:
        if isinstance(value, str):
            return leaf(value, marker)
        if isinstance(value, Mapping):
            return {key: walk(item, marker) for key, item in value.items()}
        return [walk(item, marker) for item in value] if isinstance(value, list) else value

    def call(given: Mapping[str, Any], marker: str) -> dict[str, Any]:
        function = given["function"]
        arguments = walk(function["arguments"], marker)
        name = function["name"]
        if marker not in json.dumps(arguments, ensure_ascii=False):
            name = leaf(name, marker)
        return {**given, "function": {**function, "name": name, "arguments": arguments}}

    found = []
    for index, message in enumerate(messages):
        marker = chr(FIRST + index) if ends else ""
        message = {k: v if k == "role" else protect(v, protected) for k, v in message.items()}
        copy = dict(message)
        if "content" in message:
            copy["content"] = walk(message["content"], marker)
        if "tool_calls" in message:
            copy["tool_calls"] = [call(given, marker) for given in message["tool_calls"]]
        found.append(copy)
    return found


def protect(value: Any, protected: re.Pattern[str] | None) -> Any:
    """Returns a JSON value with a cut inside every text of a special token, also in keys.

    Args:
        value: The JSON value.
        protected: Pattern of special tokens; None leaves the value as it is.
    """
    if protected is None:
        return value
    if isinstance(value, str):
        return protected.sub(_cut_in_two, value)
    if isinstance(value, Mapping):
        return {protect(key, protected): protect(item, protected) for key, item in value.items()}
    return [protect(item, protected) for item in value] if isinstance(value, list) else value


def strip(text: str) -> Marked:
    """Returns a text without its markers and cuts, and where they were.

    Args:
        text: Rendered text.
    """
    if text.isascii():
        return Marked(text, {}, None, [])
    ends: dict[int, int] = {}
    last: int | None = None
    cuts: list[int] = []
    for taken, match in enumerate(PRIVATE.finditer(text)):
        place = match.start() - taken
        if match.group() == _CUT:
            cuts.append(place)
        else:
            last = ord(match.group()) - FIRST
            ends[last] = place
    return Marked(PRIVATE.sub("", text) if ends or cuts else text, ends, last, cuts)


def text_of(message: Mapping[str, Any]) -> str:
    """Returns the text of a message, or the message as JSON text if it has more than text."""
    content = message.get("content", "")
    if isinstance(content, str) and "tool_calls" not in message:
        return content
    return json.dumps(message, ensure_ascii=False)


def _cut_in_two(match: re.Match[str]) -> str:
    found = match.group()
    return found[0] + _CUT + found[1:] if len(found) > 1 else found
