"""Tests the tokens of prompts: a long prompt is tokenized once, with the same result."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lctrain.eval import prompt as prompts
from lctrain.eval.prompt import Prompt, tokenized
from tests.eval.word_tokenizer import WordTokenizer

TEXT = [f"Sentence {n} tells of a calm river, and its mill number {n * 37}." for n in range(400)]


def trained(model, before, decoder, trainer):
    made = Tokenizer(model)
    made.pre_tokenizer, made.decoder = before, decoder
    made.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made)


def byte_pairs():
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=level.alphabet())
    return trained(models.BPE(), level, decoders.ByteLevel(), trainer)


def unigram():
    trainer = trainers.UnigramTrainer(vocab_size=300, unk_token="<unk>", special_tokens=["<unk>"])
    return trained(models.Unigram(), pre_tokenizers.Metaspace(), decoders.Metaspace(), trainer)


def characters():
    """Merges over spaces, so the tokens before the answer depend on it."""
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>"])
    before = pre_tokenizers.Split("\n", "isolated")
    return trained(models.BPE(unk_token="<unk>"), before, decoders.Fuse(), trainer)


@pytest.mark.parametrize("make", [byte_pairs, unigram, characters, WordTokenizer])
@pytest.mark.parametrize("answer", ["1184", "river", "and its mill number 74"])
def test_a_long_prompt_is_tokenized_once(make, answer, monkeypatch):
    tokenizer = make()
    asked = Prompt(" ".join(TEXT) + " The answer is", (answer,))
    sizes = []
    plain = prompts.tokens_of
    monkeypatch.setattr(
        prompts, "tokens_of", lambda by, text: sizes.append(len(text)) or plain(by, text)
    )
    found = tokenized(tokenizer, asked)
    assert [size for size in sizes if size > 1100] == [len(asked.text)]
    monkeypatch.setattr(prompts, "END_CHARACTERS", len(asked.text))
    expected = tokenized(tokenizer, asked)
    assert found.input_ids.tolist() == expected.input_ids.tolist()
    assert found.answer_ids.tolist() == expected.answer_ids.tolist()
