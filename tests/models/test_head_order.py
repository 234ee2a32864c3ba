"""Tests convert_head_order, which reorders the query heads of differential attention.

transformers pairs heads (h, h + H / 2), microsoft/unilm pairs heads (2 h, 2 h + 1).
"""

import math

import pytest
import torch

from lctrain.models import patch_model
from lctrain.models.differential import convert_head_order
from tests.models.differential_families import V1, make_differential
from tests.models.families import make_documents, outputs
from tests.numerics import assert_equal_in_float64, assert_far_apart

DIRECTIONS = [("transformers", "unilm"), ("unilm", "transformers")]


def unilm_attention(weights, states, layer_idx, head_dim):
    """Computes multihead_flashdiff_1 of microsoft/unilm without rotation: [S, E] -> [S, E]."""
    tokens = states.shape[0]
    query = (states @ weights["q_proj.weight"].T).view(tokens, -1, 2, head_dim)
    key = (states @ weights["k_proj.weight"].T).view(tokens, -1, 2, head_dim)
    value = (states @ weights["v_proj.weight"].T).view(tokens, -1, 2 * head_dim)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    lambda_init = 0.8 - 0.6 * math.exp(-0.3 * layer_idx)
    lam = lambda_init
    for branch, sign in ((1, 1), (2, -1)):
        product = weights[f"lambda_q{branch}"] @ weights[f"lambda_k{branch}"]
        lam = lam + sign * product.exp()
    hidden = torch.ones(tokens, tokens).triu(1).bool()
    logits = torch.einsum("qhbd,khbd->hbqk", query, key) / head_dim**0.5
    weight = logits.masked_fill(hidden, -math.inf).softmax(-1)
    out = torch.einsum("hqk,khd->qhd", weight[:, 0] - lam * weight[:, 1], value)
    out = out / (out.square().mean(-1, keepdim=True) + 1e-5).sqrt() * (1 - lambda_init)
    return out.flatten(1) @ weights["o_proj.weight"].T


@pytest.mark.parametrize("family", V1)
@pytest.mark.usefixtures("in_float64")
def test_both_orders_compute_one_function(family):
    model = make_differential(family).double()
    states = torch.randn(9, 32, generator=torch.Generator().manual_seed(0)).double()
    cos, sin = torch.ones(1, 9, 8).double(), torch.zeros(1, 9, 8).double()  # no rotation
    converted = convert_head_order(model.state_dict(), source="transformers", target="unilm")
    hidden = torch.full((9, 9), -math.inf).triu(1).double()[None, None]
    for index, layer in enumerate(model.model.layers):
        prefix = f"model.layers.{index}.self_attn."
        weights = {
            name.removeprefix(prefix): weight
            for name, weight in converted.items()
            if name.startswith(prefix)
        }
        expected = unilm_attention(weights, states, index, 8)
        found = layer.self_attn(states[None], (cos, sin), hidden)[0][0]
        assert_equal_in_float64(found, expected)
    assert not torch.equal(weights["q_proj.weight"], layer.self_attn.q_proj.weight)


@pytest.mark.parametrize(("source", "target"), DIRECTIONS)
@pytest.mark.parametrize("family", V1)
def test_there_and_back_is_the_identity(family, source, target):
    state = make_differential(family, attention_bias=True).state_dict()
    there = convert_head_order(state, source=source, target=target)
    back = convert_head_order(there, source=target, target=source)
    assert list(there) == list(back) == list(state)
    assert all(torch.equal(back[name], weight) for name, weight in state.items())
    changed = {name.split(".")[-2] for name in state if not torch.equal(there[name], state[name])}
    assert changed == {"q_proj", "k_proj", "v_proj"}


def test_one_order_twice_changes_nothing():
    state = make_differential("diffllama").state_dict()
    same = convert_head_order(state, source="unilm", target="unilm")
    assert same is not state
    assert all(same[name] is weight for name, weight in state.items())


def test_heads_of_a_single_layer_by_number():
    rows = torch.arange(8.0).repeat_interleave(2)[:, None]
    state = {"q_proj.weight": rows, "lambda_q1": torch.zeros(2), "o_proj.weight": rows}
    there = convert_head_order(state, source="transformers", target="unilm")
    assert there["q_proj.weight"][::2, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert there["o_proj.weight"] is rows
    back = convert_head_order(state, source="unilm", target="transformers")
    assert back["q_proj.weight"][::2, 0].tolist() == [0, 2, 4, 6, 1, 3, 5, 7]


@pytest.mark.parametrize("family", V1)
@pytest.mark.usefixtures("in_float64")
def test_a_model_is_changed_in_place(family):
    model, rows = make_differential(family), make_documents([9])[0][None]
    before = outputs(model, input_ids=rows)
    assert convert_head_order(model, source="transformers", target="unilm") is model
    assert_far_apart(outputs(model, input_ids=rows), before)
    convert_head_order(model, source="unilm", target="transformers")
    assert torch.equal(outputs(model, input_ids=rows), before)
    with patch_model(model, attention="differential"):
        convert_head_order(model, source="transformers", target="transformers")
        assert_equal_in_float64(outputs(model, input_ids=rows), before)


@pytest.mark.parametrize(
    ("state", "orders", "message"),
    [
        ({}, ("hf", "unilm"), "source must be one of 'transformers', 'unilm', got 'hf'. 'transf"),
        ({}, ("unilm", "hf"), "target must be one of 'transformers', 'unilm', got 'hf'"),
        ({}, DIRECTIONS[0], "must hold layers of differential attention .*, got none with lambda"),
        (
            {"a.lambda_q1": torch.zeros(4), "a.k_proj.weight": torch.zeros(12, 8)},
            DIRECTIONS[0],
            "a.k_proj.weight must have an even number of heads of 4, got 12 rows",
        ),
    ],
)
def test_what_cannot_be_converted(state, orders, message):
    with pytest.raises(ValueError, match=message):
        convert_head_order(state, source=orders[0], target=orders[1])
