"""A layer of BERT as one autograd function gives the results of its modules."""

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from lctrain.models import encoder_block, fused_encoders, patch_model
from tests.models.families import gradients, make_documents, padded
from tests.models.test_fused_encoders import masked_lm
from tests.numerics import assert_equal_in_float64

FAMILIES = ("bert", "roberta", "electra")


@pytest.fixture
def blocks(monkeypatch):
    """The calls of EncoderBlock, which serves the CPU in these tests."""
    monkeypatch.setattr(fused_encoders, "SERVED", frozenset({"cpu"}))
    calls, own = [], encoder_block.apply_block

    def counted(*arguments):
        calls.append(arguments)
        return own(*arguments)

    monkeypatch.setattr(encoder_block, "apply_block", counted)
    return calls


def rows():
    tokens, mask = padded(make_documents(), "right")
    return {"input_ids": tokens, "attention_mask": mask}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.usefixtures("in_float64")
def test_results_and_gradients_are_those_of_the_modules(family, blocks):
    model = masked_lm(family).eval()
    inputs = rows()
    real = inputs["attention_mask"].bool()[..., None]

    def forward():
        return model(**inputs).logits * real

    expected, reference = gradients(model, forward)
    with patch_model(model, fused=True, unpad=True):
        found, changed = gradients(model, forward)
    assert len(blocks) == model.config.num_hidden_layers
    assert_equal_in_float64(found, expected)
    assert changed.keys() == reference.keys()
    for name, gradient in changed.items():
        assert_equal_in_float64(gradient, reference[name])


@pytest.mark.parametrize("part", ["attention", "hidden", "both"])
@pytest.mark.usefixtures("in_float64")
def test_dropout_drops_what_the_modules_drop(part, blocks, monkeypatch):
    """A seed gives the masks in the same order, so results and gradients are the same."""
    model = masked_lm("bert").train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3 if part != "attention" else 0.0
    for layer in model.bert.encoder.layer:
        layer.attention.self.dropout.p = 0.3 if part != "hidden" else 0.0
    inputs = rows()

    def forward():
        torch.manual_seed(1)
        return model(**inputs).logits

    with patch_model(model, fused=True, unpad=True):
        found, changed = gradients(model, forward)
        assert len(blocks) == model.config.num_hidden_layers
        monkeypatch.setattr(fused_encoders, "SERVED", frozenset())
        expected, reference = gradients(model, forward)
    assert_equal_in_float64(found, expected)
    for name, gradient in changed.items():
        assert_equal_in_float64(gradient, reference[name])


@pytest.mark.usefixtures("in_float64")
def test_frozen_weights_and_embeddings_get_no_gradient(blocks):
    model = masked_lm("bert").eval()
    for name, weight in model.named_parameters():
        weight.requires_grad = "layer.1" in name and ("key.weight" in name or "LayerNorm" in name)
    inputs = rows()

    def forward():
        return model(**inputs).logits

    _, reference = gradients(model, lambda: forward() * inputs["attention_mask"][..., None])
    with patch_model(model, fused=True, unpad=True):
        _, changed = gradients(model, forward)
    assert blocks
    assert changed.keys() == reference.keys()
    assert changed
    for name, gradient in changed.items():
        assert_equal_in_float64(gradient, reference[name])


def adapter(model):
    query = model.bert.encoder.layer[0].attention.self.query
    model.bert.encoder.layer[0].attention.self.query = nn.Sequential(query)


def hook(model):
    model.bert.encoder.layer[0].output.dense.register_forward_hook(lambda *_: None)


def alpha_dropout(model):
    model.bert.encoder.layer[0].output.dropout = nn.AlphaDropout(0.1).eval()


def chunks(model):
    model.bert.encoder.layer[0].chunk_size_feed_forward = 1


def other_activation(model):
    model.bert.encoder.layer[0].intermediate.intermediate_act_fn = nn.ReLU()


def activation_hook(model):
    activation = model.bert.encoder.layer[0].intermediate.intermediate_act_fn
    activation.register_forward_hook(lambda _, args, output: 2 * output)


CHANGES = (adapter, hook, alpha_dropout, chunks, other_activation, activation_hook)


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.usefixtures("in_float64")
def test_modules_run_one_by_one_where_something_sees_them(change, blocks):
    model = masked_lm("bert").eval()
    with patch_model(model, fused=True, unpad=True):
        change(model)
        found = model(**rows()).logits
    assert len(blocks) == model.config.num_hidden_layers - 1
    with patch_model(model, unpad=True):
        assert_equal_in_float64(found, model(**rows()).logits)


@torch.no_grad()
@pytest.mark.parametrize("family", ["bert", "modernbert"])
@pytest.mark.usefixtures("in_float64")
def test_hooks_on_all_modules_of_the_process_see_every_module(family, blocks):
    model = masked_lm(family).eval()
    seen = []
    with patch_model(model, fused=True, unpad=True):
        handle = register_module_forward_hook(lambda module, *_: seen.append(module))
        try:
            model(**rows())
        finally:
            handle.remove()
    linears = {module for module in model.modules() if isinstance(module, nn.Linear | nn.LayerNorm)}
    assert linears <= set(seen)
    assert not blocks


@torch.no_grad()
@pytest.mark.usefixtures("in_float64")
def test_an_activation_that_is_replaced_in_a_gated_mlp(blocks):
    model = masked_lm("modernbert").eval()
    with patch_model(model, fused=True, unpad=True):
        for layer in model.model.layers:
            layer.mlp.act = nn.ReLU()
        found = model(**rows()).logits
    with patch_model(model, unpad=True):
        assert_equal_in_float64(found, model(**rows()).logits)


def test_padding_profilers_and_autocast_run_the_modules(blocks):
    model = masked_lm("bert").eval()
    with patch_model(model, fused=True, unpad=False):
        model(**rows())
    with patch_model(model, fused=True, unpad=True):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(**rows())
        with torch.profiler.profile():
            model(**rows())
    assert not blocks


def test_checkpointing_and_second_derivatives(blocks):
    model = masked_lm("bert").train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    inputs = rows()
    with patch_model(model, fused=True, unpad=True):
        plain = torch.autograd.grad(model(**inputs).logits.sum(), list(model.bert.parameters())[:3])
        model.gradient_checkpointing_enable()
        again = torch.autograd.grad(model(**inputs).logits.sum(), list(model.bert.parameters())[:3])
        assert len(blocks) == 3 * model.config.num_hidden_layers
        for one, other in zip(plain, again, strict=True):
            assert torch.equal(one, other)
        model.gradient_checkpointing_disable()
        weight = model.bert.encoder.layer[0].output.dense.weight
        (first,) = torch.autograd.grad(model(**inputs).logits.sum(), weight, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            first.sum().backward()
