"""Tests the begin token: it opens every window if the tokenizer adds one, and is counted."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lctrain import patch_model
from lctrain.data import TokenizedDocument
from lctrain.data.tokenizer import tokens_around
from lctrain.eval import Extension, compare_methods, cut_windows, perplexity_by_length
from lctrain.eval.begin import NO_BEGIN, BeginTokens, begin_tokens
from tests.numerics import near

BEGIN = 1


def make_tokenizer(adds: bool, **special) -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    if adds:
        words.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=97, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                         num_attention_heads=2)  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


def documents(begun: bool) -> list[TokenizedDocument]:
    random = np.random.default_rng(0)
    parts = [random.integers(2, 97, size=size) for size in (70, 23, 5)]
    if begun:
        parts = [np.concatenate([[BEGIN], part]) for part in parts]
    return [TokenizedDocument(str(i), part, i) for i, part in enumerate(parts)]


def test_what_windows_begin_with_follows_tokenizer_and_option():
    adding = make_tokenizer(True, bos_token="<s>")
    silent = make_tokenizer(False, bos_token="<s>")
    without = make_tokenizer(False, eos_token="</s>")
    assert begin_tokens(adding, None) == BeginTokens((0,), True)
    assert begin_tokens(adding, False) == BeginTokens((0,), False)
    assert begin_tokens(silent, None).tokens == begin_tokens(silent, False).tokens == ()
    assert begin_tokens(silent, True) == BeginTokens((0,), True)
    assert begin_tokens(without, None).tokens == ()
    with pytest.raises(ValueError, match="begin_token must be null or false for a tokenizer with"):
        begin_tokens(without, True)


def test_the_begin_is_found_for_a_vocabulary_without_the_letter_a():
    letters = Tokenizer(models.BPE({"<s>": 0, "</s>": 1, "C": 2, "G": 3}, []))
    letters.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, bos_token="<s>", eos_token="</s>")
    assert tokenizer("a", add_special_tokens=False)["input_ids"] == []
    assert tokens_around(tokenizer) == ([0], [1])
    assert begin_tokens(tokenizer, None) == BeginTokens((0,), True)


@pytest.mark.parametrize("begin", [1, 2])
@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("length", [4, 7, 16, 64])
def test_windows_leave_room_for_the_begin_and_score_everything_once(length, overlap, begin):
    sizes = [2, 5, length, length + 1, length + 2, 100]
    windows = cut_windows(sizes, length, overlap=overlap, begin=begin)
    assert windows.lengths.max() <= length
    assert ((windows.prefixes == begin) == (windows.starts > 0)).all()
    assert (windows.scored_from >= windows.starts).all()
    assert (windows.scored > 0).all()
    scored = [
        (int(d), p)
        for d, first, stop in zip(
            windows.documents, windows.scored_from, windows.stops, strict=True
        )
        for p in range(first, stop)
    ]
    assert sorted(scored) == [(d, p) for d, size in enumerate(sizes) for p in range(size - 1)]


def direct_loss(model, ids: np.ndarray, length: int, begin: bool) -> float:
    """Returns the summed loss of one document, window by window, without batches."""
    windows = cut_windows([len(ids)], length, begin=int(begin))
    total = 0.0
    for start, first, stop in zip(windows.starts, windows.scored_from, windows.stops, strict=True):
        prefix = [BEGIN] if begin and start > 0 else []
        inputs = torch.tensor([[*prefix, *ids[start:stop]]])
        with torch.no_grad():
            scores = model(input_ids=inputs).logits[0].double().log_softmax(-1)
        for place in range(first, stop):
            total -= float(scores[len(prefix) + place - start, ids[place + 1]])
    return total


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packs"])
@pytest.mark.parametrize("every", [True, False])
@pytest.mark.usefixtures("float64_stays_float64")
def test_the_loss_is_that_of_windows_with_the_token(model, packed, every):
    given = documents(begun=True)
    arguments = {"max_tokens": 64, "begin": BeginTokens((BEGIN,), every)}
    if packed:
        with patch_model(model):
            table = perplexity_by_length(model, given, [8, 16, 64], **arguments)
    else:
        table = perplexity_by_length(model, given, [8, 16, 64], **arguments)
    for row in table.rows:
        parts = [direct_loss(model, d.input_ids, row.length, every) for d in given]
        assert row.loss == near(sum(parts) / row.tokens)
    short = table.rows[0]
    assert short.tokens == sum(len(d.input_ids) - 1 for d in given)
    assert short.begun == (short.windows if every else 3)
    assert short.windows > 10
    said = "every window begins with the begin token"
    assert (said in str(table)) == every
    assert (f"begin with the begin token: 3 of {short.windows} at 8" in str(table)) == (not every)


def test_documents_without_the_token_get_it(model):
    begin = BeginTokens((BEGIN,))
    added = perplexity_by_length(model, documents(False), [8], max_tokens=64, begin=begin)
    there = perplexity_by_length(model, documents(True), [8], max_tokens=64, begin=begin)
    assert added.rows == there.rows
    plain = perplexity_by_length(model, documents(True), [8], max_tokens=64)
    assert plain.begin_tokens == NO_BEGIN.tokens == ()
    assert "begin token" not in str(plain)


def test_a_length_must_hold_more_than_the_token(model):
    with pytest.raises(ValueError, match="lengths must be at least 3 with 1 begin token, got 2"):
        perplexity_by_length(
            model, documents(True), [2], max_tokens=64, begin=BeginTokens((BEGIN,))
        )


def test_a_comparison_of_methods_says_so_too(model, tmp_path):
    comparison = compare_methods(
        model, documents(True), [8, 16], [Extension("plain", 16), Extension("ntk", 16)],
        max_tokens=64, begin=BeginTokens((BEGIN,)),
    )  # fmt: skip
    assert str(comparison).endswith("every window begins with the begin token")
    assert '"begin_tokens": [\n    1\n  ]' in comparison.save(tmp_path)["json"].read_text()
