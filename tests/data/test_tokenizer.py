"""Tokenizers and tokenizing: trained once, cached, and every document ends with the end token."""

import pytest
from datasets import Dataset
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from lctrain.data.documents import read_documents
from lctrain.data.tokenizer import (
    END_TOKEN,
    _train,
    fingerprint_tokenizer,
    load_tokenizer,
    train_tokenizer,
)
from lctrain.data.tokenizing import tokenize

TEXTS = ["the cat sat on the mat", "naïve café ☕\n\ttabs", "the end " * 50]


@pytest.fixture
def documents():
    return read_documents(Dataset.from_dict({"text": TEXTS}), "table")


@pytest.fixture
def tokenizer(documents, tmp_path):
    return train_tokenizer(documents, 280, tmp_path)


def without_end_token(tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)


def test_trained_tokenizer_has_the_size_and_loses_no_byte(tokenizer):
    assert len(tokenizer) == 280
    assert tokenizer.eos_token == END_TOKEN
    for text in [*TEXTS, "unseen: 漢字 \x00 ümläut"]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_training_happens_once_per_texts_and_size(documents, tokenizer, tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr("lctrain.data.tokenizer._train", lambda *arguments: trained.append(1))
    again = train_tokenizer(documents, 280, tmp_path)
    assert fingerprint_tokenizer(again) == fingerprint_tokenizer(tokenizer)
    assert not trained
    with pytest.raises(OSError, match=r"."):  # the replaced _train leaves no files
        train_tokenizer(documents, 281, tmp_path)
    assert trained


def test_a_process_that_comes_second_leaves_the_first_result(documents, tokenizer, tmp_path):
    (folder,) = (tmp_path / "tokenizers").iterdir()
    written = (folder / "tokenizer.json").stat().st_mtime_ns
    _train(documents, 280, folder)
    assert list((tmp_path / "tokenizers").iterdir()) == [folder]
    assert (folder / "tokenizer.json").stat().st_mtime_ns == written


def test_too_small_a_vocabulary_is_an_error(documents, tmp_path):
    with pytest.raises(ValueError, match="vocab_size must be at least 257, got 256"):
        train_tokenizer(documents, 256, tmp_path)


def test_a_saved_tokenizer_loads_by_path_here_and_in_transformers(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "saved")
    loaded = load_tokenizer(str(tmp_path / "saved"))
    assert fingerprint_tokenizer(loaded) == fingerprint_tokenizer(tokenizer)
    plain = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert plain(TEXTS)["input_ids"] == tokenizer(TEXTS)["input_ids"]


def test_a_tokenizer_without_an_end_token_is_an_error(tokenizer, tmp_path):
    without_end_token(tokenizer).save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match=r"must have an end token, got .*bare.*eos_token"):
        load_tokenizer(str(tmp_path / "bare"))


def test_fingerprint_sees_the_vocabulary_and_the_end_token(documents, tokenizer, tmp_path):
    other = train_tokenizer(documents, 281, tmp_path)
    bare = without_end_token(tokenizer)
    fingerprints = {fingerprint_tokenizer(t) for t in (tokenizer, other, bare)}
    assert len(fingerprints) == 3


@pytest.mark.parametrize("num_proc", [None, 2])
def test_documents_end_with_exactly_one_end_token(documents, tokenizer, tmp_path, num_proc):
    store = tokenize(documents, tokenizer, tmp_path, num_proc)
    for number, text in enumerate(TEXTS):
        tokens = store.tokens(number).tolist()
        assert tokens == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    assert list(store.names) == list(documents.names)


def test_special_tokens_of_the_tokenizer_are_kept(documents, tokenizer, tmp_path):
    from tokenizers.processors import TemplateProcessing

    backend = tokenizer.backend_tokenizer
    backend.post_processor = TemplateProcessing(
        single=f"{END_TOKEN} $A {END_TOKEN}", special_tokens=[(END_TOKEN, tokenizer.eos_token_id)]
    )
    marked = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END_TOKEN)
    tokens = tokenize(documents, marked, tmp_path).tokens(0).tolist()
    assert tokens[0] == tokens[-1] == marked.eos_token_id
    assert tokens.count(marked.eos_token_id) == 2


def test_a_tokenizer_in_python_that_adds_its_own_end_token(documents, tmp_path):
    tokenizer = ByT5Tokenizer()
    tokens = tokenize(documents, tokenizer, tmp_path).tokens(0).tolist()
    assert tokens.count(tokenizer.eos_token_id) == 1
    assert tokens[-1] == tokenizer.eos_token_id
    assert fingerprint_tokenizer(tokenizer) == fingerprint_tokenizer(ByT5Tokenizer())
    assert fingerprint_tokenizer(tokenizer) != fingerprint_tokenizer(ByT5Tokenizer(extra_ids=3))


def test_tokens_come_from_the_cache_the_second_time(documents, tokenizer, tmp_path, monkeypatch):
    first = tokenize(documents, tokenizer, tmp_path)
    calls = []
    monkeypatch.setattr(
        "lctrain.data.tokenizing._tokenize", lambda *a, **k: calls.append(1) or {"input_ids": []}
    )
    second = tokenize(documents, tokenizer, tmp_path)
    assert not calls
    assert second.lengths.tolist() == first.lengths.tolist()
