"""Tests data=chat from its files to packed rows: sources, limits, faults, truncation, caches."""

import json
from itertools import pairwise

import numpy as np
import pytest
from datasets import Dataset

from lctrain.data import ChatSource, PackedDataModule
from lctrain.pluralize import pluralize

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def record(number, turns=1, words=4):
    messages = []
    for turn in range(turns):
        text = " ".join(WORDS[(number + turn + k) % 10] for k in range(words))
        messages += [
            {"role": "user", "content": f"{number} {text}?"},
            {"role": "assistant", "content": text.upper()},
        ]
    return {"messages": messages}


RECORDS = [record(i, 1 + i % 3) for i in range(40)]


@pytest.fixture
def data(tokenizer_of, tmp_path):
    """Returns a factory of data modules that are set up: data(files, **source options)."""

    def make(files=(), settings=None, template="chatml", **options):
        module = PackedDataModule(
            ChatSource(files=files, **options),
            tokenizer_of(template),
            **{"max_tokens": 256, "cache_dir": tmp_path / "cache"} | (settings or {}),
        )
        module.setup()
        return module

    return make


@pytest.fixture
def write(tmp_path):
    """Returns a function that writes JSON lines: write(name, records or lines)."""

    def to_file(name, records):
        lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
        (tmp_path / name).write_text("\n".join(lines) + "\n")
        return str(tmp_path / name)

    return to_file


def documents(rows):
    """Returns the tokens and labels of the documents in rows, in the order of their names."""
    found = {}
    for row in rows:
        bounds = row.cu_seqlens.tolist()
        for name, begin, end in zip(row.names, bounds[:-1], bounds[1:], strict=True):
            ids, labels = row.input_ids[0, begin:end], row.labels[0, begin:end]
            found[name] = (ids.tolist(), labels.tolist())
    return found


def train_rows(module):
    return [module._prepared.train_rows[i] for i in range(len(module._prepared.train_rows))]


def test_labels_reach_the_packed_rows(data, write):
    module = data(write("a.jsonl", RECORDS), settings={"held_out_fraction": 0.2})
    tokenizer = module.tokenizer
    found = documents(train_rows(module))
    assert 20 < len(found) < 40
    for name, (ids, labels) in found.items():
        number = int(name.rpartition(":")[2]) - 1
        answers = [m["content"] for m in RECORDS[number]["messages"] if m["role"] == "assistant"]
        targets = [label for label in labels if label != -100]
        assert tokenizer.decode(targets) == "".join(f"{answer}<|im_end|>" for answer in answers)
        for at, label in enumerate(labels):
            assert label in (-100, ids[at + 1] if at + 1 < len(ids) else -100)
    report = module.packing_report
    targets = sum(int((row.labels != -100).sum()) for row in train_rows(module))
    assert report.trained_tokens == targets > 0
    assert f"{targets:,} tokens to train on" in str(report)
    assert module.held_out_report.documents == 40 - len(found)


def test_all_sources_give_the_same_tokens(data, write, tmp_path):
    from_lines = data(write("a.jsonl", RECORDS), settings={"held_out_fraction": 0.0})
    expected = sorted(documents(train_rows(from_lines)).values())
    table = Dataset.from_list(RECORDS)
    table.to_parquet(tmp_path / "b.parquet")
    table.save_to_disk(tmp_path / "saved")
    sharegpt = [
        {"conversations": [{"from": m["role"], "value": m["content"]} for m in r["messages"]]}
        for r in RECORDS
    ]
    for options in (
        {"files": [str(tmp_path / "b.parquet")]},
        {"dataset": str(tmp_path / "saved")},
        {"files": write("c.jsonl", sharegpt)},
    ):
        module = data(settings={"held_out_fraction": 0.0}, **options)
        assert sorted(documents(train_rows(module)).values()) == expected


def test_held_out_files_and_limits(data, write):
    train, held_out = write("a.jsonl", RECORDS[:30]), write("b.jsonl", RECORDS[30:])
    module = data(train, held_out_files=held_out, max_documents=7)
    assert module.packing_report.documents == 7
    assert module.held_out_report.documents == 10
    assert sum(int((b.labels != -100).sum()) for b in module.val_dataloader()) > 0


def test_tokens_come_from_the_cache_unless_something_changes(data, write, monkeypatch, tmp_path):
    from lctrain.data.chat.tokenizing import ChatTokenizing

    path = write("a.jsonl", RECORDS)
    first = data(path)
    calls = []
    tokenize = ChatTokenizing.tokenize
    monkeypatch.setattr(
        ChatTokenizing, "tokenize", lambda *given: calls.append(1) or tokenize(*given)
    )
    again = data(path)
    assert not calls
    assert documents(train_rows(again)) == documents(train_rows(first))
    assert again.fingerprint == first.fingerprint
    other = tmp_path / "other.jinja"
    other.write_text(first.tokenizer.chat_template.replace("'\\n'", "'\\n\\n'"))
    for changed in ({"train_on": "all"}, {"chat_template": str(other)}):
        assert data(path, **changed).fingerprint != first.fingerprint
    assert calls


FAULTY = [
    RECORDS[0],
    "{not json",
    {"text": "no conversation"},
    {"messages": [{"role": "user", "content": "no answer"}]},
    RECORDS[1],
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]},
]


def test_faults_are_counted_with_file_and_line(data, write, caplog):
    path = write("a.jsonl", FAULTY)
    module = data(path, settings={"held_out_fraction": 0.0})
    assert module.packing_report.documents == 2
    assert module.packing_report.dropped_unreadable == 4
    assert f"{path}:2: a line must be JSON" in caplog.text
    assert "1 of 3 conversations could not be used (data.on_error=raise" in caplog.text
    assert f"{path}:4: a conversation must have an assistant turn, got none." in caplog.text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (1, "a line must be JSON, got '{not json'"),
        (2, "a record must have messages, conversations, or prompt and completion"),
        (3, "a conversation must have an assistant turn, got none"),
        (5, r"messages\[1\] must have content or tool_calls, got an empty turn"),
    ],
)
def test_the_first_fault_stops(data, write, line, message):
    path = write("a.jsonl", [RECORDS[0], FAULTY[line], RECORDS[1]])
    with pytest.raises(ValueError, match=f"^{path}:2: {message}"):
        data(path, on_error="raise", settings={"held_out_fraction": 0.0})


def test_faults_of_tables_name_the_row(data, tmp_path):
    rows = [RECORDS[0], {"messages": [{"role": "boss", "content": "a"}]}]
    path = str(tmp_path / "a.parquet")
    Dataset.from_list(rows).to_parquet(path)
    with pytest.raises(ValueError, match=rf"{path}: row 1: messages\[0\].role must be one of"):
        data(path, on_error="raise")
    wrong = str(tmp_path / "b.parquet")
    Dataset.from_dict({"text": ["a"]}).to_parquet(wrong)
    with pytest.raises(ValueError, match=rf"{wrong}: a record must have messages, .*\['text'\]"):
        data(wrong, on_error="raise")
    assert data([wrong, path], settings={"held_out_fraction": 0.0}).packing_report.documents == 1


def test_shards_may_have_other_formats(data, write):
    files = [
        write("a.jsonl", [RECORDS[0]]),
        write("b.jsonl", [{"prompt": "Hi", "completion": "Hello", "id": 3}]),
    ]
    assert data(files, settings={"held_out_fraction": 0.0}).packing_report.documents == 2


def test_nothing_can_be_used(data, write):
    with pytest.raises(ValueError, match=r"an assistant turn, got none\. .* Nothing else"):
        data(write("a.jsonl", [FAULTY[3]]))


@pytest.mark.parametrize("overlong", ["truncate", "split", "drop"])
def test_no_piece_of_a_conversation_is_without_a_trained_token(data, write, overlong):
    long_prompt = {"prompt": " ".join(WORDS * 9), "completion": "Yes."}
    long_answer = {"prompt": "Count.", "completion": " ".join(WORDS * 9)}
    path = write("a.jsonl", [RECORDS[0], long_prompt, long_answer])
    settings = {"held_out_fraction": 0.0, "overlong": overlong, "max_tokens": 128}
    module = data(path, settings=settings)
    rows, report = train_rows(module), module.packing_report
    for row in rows:
        bounds = row.cu_seqlens.tolist()
        for begin, end in pairwise(bounds):
            assert (row.labels[0, begin:end] != -100).any()
    assert report.trained_tokens == sum(int((row.labels != -100).sum()) for row in rows)
    assert report.pieces == sum(len(row.lengths) for row in rows)
    names = {name.partition("[")[0].rpartition(":")[2] for row in rows for name in row.names}
    kept = {"truncate": {"1", "3"}, "split": {"1", "2", "3"}, "drop": {"1"}}[overlong]
    assert names == kept
    assert report.documents == len(kept)
    assert report.untrained == {"truncate": 1, "split": 3, "drop": 0}[overlong]
    lost = f"{pluralize(report.untrained, 'piece')} without one left out"
    assert (lost in str(report)) == (report.untrained > 0)


def test_one_conversation_is_not_cut_for_the_held_out_part(data, write):
    module = data(write("a.jsonl", [RECORDS[0]]), settings={"held_out_fraction": 0.5})
    assert module.packing_report.documents == 1
    assert module.held_out_report.documents == 0


def test_a_resumed_run_must_train_on_the_same_turns(data, write):
    path = write("a.jsonl", RECORDS)
    state = data(path).state_dict()
    data(path).load_state_dict(state)
    with pytest.raises(ValueError, match="settings of its checkpoint, got others: chat was"):
        data(path, train_on="last_assistant").load_state_dict(state)


def test_workers_get_the_labels(data, write):
    import pickle

    store = data(write("a.jsonl", RECORDS))._prepared.train_rows.store
    copy = pickle.loads(pickle.dumps(store))
    for number in range(len(store)):
        assert np.array_equal(copy.labels(number), store.labels(number))
        assert np.array_equal(store.labels(number, 3, 9), store.labels(number)[3:12])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "files must name at least one file or glob, or dataset a name on the hub, got none"),
        ({"files": "a", "dataset": "b"}, "files must be left out with dataset, got both"),
        ({"files": "a", "train_on": "user"}, "train_on must be one of assistant, last_assistant,"),
        ({"files": "a", "chat_template": "no.jinja"}, "chat_template must be a file with a Jinja"),
        ({"files": "a", "encoding": "x"}, "encoding must be one that Python knows"),
    ],
)
def test_wrong_settings(options, message):
    with pytest.raises(ValueError, match=message):
        ChatSource(**options)


def test_what_conversations_need(tokenizer_of, tmp_path):
    source = ChatSource(files="a.jsonl")
    with pytest.raises(ValueError, match="tokenizer must be given for conversations, got None"):
        PackedDataModule(source)
    with pytest.raises(ValueError, match=r"passkey_fraction must be 0 for conversations, got 0.5"):
        PackedDataModule(source, tokenizer_of("chatml"), passkey_fraction=0.5)
    (tmp_path / "latin.jinja").write_bytes(b"\xe9")
    source = ChatSource(files="a.jsonl", chat_template=tmp_path / "latin.jinja")
    with pytest.raises(ValueError, match=r"chat_template must be UTF-8 text, got .* with byte 0"):
        _ = source.rendering
