"""Compares the largest attention logit with the inputs of each layer's attention function."""

import numpy as np
import pytest
import torch
from transformers import (
    DiffLlamaConfig,
    DiffLlamaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lctrain.models import patch_model
from lctrain.recipes.differential import largest_logit as subject
from lctrain.recipes.differential.largest_logit import largest_logit, largest_product, recording
from tests.numerics import near_roundings

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.5,
}
DOCUMENTS = [np.arange(n) * 7 % 50 for n in (5, 23, 40)]


def models():
    torch.manual_seed(0)
    return {
        "plain": LlamaForCausalLM(LlamaConfig(**SIZES)),
        "v1": DiffLlamaForCausalLM(DiffLlamaConfig(**SIZES)),
    }


def seen_by_the_attention_function(model):
    """Computes the largest logit from the queries and keys of the attention function's calls.

    Returns:
        The largest logit of each layer, and the float32 roundings allowed in it. Roundings: 8 for
        a product over a head dim of 8, and 4 for each factor (itself, and its rotation of two
        terms). They are relative to the product of the factors' norms.
    """
    largest, norms = {}, {}

    def spy(module, query, key, value, attention_mask, scaling, **kwargs):
        keys = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        logits = scaling * query.double() @ keys.double().transpose(2, 3)
        found = logits.tril().abs().max().item()
        largest[module.layer_idx] = max(largest.get(module.layer_idx, 0.0), found)
        norm = scaling * query.double().norm(dim=-1).max() * keys.double().norm(dim=-1).max()
        norms[module.layer_idx] = max(norms.get(module.layer_idx, 0.0), norm.item())
        return eager(module, query, key, value, attention_mask, scaling=scaling, **kwargs)

    eager = ALL_ATTENTION_FUNCTIONS["sdpa"]
    ALL_ATTENTION_FUNCTIONS.register("spy", spy)
    model.set_attn_implementation("spy")
    with torch.no_grad():
        for document in DOCUMENTS:
            model.eval()(input_ids=torch.from_numpy(document)[None], use_cache=False)
    model.set_attn_implementation("sdpa")
    roundings = [2 * (8 + 4 + 4) * norms[i] / largest[i] for i in largest]
    return list(largest.values()), max(roundings)


@pytest.mark.parametrize("kind", ["plain", "v1"])
@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.usefixtures("in_float64")
def test_it_is_what_the_softmax_is_given(kind, patched, monkeypatch):
    monkeypatch.setattr(subject, "CHUNK", 16)
    model = models()[kind]
    expected, roundings = seen_by_the_attention_function(model)
    handle = patch_model(model) if patched else None
    found = largest_logit(model, DOCUMENTS, "cpu")
    if handle is not None:
        handle.unpatch()
    assert list(found) == [f"model.layers.{layer}.self_attn" for layer in range(2)]
    assert list(found.values()) == near_roundings(expected, roundings)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.usefixtures("in_float64")
def test_a_large_key_is_found():
    model = models()["plain"]
    _, roundings = seen_by_the_attention_function(model)
    before = largest_logit(model, DOCUMENTS, "cpu")
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight *= 3.0
    after = largest_logit(model, DOCUMENTS, "cpu")
    first, second = before
    assert after[first] == before[first]
    assert after[second] == near_roundings(3.0 * before[second], 2 * roundings)


def test_products_are_not_rounded_under_autocast():
    torch.manual_seed(0)
    queries, keys = torch.randn(4, 20, 8), torch.randn(2, 20, 8)
    expected = largest_product(queries, keys)
    with torch.autocast("cpu", torch.bfloat16):
        assert largest_product(queries, keys) == expected


def test_rows_come_one_at_a_time():
    model = models()["plain"]
    with (
        recording(model, {}),
        pytest.raises(ValueError, match=r"rows must be one at a time, got 2. Call the model once"),
    ):
        model(input_ids=torch.zeros(2, 4, dtype=torch.int64))


def test_other_attention_is_refused():
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=50))
    with pytest.raises(ValueError, match=r"must have attention layers with q_proj and k_proj, got"):
        largest_logit(model, DOCUMENTS, "cpu")
