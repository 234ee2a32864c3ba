"""Tests passkey documents: where key and answer stand; a number determines each document."""

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lctrain.data.passkey import KEY_WORDS, Filler, PasskeyFormat


@pytest.fixture
def data(make_data):
    module = make_data()
    module.setup()
    return module


@pytest.fixture
def format(data) -> PasskeyFormat:
    return PasskeyFormat.of(data.tokenizer)


@pytest.fixture
def filler() -> Filler:
    """Three documents with 3, 0 and 4 usable tokens: 10, 11, 12 and 20, 21, 22, 23."""
    return Filler.of([np.array([10, 11, 12, 99]), np.array([99]), np.array([20, 21, 22, 23, 99])])


@pytest.mark.parametrize("with_end", [True, False], ids=["end", "no-end"])
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_key_and_answer_are_where_they_should_be(data, format, depth, with_end):
    filler = Filler.of([np.full(50, data.tokenizer("x")["input_ids"][0])])
    made = format.make(np.random.default_rng(0), 400, depth, filler, with_end=with_end)
    assert len(made.input_ids) == 400
    key = data.tokenizer.decode(np.concatenate([format.words[word] for word in made.key]))
    text = data.tokenizer.decode(made.input_ids)
    before, rest = text.split("\n# The pass key is" + key + ". Remember it.\n")
    after, end = rest.split("\n# What is the pass key?\n# The pass key is" + key)
    assert set(before + after) <= {"x"}
    assert abs(len(before) - depth * len(before + after)) <= 1
    assert end == (data.tokenizer.eos_token if with_end else "")
    answer = made.input_ids[made.answer_start : made.answer_start + made.answer_tokens]
    assert data.tokenizer.decode(answer) == key


def test_keys_are_different_words_and_depend_on_the_generator(format, filler):
    random = np.random.default_rng(0)
    keys = [format.make(random, 300, 0.5, filler, with_end=True).key for _ in range(50)]
    assert all(len(set(key)) == len(key) == KEY_WORDS for key in keys)
    assert len(set(keys)) > 45
    again = format.make(np.random.default_rng(0), 300, 0.5, filler, with_end=True)
    assert again.key == keys[0]


def test_keys_are_whole_words_of_the_vocabulary_where_it_has_enough(make_data, data, format):
    assert [data.tokenizer.decode(word) for word in format.words] == [f" {n}" for n in range(10)]
    words = [f" {a}{b}{c}" for a in "bcdfg" for b in "aeiou" for c in "klmn"]
    vocabulary = dict.fromkeys([*pre_tokenizers.ByteLevel.alphabet(), "<end>"])
    merges = []
    for word in words:
        pieces = ["Ġ", *word[1:]]
        for end in range(2, 5):
            merge = ("".join(pieces[: end - 1]), pieces[end - 1])
            if "".join(merge) not in vocabulary:
                vocabulary["".join(merge)] = None
                merges.append(merge)
    numbers = {token: number for number, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.BPE(vocab=numbers, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    format = PasskeyFormat.of(
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    )
    assert [tokenizer.decode(word.tolist()) for word in format.words] == words
    assert all(len(word) == 1 for word in format.words)


def test_shortest_is_a_document_without_filler(format, filler):
    made = format.make(np.random.default_rng(0), format.shortest, 0.5, filler, with_end=True)
    assert len(made.input_ids) == format.shortest
    assert not set(made.input_ids.tolist()) & {10, 11, 12, 20, 21, 22, 23} - set(
        np.concatenate([format.statement, format.question, format.reminder, *format.words])
    )


def test_begin_tokens_of_the_tokenizer_come_first_and_once(data, format, filler):
    tokenizer = Tokenizer.from_str(data.tokenizer.backend_tokenizer.to_str())
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    begins = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<|endoftext|>"
    )
    made = PasskeyFormat.of(begins).make(np.random.default_rng(0), 300, 0.5, filler, with_end=True)
    assert made.input_ids[0] == begins.bos_token_id
    assert (made.input_ids == begins.bos_token_id).sum() == 1
    assert PasskeyFormat.of(begins).shortest == format.shortest + 1


def test_filler_goes_on_with_the_next_document_and_leaves_ends_out(filler):
    stream = [10, 11, 12, 20, 21, 22, 23]
    for seed in range(20):
        taken = filler.take(np.random.default_rng(seed), 16).tolist()
        first = stream.index(taken[0])
        assert taken == [stream[(first + step) % 7] for step in range(16)]
    starts = {filler.take(np.random.default_rng(seed), 1).item() for seed in range(60)}
    assert starts == set(stream)


def test_filler_leaves_begin_tokens_out():
    filler = Filler.of([np.array([1, 10, 11, 99]), np.array([1, 20, 99])], begin=1)
    assert set(filler.take(np.random.default_rng(0), 9).tolist()) == {10, 11, 20}


def test_no_filler_is_an_error():
    with pytest.raises(ValueError, match="passkeys must be hidden in text, got 1 document without"):
        Filler.of([np.array([99])])


def test_a_tokenizer_that_knows_no_digits_is_an_error():
    words = Tokenizer(models.WordLevel({"<unk>": 0, "the": 1}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", eos_token="<unk>"
    )
    with pytest.raises(ValueError, match=r"tokenizer must have tokens for .*leave them out"):
        PasskeyFormat.of(tokenizer)
