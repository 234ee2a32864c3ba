"""Tests that the text of a special token in a message is read as text by tokenizers of all kinds.

The tokenizers write "▁" for a space, and one before the text: Llama 2's before every part between
special tokens, Metaspace's before the first part or every part.
"""

import numpy as np
import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from tests.data.chat.test_masks import shown, tokenized

LETTERS = ["abcdefghijklmnopqrstuvwxyz </s><xs>[INST] ▁ <>/ "] * 3
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
SPACE = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])


def prepend(model):
    model.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )


def metaspace(scheme):
    def set_up(model):
        model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)

    return set_up


def byte_level(model):
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()


SET_UP = {
    "prepend": prepend,
    "first": metaspace("first"),
    "always": metaspace("always"),
    "byte_level": byte_level,
}


def make(set_up, rstrip=False):
    model = Tokenizer(models.BPE(unk_token="<unk>"))
    model.decoder = SPACE
    set_up(model)
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<unk>", "<s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if set_up is byte_level else [],
    )  # fmt: skip
    model.train_from_iterator(LETTERS, trainer)
    end = AddedToken("</s>", special=True, normalized=False, rstrip=rstrip)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>", eos_token=end)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def read(tokenizer, answer, prompt="hi"):
    """Returns token ids, whether each is trained on, and the texts of the tokens."""
    ids, trained, fault = tokenized(tokenizer, {"prompt": prompt, "completion": answer})
    assert fault is None
    return ids, trained, tokenizer.convert_ids_to_tokens(ids)


@pytest.mark.parametrize("rstrip", [False, True])
@pytest.mark.parametrize("name", SET_UP)
@pytest.mark.parametrize("answer", ["end with </s> ok", "</s>", "a</s></s> <s>b", "x </s>"])
def test_the_text_is_that_of_another_word(name, answer, rstrip):
    tokenizer = make(SET_UP[name], rstrip)
    ids, trained, tokens = read(tokenizer, answer, "is </s> it")
    other = answer.replace("</s>", "<xs>").replace("<s>", "<x>")
    _, expected_trained, expected = read(tokenizer, other, "is <xs> it")
    for got, want in (
        (tokens[1:-1], expected[1:-1]),
        (np.array(tokens)[trained][:-1], np.array(expected)[expected_trained][:-1]),
    ):
        assert "".join(got).replace("</s>", "<xs>").replace("<s>", "<x>") == "".join(want)
    assert ids[-1] == tokenizer.eos_token_id
    assert trained[-1]
    assert (ids == tokenizer.eos_token_id).sum() == (ids == tokenizer.bos_token_id).sum() == 1


def test_a_text_without_special_tokens_is_read_the_same_way():
    """Stand-ins of special tokens change nothing around them."""
    from lctrain.data.chat.literal import LiteralEncoder

    text = "<s>[INST] is it [/INST] a  b</s> c<s></s> [INST]"
    for set_up in SET_UP.values():
        for rstrip in (False, True):
            tokenizer = make(set_up, rstrip)
            plain = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            ids, places = LiteralEncoder(tokenizer).encode(text, [])
            assert ids.tolist() == plain["input_ids"]
            assert places.tolist() == [list(place) for place in plain["offset_mapping"]]


def unigram(prefix):
    """A vocabulary that lists its end token among the ordinary pieces."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)]
    pieces += [(letter, -5.0) for letter in sorted(set("".join(LETTERS)))]
    model = Tokenizer(models.Unigram(pieces, unk_id=0))
    model.decoder = decoders.Fuse()
    if prefix:
        metaspace("always")(model)
        model.decoder = SPACE
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.mark.parametrize("prefix", [False, True])
def test_a_vocabulary_with_special_tokens_among_its_pieces(prefix):
    tokenizer = unigram(prefix)
    ids, trained, tokens = read(tokenizer, "end with </s> ok")
    assert (ids == tokenizer.eos_token_id).sum() == 1
    assert shown(tokenizer, ids, trained).endswith("⟦ end with </s> ok</s>⟧")
    _, _, expected = read(tokenizer, "end with <xs> ok")
    assert "".join(tokens).replace("</s>", "<xs>") == "".join(expected).replace("</s>", "<xs>")
    ids, _, _ = tokenized(tokenizer, {"prompt": "hi", "completion": "a </s> b"}, keep_special=True)
    assert (ids == tokenizer.eos_token_id).sum() == 2


@pytest.mark.parametrize("prefix", [False, True])
def test_a_vocabulary_whose_merges_write_a_special_token(prefix):
    """The parts of the text are read on their own, unless that would add a space."""
    letters = {letter: number for number, letter in enumerate("</s>ab ▁[INST]hi", start=1)}
    merges = [("<", "/"), ("</", "s"), ("</s", ">")]
    written = {"".join(pair): 30 + number for number, pair in enumerate(merges)}
    model = Tokenizer(models.BPE({"<unk>": 0, **letters, **written}, merges, unk_token="<unk>"))
    model.decoder = decoders.Fuse()
    if prefix:
        metaspace("always")(model)
        model.decoder = SPACE
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = TEMPLATE
    ids, _, fault = tokenized(tokenizer, {"prompt": "hi", "completion": "a</s>b"})
    if prefix:
        assert "since the tokenizer cannot read it as ordinary text; got '</s>b" in fault
    else:
        assert fault is None
        assert (ids == tokenizer.eos_token_id).sum() == 1
