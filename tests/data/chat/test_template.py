"""Tests what a template leaves out, today's date in it, ends of turns, and cuts that it notices."""

import datetime
import json

import pytest

from lctrain.config import DataSettings
from lctrain.data import ChatSource, PackedDataModule
from lctrain.data.chat import template as template_module
from lctrain.data.chat.conversation import read_conversation
from lctrain.data.chat.source import Rendering
from lctrain.data.chat.template import ChatTemplate, ConversationError
from lctrain.warn import forget_logged
from tests.data.chat.conftest import CONVERSATIONS, HERE, template_text
from tests.data.chat.test_masks import tokenized

SYSTEM, ASK, ANSWER, AGAIN = (
    {"role": role, "content": text}
    for role, text in (
        *(("system", "Be brief."), ("user", "Two?"), ("assistant", "2."), ("user", "Three?")),
    )
)
CALL = {"function": {"name": "f", "arguments": {"a": "x", "b": "y"}}}
TOOLS = [{"type": "function", "function": {"name": "f"}}]
TOLD = [ASK, {"role": "assistant", "content": "Hm.", "tool_calls": [CALL]}]
CASES = {
    "system": {"messages": [SYSTEM, ASK, ANSWER]},
    "system, then a question": {"messages": [SYSTEM, ASK, ANSWER, AGAIN]},
    "developer": {"messages": [{**SYSTEM, "role": "developer"}, ASK, ANSWER]},
    "text and call": {"messages": TOLD},
    "tools": {"messages": [ASK, ANSWER], "tools": TOOLS},
}
SYSTEM_LOST = ("the system turn in message 0",)
TEXT_LOST = ("the text beside the tool calls in message 1",)
CALLS_LOST = ("the tool calls in message 1",)
DEVELOPER_LOST = ("the developer turn in message 0",)
TOOLS_LOST = ("the tools",)
LOST = {
    "chatml": {"text and call": CALLS_LOST, "tools": TOOLS_LOST},
    "chatml_generation": {"text and call": CALLS_LOST, "tools": TOOLS_LOST},
    "gemma": {"text and call": CALLS_LOST, "tools": TOOLS_LOST},
    "llama3": {"text and call": TEXT_LOST},
    "mistral": {"system": SYSTEM_LOST, "text and call": TEXT_LOST, "developer": DEVELOPER_LOST},
    "phi": {"text and call": CALLS_LOST, "tools": TOOLS_LOST, "developer": DEVELOPER_LOST},
    "qwen2_5": {"developer": DEVELOPER_LOST},
    "qwen3": {"developer": DEVELOPER_LOST, "tools": TOOLS_LOST},
}


def rendered(tokenizer, record, train_on="all", template=None):
    chat = ChatTemplate(tokenizer, Rendering(train_on, template, {}))
    return chat.render(read_conversation(record))


@pytest.mark.parametrize("name", sorted(path.stem for path in (HERE / "templates").glob("*.jinja")))
def test_what_a_template_leaves_out_is_named(tokenizer_of, name):
    found = {}
    for case, record in CASES.items():
        try:
            lost = rendered(tokenizer_of(name), record).lost
        except ConversationError:
            continue  # the template refuses it
        if lost:
            found[case] = lost
    assert found == LOST[name]
    assert rendered(tokenizer_of(name), CONVERSATIONS["two_turns"]).lost == ()


def test_a_warning_names_what_is_left_out(tokenizer_of, tmp_path, caplog):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps(CASES[c]) for c in ("system", "system, then a question")))
    settings = {"max_tokens": 256, "cache_dir": tmp_path, "held_out_fraction": 0.0}
    for _ in range(2):  # also from the cache
        forget_logged()
        caplog.clear()
        module = PackedDataModule(ChatSource(files=path), tokenizer_of("mistral"), **settings)
        module.setup()
        assert "The chat template leaves out parts of 1 of 2 conversations" in caplog.text
        assert f"{path}:1: the system turn in message 0" in caplog.text


MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role + '\\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}INSIDE{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
    "OUTSIDE{% endfor %}"
)


def test_an_end_token_outside_the_markers_is_not_learned(tokenizer_of):
    tokenizer = tokenizer_of("chatml")
    for inside in (True, False):
        text = MARKED.replace("INSIDE" if inside else "OUTSIDE", "<|im_end|>")
        template = text.replace("INSIDE", "").replace("OUTSIDE", "\n")
        assert ChatTemplate(tokenizer, Rendering("assistant", template, {})).ends_turns == inside
    for name in LOST:
        assert ChatTemplate(tokenizer_of(name), Rendering("assistant", None, {})).ends_turns


DATED = (
    "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "{{ date_string }}"
)


def another_day(monkeypatch, day):
    class Day(datetime.date):
        @classmethod
        def today(cls):
            return cls(2026, 1, day)

    monkeypatch.setattr(template_module, "date", Day)


def test_a_run_with_todays_date_is_not_resumed_on_another_day(
    tokenizer_of, tmp_path, monkeypatch, caplog
):
    files = tmp_path / "a.jsonl"
    files.write_text(json.dumps(CASES["system"]))
    template = tmp_path / "dated.jinja"
    template.write_text(DATED + template_text("chatml"))

    def data(**arguments):
        forget_logged()
        caplog.clear()
        source = ChatSource(files=files, chat_template=template, template_arguments=arguments)
        settings = {"max_tokens": 256, "cache_dir": tmp_path, "held_out_fraction": 0.0}
        module = PackedDataModule(source, tokenizer_of("chatml"), **settings)
        module.setup()
        return module

    another_day(monkeypatch, 1)
    state, fixed = data().state_dict(), data(date_string="26 Jul 2024").state_dict()
    data().load_state_dict(state)
    assert "The chat template writes today's date into conversations" in caplog.text
    assert "Set a fixed date as data.template_arguments.date_string." in caplog.text
    another_day(monkeypatch, 2)
    module = data()
    with pytest.raises(ValueError, match=r"chat_date was '2026-01-01', is '2026-01-02'; .*fixed"):
        module.load_state_dict(state)
    data(date_string="26 Jul 2024").load_state_dict(fixed)
    assert "today's date" not in caplog.text


@pytest.mark.parametrize(
    ("text", "date", "remedy"),
    [
        ("{{ strftime_now('%Y')[:2] }}", True, "Name a template file with a fixed date"),
        ("{% if tools %}{{ strftime_now('%Y') }}{% endif %}", True, "Name a template file"),
        ("{% set x = strftime_now('%Y') %}", False, "data.template_arguments.x"),
        ("", False, "Name a template file"),
    ],
)
def test_templates_that_write_the_date(tokenizer_of, text, date, remedy):
    rendering = Rendering("assistant", text + template_text("chatml"), {})
    chat = ChatTemplate(tokenizer_of("chatml"), rendering)
    assert (chat.written_date is not None) == date
    assert remedy in chat.date_remedy


@pytest.mark.parametrize("train_on", ["all", "assistant"])
@pytest.mark.parametrize("name", ["chatml", "chatml_generation"])
def test_a_template_that_looks_for_a_special_token_in_a_message(tokenizer_of, name, train_on):
    looks = "{% if '<|im_end|>' in messages | map(attribute='content') | join %}ends{% endif %}"
    record = {"prompt": "a", "completion": "b <|im_end|> c"}
    options = {"template": looks + template_text(name), "train_on": train_on}
    tokenizer = tokenizer_of(name)
    fault = tokenized(tokenizer, record, **options)[2]
    assert "got a text that depends on the text of a special token in a message" in fault
    assert tokenized(tokenizer, record, keep_special=True, **options)[2] is None


@pytest.mark.parametrize("train_on", ["all", "assistant"])
def test_special_tokens_in_tools_and_calls_stay_text(tokenizer_of, train_on):
    tokenizer = tokenizer_of("qwen2_5")
    end = "<|im_end|>"
    call = {"function": {"name": end, "arguments": {end: end, "n": 1}}}
    tools = [{"type": "function", "function": {"name": "f", "description": end}}]
    turns = [ASK, {"role": "assistant", "tool_calls": [call]}]
    ids, _, fault = tokenized(tokenizer, {"messages": turns, "tools": tools}, train_on)
    assert fault is None
    assert tokenizer.decode(ids).count(end) == 7
    assert (ids == tokenizer.eos_token_id).sum() == 3  # those of the template


def test_a_held_out_part_without_a_usable_conversation(tokenizer_of, tmp_path, caplog):
    good, bad = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    good.write_text(json.dumps(CASES["system"]))
    bad.write_text(json.dumps({"messages": [ASK]}))

    def data(train, held_out, **options):
        source = ChatSource(files=train, held_out_files=held_out, **options)
        settings = {"max_tokens": 256, "cache_dir": tmp_path}
        module = PackedDataModule(source, tokenizer_of("chatml"), **settings)
        module.setup()
        return module

    module = data(good, bad)
    assert module.packing_report.documents == 1
    assert module.held_out_report.documents == 0
    assert "1 of 1 conversation could not be used" in caplog.text
    with pytest.raises(ValueError, match="Nothing else could be used"):
        data(bad, good)
    with pytest.raises(ValueError, match="must have an assistant turn, got none"):
        data(good, bad, on_error="raise")


def test_the_guide_names_both_defaults_of_overlong():
    root = HERE.parents[2]
    default = DataSettings().overlong
    assert "overlong: truncate " in (root / "configs/data/chat.yaml").read_text()
    guide = " ".join((root / "docs/guides/chat.md").read_text().split())
    assert "`data.overlong=truncate`, the default of `data=chat`" in guide
    assert f'the default `overlong="{default}"`, as for any source' in guide
