"""Tests which tokens belong to a turn, for templates whose turns are hard to find."""

import json
import re

import pytest

from lctrain.data.chat.calls import AS_GIVEN, find_form
from tests.data.chat.conftest import CONVERSATIONS, make_tokenizer
from tests.data.chat.test_masks import shown, tokenized

# Like gpt-oss: only the last answer ends by <|return|>, as a model ends it. <|end|> ends the rest.
HARMONY = (
    "{% for m in messages %}{{ '<|start|>' + m.role + '<|message|>' + m.content }}"
    "{{ '<|return|>' if loop.last and m.role == 'assistant' else '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
# Like gpt-oss, but no message except the last one ends by a token.
OPEN = HARMONY.replace("'<|end|>'", "''")
# Writes one more generated part behind a tool's result, if that is the last message.
LATE = (
    "{% for m in messages %}{{ m.role + ':' }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ 'call' if m.tool_calls else m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}{% if loop.last %}{% generation %}more{% endgeneration %}{% endif %}"
    "{% endif %}{% endfor %}"
)


def harmony_tokenizer():
    tokenizer = make_tokenizer("chatml")
    names = ["<|start|>", "<|message|>", "<|end|>", "<|return|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": names})
    return tokenizer


@pytest.mark.parametrize("name", ["two_turns", "system"])
def test_only_the_last_turn_may_end_by_a_token_of_its_own(name):
    tokenizer = harmony_tokenizer()
    found = tokenized(tokenizer, CONVERSATIONS[name], template=HARMONY)
    assert found[2] is None
    answers = [m["content"] for m in CONVERSATIONS[name]["messages"] if m["role"] == "assistant"]
    ends = ["<|end|>"] * (len(answers) - 1) + ["<|return|>"]
    trained = [f"⟦<|message|>{answer}{end}⟧" for answer, end in zip(answers, ends, strict=True)]
    assert re.findall("⟦.*?⟧", shown(tokenizer, *found[:2])) == trained


def test_space_at_the_end_of_an_answer_is_before_the_token_that_ends_it():
    tokenizer = harmony_tokenizer()
    turns = [("user", "a"), ("assistant", "b \n"), ("user", " "), ("assistant", "c")]
    record = {"messages": [{"role": role, "content": text} for role, text in turns]}
    found = tokenized(tokenizer, record, template=HARMONY)
    assert "⟦<|message|>b \n<|end|>⟧<|start|>user" in shown(tokenizer, *found[:2])


def test_the_header_of_the_next_turn_is_not_the_end_of_an_answer():
    found = tokenized(harmony_tokenizer(), CONVERSATIONS["two_turns"], template=OPEN)
    assert "must write every assistant turn after its generation prompt" in found[2]


def test_the_last_turn_of_a_template_that_writes_more_for_earlier_turns_alone():
    """The earlier messages alone have one more generated part than in the whole conversation."""
    tokenizer = make_tokenizer("chatml")
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    ask, result = {"role": "user", "content": "a"}, {"role": "tool", "content": "b"}
    record = {"messages": [ask, call, result, {"role": "assistant", "content": "Done."}]}
    for first_turn in ("last_assistant", "assistant"):
        ids, trained, _ = tokenized(tokenizer, record, first_turn, template=LATE)
        parts = re.findall("⟦.*?⟧", shown(tokenizer, ids, trained))
        expected = ["⟦call<|im_end|>⟧", "⟦Done.<|im_end|>⟧"]
        assert parts == expected[first_turn == "last_assistant" :]


# Writes the system's message, the last user's or all messages of users behind the answers.
MOVED = (
    "{% for m in messages if not (MOVES) %}{{ m.role + ':' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}"
    "{% endif %}{% endfor %}{% for m in messages if MOVES %}{{ m.role + ':' + m.content }}"
    "{% endfor %}"
)
SYSTEM, USERS = "m.role == 'system'", "m.role == 'user'"
ANSWERS = "m.role == 'assistant' and m.content == 'b'"


@pytest.mark.parametrize("moves", [SYSTEM, USERS, USERS + " and m.content == 'c'", ANSWERS])
@pytest.mark.parametrize("train_on", ["last_assistant", "completion", "assistant"])
def test_the_answer_of_a_template_that_writes_an_earlier_message_behind_it(moves, train_on):
    tokenizer = make_tokenizer("chatml")
    turns = [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    messages = [{"role": role, "content": text} for role, text in turns]
    record = {"prompt": messages[:-1], "completion": messages[-1:]}
    if train_on != "completion":
        record = {"messages": messages}
    template = MOVED.replace("MOVES", moves)
    ids, trained, fault = tokenized(tokenizer, record, train_on, template=template)
    assert fault is None
    expected = ["⟦b<|im_end|>⟧", "⟦d<|im_end|>⟧"]
    if train_on != "assistant" or moves == ANSWERS:  # that answer is written as ordinary text
        expected = expected[1:]
    assert re.findall("⟦.*?⟧", shown(tokenizer, ids, trained)) == expected


REVERSED = MOVED.replace("messages if not (MOVES)", "messages | reverse").partition(
    "{% for m in messages if"
)[0]


def test_the_last_answer_of_a_template_that_writes_the_latest_message_first():
    tokenizer = make_tokenizer("chatml")
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    record = {"messages": [{"role": role, "content": text} for role, text in turns]}
    ids, trained, _ = tokenized(tokenizer, record, "last_assistant", template=REVERSED)
    assert re.findall("⟦.*?⟧", shown(tokenizer, ids, trained)) == ["⟦d<|im_end|>⟧"]


TRL = ("cohere2", "deepseekv3", "gemma3", "glm4moe", "gptoss", "lfm2", "llama3", "phi3", "qwen3")


@pytest.mark.parametrize("name", TRL)
def test_trained_tokens_are_those_of_assistant_only_loss_with_the_templates_of_trl(name):
    templates = pytest.importorskip("trl.chat_template_utils", reason="needs TRL")
    text = getattr(templates, f"{name}_training_chat_template", None)
    if text is None:
        pytest.skip(f"this TRL has no template for {name}")
    tokenizer = make_tokenizer("chatml")
    special = sorted(
        set(re.findall(r"<[|\uff5c][^|\uff5c<>]+[|\uff5c]>|<(?:start|end)_of_turn>", text))
    )
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.chat_template = text
    for record in (CONVERSATIONS["two_turns"], CONVERSATIONS["reasoning"]):
        theirs = tokenizer.apply_chat_template(
            record["messages"], return_dict=True, return_assistant_tokens_mask=True
        )
        ids, trained, fault = tokenized(tokenizer, record)
        assert fault is None
        assert ids.tolist() == theirs["input_ids"]
        assert trained.tolist() == [bool(mask) for mask in theirs["assistant_masks"]]


# Like DeepSeek: a call needs content that is None, or arguments that are JSON text.
WITH_NONE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.tool_calls and "
    "m['content'] is none %}{{ m.tool_calls[0].function.name }}"
    "{{ m.tool_calls[0].function.arguments | tojson }}{% else %}{{ m['content'] }}{% endif %}"
    "<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
WITH_TEXT = WITH_NONE.replace("m['content'] is none", "not m.content").replace(
    "arguments | tojson", "arguments + ''"
)
# Writes an object without an error, but as Python does.
AS_IT_IS = WITH_NONE.replace("m['content'] is none", "true").replace(
    "arguments | tojson", "arguments"
)


@pytest.mark.parametrize(
    "template", [WITH_NONE, WITH_TEXT, AS_IT_IS], ids=["none", "text", "as-it-is"]
)
@pytest.mark.parametrize("content", [{}, {"content": ""}, {"content": None}], ids=str)
@pytest.mark.parametrize("as_text", [False, True])
def test_a_call_has_the_form_that_the_template_reads(template, content, as_text):
    """As transformers renders a record that has this form already."""
    tokenizer = make_tokenizer("chatml")
    arguments = {"city": "Åre <|im_end|>", "days": 2}
    given = json.dumps(arguments, ensure_ascii=False) if as_text else arguments
    call = {"function": {"name": "f", "arguments": given}}
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [call]}]
    turns += [{"role": "tool", "content": "b"}, {"role": "assistant", "content": "c"}]
    record = {"messages": [turns[0], turns[1] | content, *turns[2:]]}
    ids, trained, fault = tokenized(tokenizer, record, template=template)
    assert fault is None
    text = json.dumps(arguments, ensure_ascii=False)
    parts = re.findall("⟦.*?⟧", shown(tokenizer, ids, trained))
    assert parts == [f"⟦f{text}<|im_end|>⟧", "⟦c<|im_end|>⟧"]
    assert (ids == tokenizer.eos_token_id).sum() == 4  # those of the template


def test_a_template_that_writes_whole_calls_gets_them_as_they_are():
    assert find_form(str) == AS_GIVEN
