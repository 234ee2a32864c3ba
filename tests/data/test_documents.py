"""Tests the document store: a stable held-out split, counts, and reading tokens from the cache."""

import pickle

import numpy as np
import pytest
from datasets import Dataset, Features, List, Value, concatenate_datasets

from lctrain.data.documents import TokenStore, read_documents

TEXTS = [f"text {number}" for number in range(400)]


def documents(texts):
    return read_documents(Dataset.from_dict({"text": texts}), "table")


def test_empty_texts_and_nulls_of_a_table_are_dropped_and_counted():
    read = documents(["a", "", " \n", None, "b"])
    assert list(read.names) == ["table:0", "table:4"]
    assert read.texts["text"][:] == ["a", "b"]
    assert (read.dropped_empty, read.dropped_unreadable) == (3, 0)


def test_faults_tell_what_is_unreadable_from_what_is_empty():
    rows = {
        "text": ["a", None, None, "cut", ""],
        "name": ["f", "g", "h", "i", "j"],
        "fault": [None, "g is damaged", None, "i is truncated", "j is empty"],
    }
    read = read_documents(Dataset.from_dict(rows), "files")
    assert list(read.names) == ["f", "i"]
    assert (read.dropped_empty, read.dropped_unreadable, read.repaired) == (2, 1, 1)


def test_a_byte_order_mark_is_no_part_of_a_text():
    read = read_documents(Dataset.from_dict({"text": ["\ufeffa", "a", "\ufeff", "é"]}), "t")
    assert [read.text(i) for i in range(len(read))] == ["a", "a", "é"]
    assert read.digests[0] == read.digests[1]
    assert read.sizes.tolist() == [1, 1, 2]


def test_no_documents():
    read = documents([])
    assert len(read) == 0
    assert [len(part) for part in read.split(0.5)] == [0, 0]


def test_split_is_a_partition_near_the_fraction():
    train, held_out = documents(TEXTS).split(0.2)
    assert len(train) + len(held_out) == 400
    assert not set(train.texts["text"]) & set(held_out.texts["text"])
    assert 50 < len(held_out) < 110


def test_split_does_not_depend_on_order_or_on_other_documents():
    whole = set(documents(TEXTS).split(0.2)[1].texts["text"])
    part = set(documents(TEXTS[100:][::-1]).split(0.2)[1].texts["text"])
    assert part == whole & set(TEXTS[100:])


def test_copies_of_a_text_are_never_on_both_sides():
    train, held_out = documents(TEXTS + TEXTS).split(0.3)
    assert not set(train.texts["text"]) & set(held_out.texts["text"])


@pytest.mark.parametrize("fraction", [1e-9, 0.999999999])
def test_neither_side_is_empty(fraction):
    train, held_out = documents(["a", "b"]).split(fraction)
    assert (len(train), len(held_out)) == (1, 1)


def test_fraction_zero_holds_nothing_out():
    assert len(documents(TEXTS).split(0.0)[1]) == 0


def test_fingerprint_follows_texts_and_their_order():
    assert documents(["a", "b"]).fingerprint == documents(["a", "", "b"]).fingerprint
    assert documents(["a", "b"]).fingerprint != documents(["b", "a"]).fingerprint


@pytest.fixture
def store() -> TokenStore:
    """A document store with five documents in two Arrow chunks."""
    features = Features({"input_ids": List(Value("int32"))})
    first = Dataset.from_dict({"input_ids": [[1, 2, 3], [4]]}, features=features)
    second = Dataset.from_dict({"input_ids": [[5, 6], [7, 8, 9, 10], [11]]}, features=features)
    return TokenStore(concatenate_datasets([first, second]), list("abcde"))


def test_token_store_reads_slices_across_chunks(store):
    assert store.lengths.tolist() == [3, 1, 2, 4, 1]
    rows = [store.tokens(i).tolist() for i in range(5)]
    assert rows == [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10], [11]]
    assert store.tokens(3, 1, 2).tolist() == [8, 9]
    assert store.tokens(2, 1).tolist() == [6]
    assert store.tokens(0).dtype == np.int32


def test_token_store_pickles_for_spawned_workers(store):
    copy = pickle.loads(pickle.dumps(store))
    assert copy.tokens(3).tolist() == [7, 8, 9, 10]
    assert copy.names == store.names


@pytest.mark.parametrize(
    ("text", "fraction", "beginning", "end"),
    [
        ("line 1\nline 2\nline 3\nline 4\n", 0.2, "line 1\nline 2\nline 3\n", "line 4\n"),
        ("one two three four", 0.3, "one two ", "three four"),
        ("漢字かな交じり文", 0.25, "漢字かな交じ", "り文"),
        ("x", 0.5, "x", ""),
        ("ab   ", 0.2, "ab   ", ""),
    ],
)
def test_the_end_of_a_single_text_is_held_out(text, fraction, beginning, end, caplog):
    train, held_out = read_documents(Dataset.from_dict({"text": [text, text, ""]}), "t").split(
        fraction
    )
    assert [train.text(i) for i in range(len(train))] == [beginning] * 2
    assert [held_out.text(i) for i in range(len(held_out))] == ([end] if end else [])
    assert train.dropped_empty == 1
    assert ("hold only one text, t:0: its end" in caplog.text) == bool(end)
    whole, nothing = read_documents(Dataset.from_dict({"text": [text]}), "t").split(0.0)
    assert (whole.text(0), len(nothing)) == (text, 0)
