"""Tests that a dataset of the hub or a folder that cannot be read is a message, not a traceback."""

import errno
import os

import pytest
from datasets import Dataset

from lctrain.data.chat.source import ChatSource
from lctrain.data.hub import HubSource
from lctrain.failure import explain


@pytest.fixture
def folder(tmp_path) -> str:
    """A folder with the layout of a dataset repository on the hub."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "train.jsonl").write_text('{"text": "one"}\n')
    return str(tmp_path / "texts")


def error_of(source, tmp_path) -> str:
    """Returns the message of the expected error of loading a source."""

    def load():
        source.load(tmp_path / "cache")
        source.load_held_out(tmp_path / "cache")

    with pytest.raises(ValueError, match="dataset must ") as raised:
        load()
    message = explain(raised.value)
    assert message is not None, "a traceback"
    return message


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"config": "nope"}, "BuilderConfig 'nope' not found. Available: ['default']"),
        ({"split": "nope"}, "nope"),
        ({"held_out_split": "test"}, "test"),
        ({"split": "train[:x]"}, "train[:x]"),
    ],
    ids=str,
)
def test_a_setting_that_the_dataset_lacks(folder, tmp_path, settings, reason, streaming):
    limits = {"streaming": True, "max_documents": 1} if streaming else {}
    message = error_of(HubSource(dataset=folder, **settings, **limits), tmp_path)
    assert message.startswith("dataset must be a name on the hub, or a folder with a dataset, got")
    assert folder in message
    assert reason in message
    assert message.endswith("Check data.dataset, its split, config and revision, and the network.")


@pytest.mark.parametrize("source", [HubSource, ChatSource])
def test_a_folder_without_data(tmp_path, source):
    (tmp_path / "empty").mkdir()
    message = error_of(source(dataset=str(tmp_path / "empty")), tmp_path)
    assert "doesn't contain any data files" in message


@pytest.mark.parametrize("source", [HubSource, ChatSource])
def test_files_with_other_columns(folder, tmp_path, source):
    (tmp_path / "texts" / "train2.jsonl").write_text('{"text": "two", "extra": 1}\n')
    message = error_of(source(dataset=folder), tmp_path)
    assert "the same columns in all its files" in message
    assert "where only some files have extra. Name the files in data.files" in message


def test_a_saved_dataset_and_a_slice_that_is_none(tmp_path):
    Dataset.from_dict({"text": ["one"]}).save_to_disk(str(tmp_path / "saved"))
    message = error_of(HubSource(dataset=str(tmp_path / "saved"), split="train[:x]"), tmp_path)
    assert "Unrecognized instruction format" in message


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_that_cannot_be_reached(tmp_path, monkeypatch, streaming):
    def unreachable(*arguments, **options):
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub (ConnectError)")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    limits = {"streaming": True, "max_documents": 1} if streaming else {}
    message = error_of(HubSource(dataset="owner/name", **limits), tmp_path)
    assert "got 'owner/name', which cannot be read: Couldn't reach 'owner/name'" in message


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/cache"), KeyError("a bug")]
)
def test_errors_that_no_dataset_causes_are_kept(tmp_path, monkeypatch, error):
    def fails(*arguments, **options):
        raise error

    monkeypatch.setattr("datasets.load_dataset", fails)
    with pytest.raises(type(error)) as raised:
        HubSource(dataset="owner/name").load(tmp_path)
    assert raised.value is error
