"""Tests that generation computes q, k and v, and gate and up, by one product each."""

import pytest
import torch

import lctrain
from lctrain.generation import joined_projections
from lctrain.generation.joined_projections import JoinedProjections
from lctrain.models import fused_modules
from lctrain.models.fused_modules import JOINED_WEIGHTS, projections

PROMPTS = [[5, 6, 7], list(range(40)), [9]]


@pytest.fixture
def room(monkeypatch):
    """Joins weights on a CPU too."""
    monkeypatch.setattr(joined_projections, "_have_room", lambda weights: True)


@pytest.fixture
def weights_of_products(monkeypatch):
    """Returns a list to which the number of weights of every call of merged_linear is added."""
    numbers = []
    merged = fused_modules.merged_linear

    def counted(x, *weights):
        numbers.append(len(weights))
        return merged(x, *weights)

    monkeypatch.setattr(fused_modules, "merged_linear", counted)
    return numbers


def joined_layers(model) -> list[str]:
    """Returns the names of the modules that have joined weights now."""
    return [name for name, module in model.named_modules() if JOINED_WEIGHTS in vars(module)]


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma2"])
def test_the_same_tokens_by_one_product_each(endless, room, weights_of_products, model_type):
    model = endless(model_type=model_type).double()
    options = {"max_new_tokens": 6, "temperature": 0, "batching": "continuous"}
    with lctrain.patch_model(model):
        expected = lctrain.generate(model, PROMPTS, **options)
    assert not weights_of_products
    with lctrain.patch_model(model, fused=True):
        found = lctrain.generate(model, PROMPTS, **options)
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]
    layers = len(model.model.layers)
    # A forward of one token finds the shape of the cache, before the weights are joined.
    assert weights_of_products[: 2 * layers] == [3, 2] * layers
    assert set(weights_of_products[2 * layers :]) == {1}
    assert len(weights_of_products) > 4 * layers
    assert joined_layers(model) == []


def test_the_weights_lie_one_below_the_other(endless, room):
    model = endless()
    with lctrain.patch_model(model, fused=True):
        joined = JoinedProjections(model)
        with joined.in_use():
            names = joined_layers(model)
            for name in names:
                module = model.get_submodule(name)
                expected = torch.cat([linear.weight for linear in projections(module)])
                assert torch.equal(vars(module)[JOINED_WEIGHTS], expected)
    layers = len(model.model.layers)
    assert len(names) == 2 * layers
    assert joined_layers(model) == []


def test_weights_are_cast_once_under_autocast(endless, room):
    model = endless()
    with lctrain.patch_model(model, fused=True), torch.autocast("cpu", torch.bfloat16):
        with JoinedProjections(model).in_use():
            joined = vars(model.model.layers[0].mlp)[JOINED_WEIGHTS]
        assert joined.dtype == torch.bfloat16


def test_observed_layers_are_left_out(endless, room):
    model = endless()
    model.model.layers[0].self_attn.k_proj.register_forward_hook(lambda *_: None)
    model.model.layers[1].mlp.up_proj.bias = torch.nn.Parameter(torch.zeros(1))
    with lctrain.patch_model(model, fused=True), JoinedProjections(model).in_use():
        names = joined_layers(model)
    assert "model.layers.0.self_attn" not in names
    assert "model.layers.0.mlp" in names
    assert "model.layers.1.mlp" not in names
    assert "model.layers.1.self_attn" in names


def test_an_error_ends_the_use(endless, room):
    model = endless()
    with lctrain.patch_model(model, fused=True):
        with pytest.raises(ZeroDivisionError), JoinedProjections(model).in_use():
            raise ZeroDivisionError
        assert joined_layers(model) == []


@pytest.mark.parametrize(
    ("free", "sets"), [(None, 0), (0, 0), (10**9, 2)], ids=["cpu", "full", "free"]
)
def test_copies_take_a_small_share_of_free_memory(endless, monkeypatch, free, sets):
    monkeypatch.setattr(joined_projections, "free_bytes", lambda device: free)
    model = endless()
    with lctrain.patch_model(model, fused=True), JoinedProjections(model).in_use():
        assert len(joined_layers(model)) == sets * len(model.model.layers)


def test_copies_count_in_the_dtype_of_products(endless, monkeypatch):
    model = endless()
    layers = model.model.layers
    rows = sum(p.weight.numel() for layer in layers for p in projections(layer.self_attn))
    free = int(2 * rows / joined_projections.SHARE)  # what copies in bfloat16 may take
    monkeypatch.setattr(joined_projections, "free_bytes", lambda device: free)
    for dtype, joined in ((torch.bfloat16, True), (None, False)):
        autocast = torch.autocast("cpu", dtype, enabled=dtype is not None)
        with lctrain.patch_model(model, fused=True), autocast, JoinedProjections(model).in_use():
            assert ("model.layers.0.self_attn" in joined_layers(model)) is joined


def test_a_model_without_fused_modules_has_none(patched, room):
    with JoinedProjections(patched).in_use():
        assert joined_layers(patched) == []
