"""Tests that each fault of a conversation is an error with file and line, or is counted."""

import json

import pytest
from datasets import Dataset

from lctrain.data import ChatSource, PackedDataModule

PLAIN = {"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]}
TWICE = {"messages": [{"role": "user", "content": "again"}, *PLAIN["messages"]]}
LATE_TOOL = {"messages": [*PLAIN["messages"], {"role": "tool", "content": "3"}]}
NOTHING = (
    "{%- for m in messages -%}<|im_start|>{{ m['role'] + ' ' + m['content'] }}{% generation %}"
    "{% endgeneration %}<|im_end|>{%- endfor -%}"
)
SORTS = (  # fails with an AttributeError
    "{%- for m in messages -%}<|im_start|>{{ m['role'] }} {% if loop.length > 2 %}"
    "{{ m['content'] | dictsort }}{% endif %}{{ m['content'] }}<|im_end|>{%- endfor -%}"
)
QUOTES = SORTS.replace("m['content'] | dictsort", "raise_exception(m['content'] ~ ' is long')")
FAULTS = {
    "template that fails": ("mistral", TWICE, "assistant", "the chat template refuses it: "),
    "filter that fails": (
        SORTS,
        TWICE,
        "assistant",
        "the chat template refuses it: 'str' object has no attribute 'items'",
    ),
    "template that quotes the message": (QUOTES, TWICE, "assistant", "refuses it: again is long"),
    "parts of no known type": (
        "chatml",
        {"messages": [{"role": "user", "content": [{"type": ["text"], "text": "a"}]}]},
        "assistant",
        "content must be text, got parts of type",
    ),
    "text nested too deeply": ("chatml", {"messages": "[" * 9_999}, "assistant", "nested this"),
    "roles out of order": ("chatml", LATE_TOOL, "assistant", "must follow a tool call"),
    "answer before the question": (
        "chatml",
        {"messages": PLAIN["messages"][::-1]},
        "assistant",
        "a conversation must begin with a user turn, got assistant in message 0",
    ),
    "empty completion": (
        "chatml",
        {"prompt": "one", "completion": " "},
        "assistant",
        "completion must hold text, got an empty one",
    ),
    "mask that trains nothing": (
        NOTHING,
        PLAIN,
        "assistant",
        "a conversation must have a token to train on, got none",
    ),
    "nothing to train on": (
        "chatml",
        PLAIN,
        "completion",
        "a record must have prompt and completion for train_on=completion, got messages",
    ),
}


@pytest.fixture
def read(tokenizer_of, tmp_path):
    """Returns a function that sets up a data module: read(files, template, **options)."""

    def make(files, template="chatml", settings=None, **options):
        tokenizer = tokenizer_of(template if template.isalnum() else "chatml")
        if not template.isalnum():
            (tmp_path / "template.jinja").write_text(template)
            options["chat_template"] = str(tmp_path / "template.jinja")
        module = PackedDataModule(
            ChatSource(files=files, **options),
            tokenizer,
            **{"max_tokens": 256, "cache_dir": tmp_path / "cache", "held_out_fraction": 0.0}
            | (settings or {}),
        )
        module.setup()
        return module

    return make


@pytest.fixture
def write(tmp_path):
    """Returns a function that writes records as JSON lines."""

    def to_file(name, *records):
        (tmp_path / name).write_text("".join(json.dumps(record) + "\n" for record in records))
        return str(tmp_path / name)

    return to_file


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_names_file_and_line_or_is_counted(read, write, fault):
    template, faulty, train_on, message = FAULTS[fault]
    good = PLAIN if train_on == "assistant" else {"prompt": "one", "completion": "two"}
    path = write("a.jsonl", good, faulty)
    with pytest.raises(ValueError, match=f"^{path}:{1 if template == NOTHING else 2}: .*{message}"):
        read(path, template, train_on=train_on, on_error="raise")
    if template == NOTHING:
        with pytest.raises(ValueError, match=f"^{path}:1: .*{message}.* 1 more fault"):
            read(path, template, train_on=train_on)
        return
    module = read(path, template, train_on=train_on)
    assert module.packing_report.documents == 1
    assert module.packing_report.dropped_unreadable == 1


def test_a_prompt_that_fills_the_row_is_counted(read, write):
    long = {"prompt": "one " * 90, "completion": "two"}
    path = write("a.jsonl", {"prompt": "one", "completion": "two"}, long)
    settings = {"max_tokens": 64, "overlong": "truncate"}
    module = read(path, settings=settings)
    assert module.packing_report.documents == 1
    assert module.packing_report.untrained == 1
    with pytest.raises(ValueError, match=f"^{path}:2: .*token to train on"):
        read(path, settings=settings, on_error="raise")
    kept = read(path, settings=settings | {"overlong": "split"}, on_error="raise")
    assert kept.packing_report.documents == 2


def test_shards_may_have_unequal_columns(read, tmp_path, write):
    shards = {
        "a": [PLAIN | {"source": "x"}],
        "b": [{"prompt": "one", "completion": "two", "score": 1.5}],
        "c": [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}],
    }
    files = []
    for name, records in shards.items():
        files.append(str(tmp_path / f"{name}.parquet"))
        Dataset.from_list(records).to_parquet(files[-1])
    assert read(files).packing_report.documents == 3
    wrong = str(tmp_path / "wrong.parquet")
    Dataset.from_dict({"text": ["a"]}).to_parquet(wrong)
    with pytest.raises(ValueError, match=f"{wrong}: a record must have messages"):
        read([*files, wrong], on_error="raise")
    lines = write("d.jsonl", PLAIN, {"id": 3})
    with pytest.raises(ValueError, match=f"^{lines}:2: a record must have messages"):
        read([*files, lines], on_error="raise")
