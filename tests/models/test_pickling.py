"""Patched models can be pickled and copied, although their classes are made at run time."""

import copy
import io
import pickle

import pytest
import torch
from transformers import AutoModelForMaskedLM

import lctrain
from tests.models.families import make_model


def saved(model):
    """Returns a model after torch.save and torch.load."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)), "save": saved}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "options", [{"fused": True}, {"loss": True}, {"fused": True, "loss": True}], ids=str
)
@pytest.mark.parametrize("family", ["llama", "qwen3", "bert", "modernbert"])
def test_a_copy_is_patched_and_computes_the_same(family, options, way):
    model = make_model(family, num_hidden_layers=1)
    if family in ("bert", "modernbert"):
        model = AutoModelForMaskedLM.from_config(model.config)
    model.train()
    lctrain.patch_model(model, **options)
    copied = WAYS[way](model)
    assert [type(x) for x in copied.modules()] == [type(x) for x in model.modules()]
    tokens = torch.randint(5, 32, (1, 9), generator=torch.Generator().manual_seed(2))
    torch.manual_seed(0)
    expected = model(input_ids=tokens, labels=tokens).loss
    torch.manual_seed(0)
    loss = copied(input_ids=tokens, labels=tokens).loss
    assert torch.equal(loss, expected)
    loss.backward()
    assert all(x.grad is None for x in model.parameters())
