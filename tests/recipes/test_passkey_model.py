"""Tests the recipe of the shipped passkey model with a few steps of each stage."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from lctrain.data.passkey import PasskeyFormat
from lctrain.recipes.passkey_model import __main__ as recipe
from lctrain.recipes.passkey_model import training
from lctrain.recipes.passkey_model.network import build_network
from lctrain.recipes.passkey_model.tokenizer import train_tokenizer
from lctrain.recipes.passkey_model.training import IGNORED, Material, train_network

WORDS = [f"{a}{b}word" for a in "bcdfghjklmnprstvw" for b in "aeiou"]
TEXTS = [" ".join(WORDS[n:] + WORDS[:n]) + ".\n" for n in range(len(WORDS))]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS)


@pytest.fixture
def material(tokenizer):
    documents = [np.array(tokenizer(text)["input_ids"]) for text in TEXTS]
    return Material(PasskeyFormat.of(tokenizer), documents, seed=0)


def test_a_key_word_is_one_token_and_the_fixed_texts_are_short(tokenizer):
    format = PasskeyFormat.of(tokenizer)
    assert len(format.words) > 10  # not the digits
    assert {len(word) for word in format.words} == {1}
    assert format.shortest <= 34


def test_the_first_head_starts_at_the_previous_token():
    torch.manual_seed(0)
    model = build_network(vocab_size=50, window=64)
    model.set_attn_implementation("eager")
    ids = torch.randint(50, (1, 64))
    with torch.no_grad():
        weights = model(input_ids=ids, output_attentions=True).attentions[0][0]
    by_offset = [[float(head.diagonal(-offset).mean()) for offset in range(4)] for head in weights]
    assert max(by_offset[0]) == by_offset[0][1]
    assert by_offset[0][1] > 2 * by_offset[1][1]  # the other head has no such start


def test_copies_repeat_after_a_period_of_their_own(material):
    ids, labels = material.copies(8, 32)
    assert ids.shape == labels.shape == (8, 32)
    periods = set()
    for row, targets in zip(ids, labels, strict=True):
        (places,) = torch.nonzero(targets != IGNORED, as_tuple=True)
        period = int(places[0]) - 1
        periods.add(period)
        assert places.tolist() == list(range(period + 1, 32))
        assert torch.equal(row[period:], row[:-period])
        assert torch.equal(targets[places], row[places])
    assert len(periods) > 1
    assert min(periods) >= 6
    assert max(periods) <= 16


def test_only_the_words_of_the_answer_have_labels(material):
    ids, labels = material.keys(4, 60)
    for row, targets in zip(ids, labels, strict=True):
        (places,) = torch.nonzero(targets != IGNORED, as_tuple=True)
        assert places.tolist() == list(range(int(places[0]), len(row)))
        answer = row[places].tolist()
        text = row[: int(places[0])].tolist()
        assert any(text[n : n + len(answer)] == answer for n in range(len(text)))


def test_training_goes_through_all_stages(material, monkeypatch):
    stages = training.stages
    few = lambda *sizes: tuple(replace(stage, steps=2) for stage in stages(*sizes))  # noqa: E731
    monkeypatch.setattr(training, "stages", few)
    torch.manual_seed(0)
    model = build_network(vocab_size=1024, window=64)
    before = [weight.clone() for weight in model.parameters()]
    lines = []
    assert train_network(model, material, 64, lines.append) == 10
    assert [line.split(":")[0] for line in lines] == [stage.name for stage in stages(34, 64)]
    assert all(torch.isfinite(weight).all() for weight in model.parameters())
    changed = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert all(changed)


def test_an_earlier_run_is_kept(tmp_path):
    (tmp_path / "train.json").write_text("{}")
    with pytest.raises(ValueError, match="--output must be a folder in which the recipe has not"):
        recipe.main(["--output", str(tmp_path)])
    assert json.loads((tmp_path / "train.json").read_text()) == {}
