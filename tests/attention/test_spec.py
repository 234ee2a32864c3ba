"""AttentionSpec: frozen, and every wrong value refused with what to do."""

import dataclasses
import pickle

import pytest
from torch import nn

from lctrain.attention import ATTENTION_NAMES, AttentionSpec, is_patched
from lctrain.models import patch_model


def test_defaults_and_name():
    spec = AttentionSpec()
    assert spec == AttentionSpec(kind="flash", dropout=None, deterministic=False, backend="auto")
    assert spec.implementation == ATTENTION_NAMES["flash"] == "lctrain_flash"
    assert pickle.loads(pickle.dumps(spec)) == spec


def test_is_patched_asks_the_model(make_llama):
    model = make_llama()
    assert not is_patched(model)
    with patch_model(model):
        assert is_patched(model)
    assert not is_patched(model)
    assert not is_patched(nn.Linear(1, 1))


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        AttentionSpec().dropout = 0.5


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "differential"}, "attention must be one of 'flash', got 'differential'"),
        ({"dropout": -0.1}, r"dropout must be in \[0, 1\).*got -0.1. Pass 0.0"),
        ({"dropout": True}, r"dropout must be in \[0, 1\).*got True"),
        ({"dropout": "0.1"}, r"dropout must be in \[0, 1\).*got '0.1'"),
        ({"deterministic": None}, "deterministic must be True or False, got None"),
        ({"backend": None}, "backend must be the name of a backend, got None"),
    ],
)
def test_wrong_values(values, message):
    with pytest.raises(ValueError, match=message):
        AttentionSpec(**values)
