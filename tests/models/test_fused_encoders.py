"""Tests the fused modules of encoders, which serve GPUs only; here they run on the CPU."""

import pytest
import torch
from transformers.models.auto import modeling_auto

from lctrain.kernels import fused_add_layer_norm
from lctrain.models import fused_encoders, patch_model
from tests.models.families import gradients, make_documents, padded
from tests.models.tiny import tiny_config, tiny_model
from tests.numerics import assert_equal_in_float64

SWAPPED = {
    "bert": {"LayerNorm", "BertSelfOutput", "BertOutput", "BertIntermediate", "BertLayer"},
    "roberta": {
        "LayerNorm",
        "RobertaSelfOutput",
        "RobertaOutput",
        "RobertaIntermediate",
        "RobertaLayer",
    },
    "electra": {
        "LayerNorm",
        "ElectraSelfOutput",
        "ElectraOutput",
        "ElectraIntermediate",
        "ElectraLayer",
    },
    "modernbert": {"LayerNorm", "ModernBertAttention", "ModernBertMLP", "ModernBertEncoderLayer"},
}


def masked_lm(family):
    mapping = modeling_auto.AutoModelForMaskedLM._model_mapping
    return tiny_model(family, mapping[type(tiny_config(family))])


@pytest.mark.parametrize("served", [True, False], ids=["kernels", "own_classes"])
@pytest.mark.parametrize("family", SWAPPED)
@pytest.mark.usefixtures("in_float64")
def test_results_and_gradients_are_those_of_the_own_classes(family, served, monkeypatch):
    if served:
        monkeypatch.setattr(fused_encoders, "SERVED", frozenset({"cpu"}))
    model = masked_lm(family)
    tokens, mask = padded(make_documents(), "right")
    real = mask.bool()[..., None]
    calls = []
    own = fused_encoders.layer_norm
    monkeypatch.setattr(fused_encoders, "layer_norm", lambda *a: calls.append(0) or own(*a))

    def forward():
        return model(tokens, attention_mask=mask).logits * real

    expected, reference = gradients(model, forward)
    with patch_model(model, fused=True) as handle:
        swapped = {own.__name__ for _, own, _ in handle.fused.swapped}
        assert swapped - {"RMSNorm"} == SWAPPED[family]
        found, changed = gradients(model, forward)
    assert bool(calls) == served
    assert_equal_in_float64(found, expected)
    assert changed.keys() == reference.keys()
    for name, gradient in changed.items():
        assert_equal_in_float64(gradient, reference[name])
    assert torch.equal(forward(), expected)


def test_gradient_checkpointing_recomputes_fused_layers(monkeypatch):
    monkeypatch.setattr(fused_encoders, "SERVED", frozenset({"cpu"}))
    model = masked_lm("modernbert").train()
    model.gradient_checkpointing_enable()
    calls = []
    model.model.layers[1].mlp.Wi.register_forward_hook(lambda *_: calls.append(0))
    with patch_model(model, fused=True):
        tokens = make_documents([9])[0][None]
        model(tokens).logits.sum().backward()
    assert len(calls) == 2


def test_only_exact_gelu_is_fused():
    tanh = torch.nn.GELU(approximate="tanh")
    assert not fused_encoders.is_gelu(tanh)
    assert fused_encoders.is_gelu(torch.nn.GELU())
    assert not fused_encoders.is_gelu(torch.nn.functional.relu)


def test_bad_residuals():
    x, weight = torch.zeros(2, 4), torch.ones(4)
    with pytest.raises(ValueError, match=r"residual must be torch.float32 of shape \(2, 4\), got"):
        fused_add_layer_norm(x, x[:1], weight)
    with pytest.raises(ValueError, match="bias must have the shape and dtype of weight"):
        fused_add_layer_norm(x, x, weight, weight[:2])
