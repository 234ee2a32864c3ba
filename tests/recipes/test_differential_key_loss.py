"""Tests the loss of passkeys: one document at a time, and for a model that knows the answer."""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from lctrain.data.passkey import Filler, PasskeyFormat
from lctrain.models import patch_model
from lctrain.recipes.differential import key_loss as subject
from lctrain.recipes.differential.key_loss import passkey_loss
from tests.numerics import near

FORMAT = PasskeyFormat(
    begin=np.array([], dtype=np.int64),
    statement=np.array([1, 2]),
    reminder=np.array([3]),
    question=np.array([4, 1, 2]),
    words=tuple(np.array([token]) for token in range(10, 30)),
    end=np.array([0]),
)
DOCUMENTS = [np.arange(30, 60), np.arange(40, 64)]


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).double()


def made(length, depth, key):
    filler = Filler.of(DOCUMENTS)
    random = np.random.default_rng([0, length, key])
    return FORMAT.make(random, length, depth, filler, with_end=False)


@pytest.mark.usefixtures("float64_stays_float64")
def test_it_is_the_mean_over_documents(model):
    losses = []
    for depth in (0.0, 1.0):
        for key in range(3):
            passkey = made(24, depth, key)
            ids = torch.from_numpy(passkey.input_ids)
            with torch.no_grad():
                logits = model(input_ids=ids[None], use_cache=False).logits[0]
            start = passkey.answer_start
            losses.append(cross_entropy(logits[start - 1 : -1], ids[start:]).item())
    with patch_model(model):
        found = passkey_loss(
            model, FORMAT, DOCUMENTS, 24, (0.0, 1.0), 3, max_tokens=96, device="cpu"
        )
    assert found == near(np.mean(losses))


def test_the_places_are_those_before_the_answer(monkeypatch):
    asked = []

    def look(model, kwargs, places, targets):
        tokens = kwargs["input_ids"].flatten()
        asked.extend(zip(tokens[places].tolist(), targets.tolist(), strict=True))
        return torch.zeros(len(places))

    monkeypatch.setattr(subject, "token_losses", look)
    monkeypatch.setattr(subject, "evaluation_mode", lambda model: nullcontext())
    model = SimpleNamespace()
    passkey_loss(model, FORMAT, DOCUMENTS, 24, (0.5,), 2, max_tokens=1000, device="cpu")
    expected = []
    for key in range(2):
        passkey = made(24, 0.5, key)
        answer = passkey.input_ids[passkey.answer_start :].tolist()
        expected += zip([2, *answer[:-1]], answer, strict=True)
    assert asked == expected
