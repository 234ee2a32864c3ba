"""Tests the methods that read beyond the trained window: they change a model and restore it."""

import copy
import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lctrain.attention import is_patched
from lctrain.eval import METHODS, Extension, check_methods, trained_window
from lctrain.models import patch_model
from tests.float64 import float64_throughout
from tests.numerics import assert_error_at_most_twice, assert_far_apart, near, near_roundings

WINDOW = 16
ROTARY = ("linear", "ntk", "yarn")


@pytest.fixture
def model(make_llama):
    """A model with large attention logits, so that positions have an effect."""
    model = make_llama(max_position_embeddings=WINDOW)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight *= 50
            layer.self_attn.o_proj.weight *= 50
    return model


def logits(model, tokens: int = 64) -> torch.Tensor:
    ids = torch.arange(tokens)[None] * 7 % 97
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def enter(extension, model) -> None:
    with extension.patched(model):
        pass


@pytest.mark.parametrize("method", METHODS)
def test_at_the_window_and_below_every_method_is_plain(model, method):
    before = logits(model, WINDOW)
    with float64_throughout():
        exact = logits(copy.deepcopy(model).double(), WINDOW)
    extension = Extension(method, WINDOW)
    with extension.patched(model), extension.at(model, WINDOW):
        assert is_patched(model)
        assert_error_at_most_twice(logits(model, WINDOW), before, exact)


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("plain", "intra_chunk")])
def test_beyond_the_window_a_method_changes_outputs_and_gives_them_back_bit_equal(model, method):
    before = logits(model)
    extension = Extension(method, WINDOW)
    with extension.patched(model), extension.at(model, 64):
        assert_far_apart(logits(model), before)
    assert not is_patched(model)
    assert logits(model).equal(before)


def test_an_error_inside_gives_the_model_back(model):
    before = logits(model)
    extension = Extension("yarn", WINDOW)
    with pytest.raises(KeyError), extension.patched(model), extension.at(model, 64):
        raise KeyError
    assert logits(model).equal(before)


def test_linear_divides_positions(model):
    before = model.model.rotary_emb.inv_freq.clone()
    with Extension("linear", WINDOW).at(model, 64):
        assert torch.equal(model.model.rotary_emb.inv_freq, before / 4)
        assert model.model.rotary_emb.attention_scaling == 1.0


def test_ntk_scales_the_base(model):
    """The fastest frequency stays; the slowest is divided by the factor."""
    before = model.model.rotary_emb.inv_freq.clone()
    with Extension("ntk", WINDOW).at(model, 64):
        after = model.model.rotary_emb.inv_freq
        assert after[0] == before[0]
        # A power's error is that of its base and exponent, the latter times log(base) < 12.
        assert after[-1].item() == near_roundings(before[-1].item() / 4, 16)
        base = 10000.0 * 4 ** (8 / 6)
        assert after.tolist() == near_roundings([base ** -(i / 8) for i in range(0, 8, 2)], 16)


def test_yarn_is_that_of_transformers(model):
    config = type(model.config)(
        **model.config.to_dict()
        | {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": WINDOW,
            }
        }
    )
    expected, scaling = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    with Extension("yarn", WINDOW).at(model, 64):
        assert model.model.rotary_emb.inv_freq.equal(expected)
        assert model.model.rotary_emb.attention_scaling == scaling
    assert scaling == near(0.1 * math.log(4) + 1)


def test_the_window_may_be_another_than_the_configs(model):
    before = model.model.rotary_emb.inv_freq.clone()
    with Extension("linear", 32).at(model, 64):
        assert torch.equal(model.model.rotary_emb.inv_freq, before / 2)
    assert trained_window(model, None) == WINDOW
    assert trained_window(model, 32) == 32


def test_the_window_of_a_published_config_is_the_one_that_dual_chunk_attention_takes(make_llama):
    """Qwen2.5-1M states its trained window among its options of dual chunk attention."""
    published = {"chunk_size": 16, "local_size": 2, "original_max_position_embeddings": WINDOW}
    model = make_llama(max_position_embeddings=62, dual_chunk_attention_config=published)
    assert trained_window(model, None) == WINDOW
    assert trained_window(model, 32) == 32
    with patch_model(model, "dual_chunk") as handle:
        assert handle.spec.window == WINDOW


def test_options_reach_the_attention(model):
    for options in ({"chunk_size": 0}, {"backend": "abacus"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            enter(Extension("dual_chunk", WINDOW, options), model)


def test_unknown_methods_are_an_error():
    with pytest.raises(ValueError, match=r"methods must be among plain, .*, got 'pose'. Check"):
        check_methods(["plain", "pose"])
    assert check_methods(["yarn", "plain", "yarn"]) == ("yarn", "plain")


@pytest.mark.parametrize("method", ROTARY)
def test_a_model_without_rope_is_an_error(method):
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=97))
    with pytest.raises(ValueError, match=rf"must not name {method} for GPT2LMHeadModel.*Leave it"):
        enter(Extension(method, WINDOW), model)


def test_a_model_whose_rope_is_scaled_already_is_an_error(make_llama):
    scaled = make_llama(
        rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    )
    with pytest.raises(ValueError, match=r"type 'linear' already. Compare plain and dual_chunk"):
        enter(Extension("ntk", WINDOW), scaled)


@pytest.mark.parametrize("window", [0, 1])
def test_a_window_that_is_none_is_an_error(model, window):
    with pytest.raises(ValueError, match=f"window must be at least 2, got {window}"):
        trained_window(model, window)
    with pytest.raises(ValueError, match=f"window must be at least 2, got {window}"):
        Extension("plain", window)


def test_a_model_that_does_not_say_its_window_is_an_error(model):
    model.config = type("Config", (), {})()
    with pytest.raises(ValueError, match=r"window must be given .* Give its config max_pos"):
        trained_window(model, None)
