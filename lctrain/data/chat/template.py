"""ChatTemplate: renders a conversation, and finds the characters that each assistant turn adds.

A template with generation markers (`{% generation %}`) states which characters the assistant
generates. For other templates, the conversation is rendered twice. In the second rendering, every
message's text ends with a marker, a private-use Unicode character, so the markers show where each
message ends up:

- An assistant turn begins after the text that the template writes behind the previous message,
  generation prompt included.
- It ends with the token that ends a turn.

Apart from the markers, both renderings must be equal.

If a message contains the text of a special token, such a character is put inside that text (a cut).
The tokenizer then reads the text as ordinary text, so the author of a message cannot end a turn.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

from lctrain.data.chat.calls import AS_GIVEN, CallForm, find_form, in_form
from lctrain.data.chat.markers import (
    FIRST,
    PRIVATE,
    Marked,
    Messages,
    mark,
    protect,
    strip,
    text_of,
)
from lctrain.data.chat.source import Rendering
from lctrain.data.special_tokens import special_pattern

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_OTHER_DATE = "{%- macro strftime_now(format) -%}another day{%- endmacro -%}"
_DATE_VARIABLE = re.compile(r"set\s+(\w+)\s*=\s*strftime_now")
_TOOL = {"type": "function", "function": {"name": "a", "description": "a", "parameters": {}}}
_RAISED_BY_TEMPLATES = (
    ArithmeticError,
    AttributeError,  # a filter of mappings, such as dictsort, on other values
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
Span = tuple[int, int]
_TURN: Messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


class ConversationError(ValueError):
    """Raised for a conversation that the template refuses, or whose turns cannot be found."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, with the characters to train on.

    Attributes:
        text: The text, without markers.
        spans: Characters to train on, as pairs (begin, end) in rising order.
        cuts: Positions inside those texts of special tokens that are ordinary text.
        lost: Names of message parts that the template did not write into the text.
    """

    text: str
    spans: list[Span]
    cuts: list[int]
    lost: tuple[str, ...] = ()


class ChatTemplate:
    """Chat template of a tokenizer, which also finds the turns to train on.

    Args:
        tokenizer: A transformers tokenizer.
        rendering: Template, its variables, and the turns to train on.
        keep_special: Whether the text of a special token inside a message becomes that token.

    Raises:
        ValueError: if there is no chat template, or it cannot render a question and an answer.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, rendering: Rendering, keep_special: bool = False
    ) -> None:
        self._template = template_of(tokenizer, rendering)
        self._tool_template = template_of(tokenizer, rendering, tools=True)
        self._train_on = rendering.train_on
        self._arguments = {**tokenizer.special_tokens_map, **rendering.arguments}
        self._special = special_pattern(tokenizer)
        self._protected = None if keep_special else self._special
        self._specials = None  # pattern of one or more special tokens in a row
        if self._special is not None:
            self._specials = re.compile(f"(?:{self._special.pattern})+")
        try:
            self._render([{"role": "user", "content": "a"}], None, prompt=True)
        except ConversationError as error:
            raise ValueError(
                f"chat_template must render a user turn, got an error: {error}. Correct the "
                "template."
            ) from error

    @property
    def ends_turns(self) -> bool:
        """Whether an assistant turn ends with a special token, by which a model learns to stop."""
        if not _GENERATION.search(self._template):
            return self._end_of_turn is not None
        text, spans = self._with_generation(_TURN, None)
        generated = [text[begin:end] for begin, end in spans]
        return self._special is not None and any(map(self._special.search, generated))

    @cached_property
    def written_date(self) -> str | None:
        """Today's date in ISO format; None if the template does not write it into conversations."""
        if "strftime_now" not in self._template + self._tool_template:
            return None
        system = {"role": "system", "content": "a"}
        for messages, tools in ((_TURN, None), ([system, *_TURN], None), (_TURN, [_TOOL])):
            try:
                text = self._call(messages, tools)[0]
                if text != self._call(messages, tools, before=_OTHER_DATE)[0]:
                    return date.today().isoformat()
            except ConversationError:
                continue  # a template without system turns or tools
        return None

    @property
    def date_remedy(self) -> str:
        """Sentence that says how to fix the date for a template that writes today's date."""
        variable = _DATE_VARIABLE.search(self._template + self._tool_template)
        if variable is None:
            return "Name a template file with a fixed date as data.chat_template."
        return f"Set a fixed date as data.template_arguments.{variable.group(1)}."

    def render(self, text: str) -> Rendered:
        """Renders a conversation.

        Args:
            text: The conversation as JSON, as `read_conversation` returns it.

        Raises:
            ConversationError: if the template refuses the conversation, an assistant turn cannot be
                found in its text, or the conversation lacks the turns to train on.
        """
        if not text.isascii() and PRIVATE.search(text):
            raise ConversationError(
                "a conversation must be without characters of Unicode's private use area B, got "
                "one. Remove it."
            )
        conversation = json.loads(text)
        messages: Messages = conversation["messages"]
        tools = conversation.get("tools")
        first = self._first_trained(messages, conversation.get("prompt"))
        found, marked = self._find(messages, tools, first)
        return replace(found, lost=self._lost(messages, tools, marked))

    def _find(
        self, messages: Messages, given_tools: Any, first: int
    ) -> tuple[Rendered, str | None]:
        """Finds the characters to train on, in the turns from message `first` on.

        Returns:
            The rendered conversation; and its text with markers, or None if it was not needed.
        """
        cut = mark(messages, self._protected, ends=False)
        tools = protect(given_tools, self._protected)
        if cut != messages or tools != given_tools:
            text = strip(self._render(cut, tools)).text
            if text != self._render(messages, given_tools):
                raise ConversationError(
                    "the chat template must write messages as they are, got a text that depends on "
                    "the text of a special token in a message. Remove it, or use "
                    "data.special_tokens=token."
                )
        if self._train_on == "all":
            marked = strip(self._render(cut, tools))
            return Rendered(marked.text, [(0, len(marked.text))], marked.cuts), None
        if _GENERATION.search(self._choose(tools)):
            return self._by_markers(messages, tools, first), None
        text = self._render(mark(messages, self._protected), tools)
        return self._by_alignment(messages, tools, first, strip(text)), text

    def _lost(self, messages: Messages, tools: Any, text: str | None) -> tuple[str, ...]:
        """Returns the names of messages, parts and tools that the template does not write.

        Args:
            messages: The messages.
            tools: The tools, or None.
            text: Text with markers, if the conversation has been rendered with them.
        """
        marked, names = mark(messages, self._protected), {}
        for index, message in enumerate(marked):
            place, beside = chr(FIRST + index), chr(FIRST + len(marked) + index)
            names[place] = f"the {message['role']} turn in message {index}"
            if message.get("tool_calls") and isinstance(message.get("content"), str):
                message["content"] = message["content"].replace(place, beside)
                names[place] = f"the tool calls in message {index}"
                names[beside] = f"the text beside the tool calls in message {index}"
                text = None  # its markers differ
        given = "".join(map(text_of, marked))
        try:
            if text is None or tools:
                text = self._render(marked, tools)
            unused = tools and self._render(marked, None) == text
        except ConversationError:
            return ()  # the template refuses marked messages, so what it leaves out is unknown
        lost = [name for place, name in names.items() if place in given and place not in text]
        return tuple(["the tools"] * bool(unused) + lost)

    def _first_trained(self, messages: Messages, prompt: int | None) -> int:
        """Returns the number of the first message that `train_on` allows to train on."""
        if self._train_on == "completion" and prompt is None:
            raise ConversationError(
                "a record must have prompt and completion for train_on=completion, got messages. "
                "Use data.train_on=last_assistant."
            )
        if self._train_on == "completion":
            return cast(int, prompt)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not turns and self._train_on != "all":
            raise ConversationError(
                "a conversation must have an assistant turn, got none. Remove it, or use "
                "data.train_on=all."
            )
        return turns[-1] if self._train_on == "last_assistant" else 0

    def _by_markers(self, messages: Messages, tools: Any, first: int) -> Rendered:
        """Finds the characters to train on by the template's generation markers."""
        text, spans = self._with_generation(mark(messages, self._protected, ends=False), tools)
        if any(message["role"] == "assistant" for message in messages[:first]):
            trained = self._trained_spans(messages, tools, first, strip(text).text)
            spans = [spans[index] for index in range(len(spans)) if trained(index)]
        places = [match.start() for match in PRIVATE.finditer(text)]
        moved = [tuple(p - bisect_left(places, p) for p in span) for span in spans]
        marked = strip(text)
        return Rendered(marked.text, cast(list[Span], moved), marked.cuts)

    def _trained_spans(
        self, messages: Messages, tools: Any, first: int, expected: str
    ) -> Callable[[int], bool]:
        """Returns a function: whether a generated span belongs to message `first` or a later one.

        A span belongs to the first assistant message whose marker it holds. A span without such a
        marker belongs to a later message if it begins after the marker of the message before. If
        that is missing, or if markers change the text, the earlier messages are rendered alone.
        """
        text, spans = self._with_generation(mark(messages, self._protected), tools)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        owners = [
            next((turn for turn in turns if chr(FIRST + turn) in text[begin:end]), None)
            for begin, end in spans
        ]
        before = text.find(chr(FIRST + first - 1))
        if strip(text).text != expected or (before < 0 and None in owners):
            count = len(self._with_generation(messages[:first], tools)[1])
            return lambda index: index >= count

        def is_trained(index: int) -> bool:
            owner = owners[index]
            return spans[index][0] > before if owner is None else owner >= first

        return is_trained

    def _by_alignment(self, messages: Messages, tools: Any, first: int, marked: Marked) -> Rendered:
        """Finds the characters to train on by markers at the ends of messages."""
        if marked.text != strip(self._render(messages, tools)).text:
            raise ConversationError(
                "the chat template must write messages as they are, got a text that depends on "
                "how a message ends. Add generation markers to it, or use data.train_on=all."
            )
        spans = []
        for index, message in enumerate(messages):
            if message["role"] == "assistant" and index >= first:
                begin = self._begin(messages, tools, index, marked)
                spans.append((begin, self._end(messages, tools, index, marked)))
        return Rendered(marked.text, spans, marked.cuts)

    def _begin(self, messages: Messages, tools: Any, index: int, marked: Marked) -> int:
        """Returns the position in the text at which an assistant's message begins."""
        before = messages[index - 1]
        end = marked.ends.get(index - 1)
        if end is not None and before["role"] == "user":
            for prompt in (self._after_user, _trailing_space(before) + self._after_user):
                if marked.text.startswith(prompt, end):
                    return end + len(prompt)
        prefix = strip(self._render(mark(messages[:index], self._protected), tools, prompt=True))
        place = 0 if prefix.last is None else marked.ends.get(prefix.last)
        if place is not None and marked.text.startswith(prefix.tail, place):
            return place + len(prefix.tail)
        if place is not None:  # the text holds only the beginning of the generation prompt
            header = _THOUGHT.sub("", prefix.tail)
            if marked.text.startswith(header, place):
                return place + len(header)
            common = _common_prefix(prefix.tail, marked.text[place:])
            content = str(messages[index].get("content", "")).strip()
            stop = place + common + len(content)
            found = marked.text.rfind(content, place, stop) if content else -1
            if found >= 0:
                return found
        raise _not_found(index)

    def _end(self, messages: Messages, tools: Any, index: int, marked: Marked) -> int:
        """Returns the position after the token that ends an assistant's message."""
        end = marked.ends.get(index)
        if end is None:
            raise _not_found(index)
        stop = min((p for i, p in marked.ends.items() if i > index), default=len(marked.text))
        if self._end_of_turn:
            found = marked.text.find(self._end_of_turn, end, max(stop, end))
            if found >= 0 and found + 1 not in marked.cuts:
                return found + len(self._end_of_turn)
        tail = strip(self._render(mark(messages[: index + 1], self._protected), tools)).tail
        special = self._specials.search(tail) if self._specials else None
        generated = tail[: special.end()] if special else tail.rstrip()
        if marked.text.startswith(generated, end):
            return end + len(generated)
        # The template may end the last turn by a token of its own: gpt-oss writes <|return|>.
        place = next((p for p in range(end, stop) if not marked.text[p].isspace()), stop)
        other = self._end_of_message
        if special is None or other is None or not marked.text.startswith(other, place):
            raise _not_found(index)
        return place + len(other)

    @cached_property
    def _after_user(self) -> str:
        """Text that the template writes between a user's message and the assistant's."""
        messages = mark([{"role": "user", "content": "a"}], self._protected)
        return strip(self._render(messages, None, prompt=True)).tail

    @cached_property
    def _end_of_turn(self) -> str | None:
        """Special tokens, as text, that end an assistant turn; None if there are none."""
        tail = strip(self._render(mark(_TURN, self._protected), None)).tail
        found = self._specials.search(tail) if self._specials else None
        return found.group() if found else None

    @cached_property
    def _end_of_message(self) -> str | None:
        """Special token that ends messages of every role; None if there is none."""
        found = self._special.findall(self._after_user) if self._special else []
        ends = len(found) > 1 and self._after_user.startswith(found[0])
        return found[0] if ends else None

    def _choose(self, tools: Any) -> str:
        return self._tool_template if tools else self._template

    def _render(self, messages: Messages, tools: Any, prompt: bool = False) -> str:
        return self._call(messages, tools, add_generation_prompt=prompt)[0]

    def _with_generation(self, messages: Messages, tools: Any) -> tuple[str, Sequence[Span]]:
        return self._call(messages, tools, return_assistant_tokens_mask=True)

    @cached_property
    def _form(self) -> CallForm:
        """Form in which the template reads tool calls."""

        def render(messages: Messages) -> str | None:
            try:
                return self._call(messages, [_TOOL], form=AS_GIVEN)[0]
            except ConversationError:
                return None

        return find_form(render)

    def _call(
        self,
        messages: Messages,
        tools: Any,
        before: str = "",
        form: CallForm | None = None,
        **options: Any,
    ) -> tuple[str, Sequence[Span]]:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        if form is None:
            called = any("tool_calls" in message for message in messages)
            form = self._form if called else AS_GIVEN
        try:
            texts, spans = cast(Any, render_jinja_template)(
                conversations=[in_form(messages, form)],
                tools=tools,
                chat_template=before + self._choose(tools),
                **options,
                **self._arguments,
            )
        except (TemplateError, *_RAISED_BY_TEMPLATES) as error:
            words = PRIVATE.sub("", str(error)).strip()  # a template may quote a message
            reason = (words or type(error).__name__).splitlines()[0]
            raise ConversationError(f"the chat template refuses it: {reason}") from error
        return texts[0], spans[0] if spans else ()


_THOUGHT = re.compile(r"<think>\s*(</think>\s*)?$")  # as a generation prompt may open it


def template_of(
    tokenizer: PreTrainedTokenizerBase, rendering: Rendering, tools: bool = False
) -> str:
    """Returns the text of the chat template.

    Args:
        tokenizer: A transformers tokenizer.
        rendering: Settings of the rendering; its `template`, if set, is the result.
        tools: Whether to return the template for conversations with tools.

    Raises:
        ValueError: if there is none.
    """
    if rendering.template is not None:
        return rendering.template
    try:
        return tokenizer.get_chat_template(tools=[{}] if tools else None)
    except ValueError as error:
        raise ValueError(
            f"data.tokenizer must have a chat template for conversations, got "
            f"{tokenizer.name_or_path or type(tokenizer).__name__} without one. Name the tokenizer "
            "of an instruct model, or a template file as data.chat_template."
        ) from error


def _trailing_space(message: Mapping[str, Any]) -> str:
    content = str(message.get("content", ""))
    return content[len(content.rstrip()) :]


def _common_prefix(first: str, second: str) -> int:
    """Returns the number of characters with which both texts begin."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def _not_found(index: int) -> ConversationError:
    return ConversationError(
        f"the chat template must write every assistant turn after its generation prompt, got none "
        f"for message {index}. Add generation markers to it, or use data.train_on=all."
    )
