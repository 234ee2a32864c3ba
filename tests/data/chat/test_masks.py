"""Tests which tokens of a conversation are trained on, for templates of seven families.

A file of expected/ holds the text of a conversation as the template renders it, with the trained
part of it in ⟦ ⟧. The files were checked by hand: an assistant turn is trained from the end of the
generation prompt to the token that ends the turn.
"""

import json
import re

import numpy as np
import pytest

from lctrain.data.chat.conversation import read_conversation
from lctrain.data.chat.source import Rendering
from lctrain.data.chat.template import ChatTemplate
from lctrain.data.chat.tokenizing import ChatTokenizing
from tests.data.chat.conftest import CONVERSATIONS, HERE, template_text

EXPECTED = sorted((HERE / "expected").glob("*.txt"))
MERGES = (0, 120)  # tokens are bytes; or also longer pieces


def tokenized(tokenizer, conversation, train_on="assistant", template=None, **options):
    """Returns token ids, whether each is trained on, and the fault of a conversation."""
    arguments = options.pop("arguments", {})
    tokenizing = ChatTokenizing(
        tokenizer=tokenizer, rendering=Rendering(train_on, template, arguments), **options
    )
    (row,) = tokenizing.tokenize([read_conversation(conversation)])
    trained = np.zeros(len(row["input_ids"]), bool)
    for begin, end in np.asarray(row["spans"], int).reshape(-1, 2):
        trained[begin:end] = True
    return np.asarray(row["input_ids"]), trained, row["fault"]


def shown(tokenizer, ids, trained):
    """Returns the text of token ids with the trained ones in brackets."""
    text = ""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], trained, [0]])))
    for part, begin in zip(np.split(ids, edges), [0, *edges], strict=True):
        decoded = tokenizer.decode(part) if len(part) else ""
        text += f"⟦{decoded}⟧" if len(part) and trained[begin] else decoded
    return text


@pytest.mark.parametrize("merges", MERGES)
@pytest.mark.parametrize("path", EXPECTED, ids=lambda path: path.stem)
def test_trained_tokens_are_those_checked_by_hand(tokenizer_of, path, merges):
    template, name = path.stem.split(".")
    tokenizer = tokenizer_of(template, merges)
    ids, trained, fault = tokenized(tokenizer, CONVERSATIONS[name])
    assert fault is None
    assert shown(tokenizer, ids, trained) == path.read_text()


def test_every_family_is_checked():
    families = {path.stem.split(".")[0] for path in EXPECTED}
    assert families == {path.stem for path in (HERE / "templates").glob("*.jinja")}


@pytest.mark.parametrize("name", ["two_turns", "system", "reasoning"])
def test_text_is_what_transformers_renders(tokenizer_of, name):
    for template in ("llama3", "qwen2_5", "qwen3", "mistral", "phi"):
        tokenizer = tokenizer_of(template)
        messages = json.loads(read_conversation(CONVERSATIONS[name]))["messages"]
        rendered = tokenizer.apply_chat_template(messages, tokenize=False)
        ids, _, _ = tokenized(tokenizer, CONVERSATIONS[name])
        assert ids.tolist() == tokenizer(rendered, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", ["two_turns", "system"])
def test_generation_markers_give_the_mask_of_transformers(tokenizer_of, name):
    """TRL's assistant_only_loss trains on this mask."""
    tokenizer = tokenizer_of("chatml_generation", 120)
    theirs = tokenizer.apply_chat_template(
        CONVERSATIONS[name]["messages"], return_dict=True, return_assistant_tokens_mask=True
    )
    ids, trained, _ = tokenized(tokenizer, CONVERSATIONS[name])
    assert ids.tolist() == theirs["input_ids"]
    assert trained.astype(int).tolist() == theirs["assistant_masks"]


@pytest.mark.parametrize("template", ["chatml", "chatml_generation", "qwen3", "mistral"])
def test_only_the_last_assistant_turn(tokenizer_of, template):
    tokenizer = tokenizer_of(template)
    every = shown(tokenizer, *tokenized(tokenizer, CONVERSATIONS["two_turns"])[:2])
    last = shown(tokenizer, *tokenized(tokenizer, CONVERSATIONS["two_turns"], "last_assistant")[:2])
    first, *rest = re.findall("⟦.*?⟧", every, flags=re.S)
    assert last == every.replace(first, first[1:-1])
    assert len(rest) == 1


@pytest.mark.parametrize("template", ["chatml", "chatml_generation"])
def test_the_completion_may_have_several_turns(tokenizer_of, template):
    tokenizer = tokenizer_of(template)
    messages = CONVERSATIONS["two_turns"]["messages"]
    record = {"prompt": messages[:3], "completion": messages[3:]}
    last = tokenized(tokenizer, CONVERSATIONS["two_turns"], "last_assistant")
    assert tokenized(tokenizer, record, "completion")[1].tolist() == last[1].tolist()
    record = {"prompt": messages[:1], "completion": messages[1:]}
    every = tokenized(tokenizer, CONVERSATIONS["two_turns"])
    assert tokenized(tokenizer, record, "completion")[1].tolist() == every[1].tolist()
    fault = tokenized(tokenizer, CONVERSATIONS["two_turns"], "completion")[2]
    assert "must have prompt and completion for train_on=completion" in fault


def test_all_tokens(tokenizer_of):
    ids, trained, _ = tokenized(tokenizer_of("chatml"), CONVERSATIONS["system"], "all")
    assert trained.all()
    assert len(ids) > 0


@pytest.mark.parametrize("template", ["chatml", "chatml_generation"])
@pytest.mark.parametrize("train_on", ["assistant", "all"])
def test_special_tokens_inside_a_message_stay_text(tokenizer_of, template, train_on):
    tokenizer = tokenizer_of(template)
    end, begin = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|im_start|>"])
    ids, _, _ = tokenized(tokenizer, CONVERSATIONS["special_text"], train_on)
    assert (ids == end).sum() == (ids == begin).sum() == 2  # those of the template
    ids, _, _ = tokenized(tokenizer, CONVERSATIONS["special_text"], train_on, keep_special=True)
    assert (ids == end).sum() == 4


def test_the_empty_thought_belongs_to_the_prompt_where_the_template_says_so(tokenizer_of):
    tokenizer = tokenizer_of("qwen3")
    found = tokenized(tokenizer, CONVERSATIONS["two_turns"], arguments={"enable_thinking": False})
    trained = re.findall("⟦.*?⟧", shown(tokenizer, *found[:2]), flags=re.S)
    assert trained == ["⟦It is 4.<|im_end|>⟧", "⟦8, of course.<|im_end|>⟧"]


def test_a_prompt_that_ends_in_a_thought_the_text_does_not_have(tokenizer_of):
    template = template_text("chatml").replace("assistant\\n'", "assistant\\n<think>\\n'")
    tokenizer = tokenizer_of("chatml")
    for answer in ("It is 4.", "<table>", "<think></think>4"):
        record = {"prompt": "2 + 2?", "completion": answer}
        found = tokenized(tokenizer, record, template=template)
        assert found[2] is None
        assert f"⟦{answer}<|im_end|>⟧" in shown(tokenizer, *found[:2])


def test_all_tokens_that_end_a_turn_are_trained_on(tokenizer_of):
    """Cohere's template writes two; Phi's ends the text with one more, which is not of the turn."""
    end = "{% if m.role == 'assistant' %}{{ '<|end|>' }}{% endif %}<|im_end|>\n"
    template = "{% for m in messages %}<|im_start|>{{ m.role + '\n' + m.content }}" + end
    template += "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    template += "{% else %}{{ '<|end|>' }}{% endif %}"
    tokenizer = tokenizer_of("chatml", 1)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|end|>"]})
    found = tokenized(tokenizer, CONVERSATIONS["two_turns"], template=template)
    text = shown(tokenizer, *found[:2])
    assert re.findall("⟦.*?⟧", text) == [
        "⟦It is 4.<|end|><|im_end|>⟧",
        "⟦8, of course.<|end|><|im_end|>⟧",
    ]
    assert text.endswith("⟧\n<|end|>")


def test_a_template_without_special_tokens_trains_on_the_words(tokenizer_of):
    template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    tokenizer = tokenizer_of("chatml")
    found = tokenized(tokenizer, CONVERSATIONS["two_turns"], template=template)
    assert "assistant: ⟦It is 4.⟧\nuser:" in shown(tokenizer, *found[:2])
    assert not ChatTemplate(tokenizer, Rendering("assistant", template, {})).ends_turns
    assert ChatTemplate(tokenizer, Rendering("assistant", None, {})).ends_turns


@pytest.mark.parametrize(
    ("template", "name", "message"),
    [
        ("gemma", "system", "the chat template refuses it: System role not supported"),
        ("gemma", "tools", "the chat template refuses it: Conversation roles must alternate"),
        ("phi", "tools", "the chat template refuses it: .*has no attribute 'content'"),
    ],
)
def test_a_conversation_that_the_template_refuses(tokenizer_of, template, name, message):
    tokenizer = tokenizer_of(template)
    assert re.search(message, tokenized(tokenizer, CONVERSATIONS[name])[2])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (  # the text of a message depends on its last letter
            "{% for m in messages %}{{ m.content.endswith('.') }}{{ m.content }}{% endfor %}",
            "must write messages as they are, got a text that depends on how a message ends",
        ),
        (  # the assistant's words come first
            "{% for m in messages %}{{ m.content if m.role == 'assistant' }}{% endfor %}"
            "{{ messages[0].content }}{{ '>' if add_generation_prompt }}",
            "must write every assistant turn after its generation prompt, got none for message 1",
        ),
        (
            "{% for m in messages %}{{ m.content if m.role == 'user' }}{% endfor %}",
            "got none for message 1",
        ),
        (  # markers around nothing
            "{% for m in messages %}{{ m.content }}{% endfor %}{% generation %}{% endgeneration %}",
            "a conversation must have a token to train on, got none",
        ),
    ],
)
def test_a_template_whose_turns_cannot_be_found(tokenizer_of, template, message):
    record = {"prompt": "two words", "completion": "Yes."}
    assert message in tokenized(tokenizer_of("chatml"), record, template=template)[2]


def test_a_tokenizer_without_a_template(tokenizer_of):
    tokenizer = tokenizer_of("chatml")
    bare = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match=r"data\.tokenizer must have a chat template"):
        ChatTemplate(bare, Rendering("assistant", None, {}))
    with pytest.raises(ValueError, match="chat_template must render a user turn, got an error"):
        ChatTemplate(bare, Rendering("assistant", "{% for m in messages", {}))


def test_private_characters_are_refused(tokenizer_of):
    record = {"prompt": "a", "completion": "b\U00100001"}
    assert "private use area B" in tokenized(tokenizer_of("chatml"), record)[2]


def test_a_slow_tokenizer_is_refused(tokenizer_of, monkeypatch):
    tokenizer = tokenizer_of("chatml")
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    with pytest.raises(ValueError, match=r"data\.tokenizer must be a fast tokenizer for"):
        ChatTokenizing(tokenizer=tokenizer, rendering=Rendering("assistant", None, {}))
