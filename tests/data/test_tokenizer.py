"""Tests tokenizers: trained once and cached; every tokenized document ends with the end token."""

import os

import pytest
from datasets import Dataset
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    AddedToken,
    AutoTokenizer,
    ByT5Tokenizer,
    GPT2Config,
    PreTrainedTokenizerFast,
)

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


def test_without_an_end_token_documents_end_with_their_text(documents, tokenizer, tmp_path):
    without_end_token(tokenizer).save_pretrained(tmp_path / "bare")
    bare = load_tokenizer(str(tmp_path / "bare"))
    store = tokenize(documents, bare, tmp_path)
    assert [store.tokens(i).tolist() for i in range(3)] == bare(TEXTS)["input_ids"]


def test_without_an_end_token_a_document_without_tokens_is_left_out(tmp_path):
    letters = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    letters.normalizer = normalizers.Replace("c", "")
    letters.pre_tokenizer = pre_tokenizers.Whitespace()
    bare = PreTrainedTokenizerFast(tokenizer_object=letters)
    documents = read_documents(Dataset.from_dict({"text": ["a b", "ccc", "b"]}), "t")
    store = tokenize(documents, bare, tmp_path)
    assert list(store.names) == ["t:0", "t:2"]
    assert [store.tokens(i).tolist() for i in range(2)] == [[1, 2], [2]]


def test_a_tokenizer_without_a_vocabulary_is_an_error(tmp_path):
    GPT2Config().save_pretrained(tmp_path / "bare")  # transformers makes a tokenizer of that
    with pytest.raises(ValueError, match=r"must have a vocabulary, got .*bare"):
        load_tokenizer(str(tmp_path / "bare"))
    with pytest.raises(ValueError, match=r"tokenizer must be a folder or a name .*got .*nowhere"):
        load_tokenizer(str(tmp_path / "nowhere"))


def test_fingerprint_sees_the_vocabulary_and_the_end_token(documents, tokenizer, tmp_path):
    other = train_tokenizer(documents, 281, tmp_path)
    bare = without_end_token(tokenizer)
    fingerprints = {fingerprint_tokenizer(t) for t in (tokenizer, other, bare)}
    assert len(fingerprints) == 3


def test_a_vocabulary_without_an_unknown_token_is_not_blamed_on_the_cache(tmp_path, documents):
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0})))
    with pytest.raises(ValueError, match=r"tokenizer must encode any text, got .*unknown token"):
        tokenize(documents, words, tmp_path)


def test_tokenizing_in_processes_keeps_the_environment(documents, tokenizer, tmp_path):
    environment, before = os.environ, dict(os.environ)
    tokenize(documents, tokenizer, tmp_path, 2)
    assert os.environ is environment
    assert dict(os.environ) == before


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
        "lctrain.data.tokenizing._Encoder.__call__",
        lambda *a, **k: calls.append(1) or {"input_ids": []},
    )
    second = tokenize(documents, tokenizer, tmp_path)
    assert not calls
    assert second.lengths.tolist() == first.lengths.tolist()


SPECIAL = f"before {END_TOKEN} after{END_TOKEN}"


def test_special_tokens_in_text_stay_text_unless_they_are_trusted(tokenizer, tmp_path):
    documents = read_documents(Dataset.from_dict({"text": [SPECIAL, "plain"]}), "t")
    end = tokenizer.eos_token_id
    safe = tokenize(documents, tokenizer, tmp_path)
    assert (safe.tokens(0) == end).nonzero()[0].tolist() == [len(safe.tokens(0)) - 1]
    assert tokenizer.decode(safe.tokens(0)[:-1]) == SPECIAL
    trusted = tokenize(documents, tokenizer, tmp_path, special_tokens="token")
    assert trusted.tokens(0).tolist().count(end) == 2
    assert (safe.special_texts, trusted.special_texts) == (2, 2)
    assert safe.tokens(1).tolist() == trusted.tokens(1).tolist()


def written(tokenizer, ids):
    """Returns the texts of the tokens as the vocabulary writes them."""
    return "".join(tokenizer.convert_ids_to_tokens(ids.tolist()))


def test_special_tokens_among_the_ordinary_pieces_stay_text(tmp_path):
    scores = [("<unk>", 0.0), ("</s>", 0.0), *((letter, -9.0) for letter in "▁</s>abc")]
    unigram = Tokenizer(models.Unigram(scores, unk_id=0))
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=unigram, eos_token="</s>", unk_token="<unk>"
    )
    assert 1 in tokenizer("a</s>b", split_special_tokens=True)["input_ids"]  # the trap
    documents = read_documents(Dataset.from_dict({"text": ["a</s>b", "a?"]}), "t")
    store = tokenize(documents, tokenizer, tmp_path)
    assert store.tokens(0).tolist().count(1) == 1
    assert store.tokens(0)[-1] == 1
    assert written(tokenizer, store.tokens(0)[:-1]) == "▁a</s>b"  # one space, before the text
    assert store.tokens(1).tolist() == [*tokenizer("a?")["input_ids"], 1]
    assert store.special_texts == 1


@pytest.mark.parametrize("named", [False, True], ids=["unnamed", "extra"])
def test_special_tokens_without_a_name_are_counted_as_well(tokenizer, tmp_path, named):
    """Llama 3's vocabulary marks `<|eot_id|>` as special, and no attribute names it."""
    turn = AddedToken("<|eot_id|>", special=True, normalized=False)
    if named:
        tokenizer.add_special_tokens({"extra_special_tokens": [turn]})
    else:
        tokenizer.backend_tokenizer.add_special_tokens([turn])
        tokenizer.save_pretrained(tmp_path / "saved")
        tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "saved")
        assert "<|eot_id|>" not in tokenizer.all_special_tokens
    documents = read_documents(Dataset.from_dict({"text": ["a<|eot_id|>b<|eot_id|>"]}), "t")
    (number,) = tokenizer("<|eot_id|>")["input_ids"]
    safe = tokenize(documents, tokenizer, tmp_path)
    assert number not in safe.tokens(0)
    trusted = tokenize(documents, tokenizer, tmp_path, special_tokens="token")
    assert trusted.tokens(0).tolist().count(number) == 2
    assert (safe.special_texts, trusted.special_texts) == (2, 2)


def test_unnamed_special_tokens_among_the_ordinary_pieces_stay_text(tmp_path):
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("<turn>", 0.0)]
    unigram = Tokenizer(models.Unigram([*pieces, *((c, -9.0) for c in "▁<>/surntab")], unk_id=0))
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    unigram.add_special_tokens([AddedToken("<turn>", special=True, normalized=False)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=unigram, eos_token="</s>", unk_token="<unk>"
    )
    assert 2 in tokenizer("a<turn>b", split_special_tokens=True)["input_ids"]  # the trap
    documents = read_documents(Dataset.from_dict({"text": ["a<turn>b"]}), "t")
    store = tokenize(documents, tokenizer, tmp_path)
    assert written(tokenizer, store.tokens(0)[:-1]) == "▁a<turn>b"
    assert 2 not in store.tokens(0)
    assert store.special_texts == 1


def test_a_tokenizer_in_python_takes_special_tokens_for_text(tmp_path):
    documents = read_documents(Dataset.from_dict({"text": ["a</s>b"]}), "t")
    tokenizer = ByT5Tokenizer()
    assert tokenize(documents, tokenizer, tmp_path).tokens(0).tolist().count(1) == 1
    trusted = tokenize(documents, tokenizer, tmp_path, special_tokens="token")
    assert trusted.tokens(0).tolist().count(1) == 2


def test_a_byte_order_mark_becomes_no_token(tokenizer, tmp_path):
    documents = read_documents(Dataset.from_dict({"text": ["\ufeffcat", "cat"]}), "t")
    store = tokenize(documents, tokenizer, tmp_path)
    assert store.tokens(0).tolist() == store.tokens(1).tolist()
