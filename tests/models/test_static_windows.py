"""Tests windows on a StaticCache, whose layers keep the keys of a window only."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import (
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    MistralConfig,
    MistralForCausalLM,
    StaticCache,
)

from lctrain import patch_model
from tests.models.attentions import patched_model
from tests.numerics import assert_equal_in_float64

OPTIONS = {"do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
WINDOW = 8
MODELS = {
    "mistral": (MistralForCausalLM, MistralConfig, {}),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config, {"query_pre_attn_scalar": 8}),
    "gemma3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        {"layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
}
"""One model with windows in all layers, and two with windows in every second one."""


def make_model(name):
    model_class, config_class, options = MODELS[name]
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 4}
    torch.manual_seed(0)
    model = model_class(config_class(**sizes, **heads, sliding_window=WINDOW, **options))
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.3)
    return model.double().eval()


def rows(length, padding=0):
    tokens = torch.randint(3, 97, (2, length))
    mask = torch.ones_like(tokens)
    mask[1, :padding] = 0
    return tokens, mask


def static(mask, new_tokens):
    given = {"attention_mask": mask, "max_new_tokens": new_tokens}
    return OPTIONS | given | {"cache_implementation": "static"}


@pytest.mark.parametrize("new_tokens", [1, 12])
@pytest.mark.parametrize("length", [1, 6, WINDOW, 9, 20])
@pytest.mark.parametrize("name", MODELS)
def test_generate_returns_the_tokens_of_transformers(name, length, new_tokens):
    """Prompts below, at and beyond the window, and windows that fill while tokens are made."""
    model, (tokens, mask) = make_model(name), rows(length)
    expected = model.generate(tokens, **static(mask, new_tokens))
    with patch_model(model):
        assert torch.equal(model.generate(tokens, **static(mask, new_tokens)), expected)


@pytest.mark.parametrize("length", [6, WINDOW, 9, 20])
@pytest.mark.parametrize(
    ("name", "attention"), [*((name, "flash") for name in MODELS), ("mistral", "differential-2")]
)
def test_padded_rows_have_the_tokens_of_a_dynamic_cache(name, attention, length):
    tokens, mask = rows(length, padding=length // 3)
    with patched_model(make_model(name), attention) as model:
        dynamic = OPTIONS | {"attention_mask": mask, "max_new_tokens": 12}
        expected = model.generate(tokens, **dynamic)
        assert torch.equal(model.generate(tokens, **static(mask, 12)), expected)


@pytest.mark.parametrize("chunk", [3, WINDOW, 11])
@pytest.mark.parametrize("name", MODELS)
def test_prompts_in_pieces_have_the_tokens_of_a_whole_one(name, chunk):
    """Each piece is several queries over windows that are not full, become full, or are full."""
    tokens, mask = rows(30, padding=4)
    with patch_model(model := make_model(name)):
        expected = model.generate(tokens, **static(mask, 4))
        pieces = static(mask, 4) | {"prefill_chunk_size": chunk}
        assert torch.equal(model.generate(tokens, **pieces), expected)


@pytest.mark.parametrize("ends", [(30, 50, 55, 56), (3, 5, 7, 8, 9, 20), (8, 16, 17)], ids=str)
@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("name", MODELS)
def test_parts_of_a_text_have_the_logits_of_a_full_pass(name, padding, ends):
    """Masks are made inside the model here; generate() makes them before."""
    tokens, mask = rows(ends[-1], padding)
    with patch_model(model := make_model(name)), torch.no_grad():
        expected = model(tokens, attention_mask=mask, use_cache=False).logits
        for cache in (
            StaticCache(config=model.config, max_cache_len=60),
            DynamicCache(config=model.config),
        ):
            begin = 0
            for end in ends:
                part, seen = tokens[:, begin:end], mask[:, :end] if padding else None
                found = model(part, attention_mask=seen, past_key_values=cache).logits
                real = mask[:, begin:end].bool()
                assert_equal_in_float64(found[real], expected[:, begin:end][real])
                begin = end


@pytest.mark.parametrize("length", [4, 20], ids=["fills", "full"])
@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_steps_compile_as_often_as_those_of_transformers(name, length, monkeypatch):
    """A window that becomes full changes the graph of transformers' cache, once."""
    tokens, mask = rows(length, padding=length // 3)
    model = make_model(name)

    def generate():
        torch._dynamo.reset()
        counter = CompileCounter()
        compiled = torch.compile(model.__call__, backend=counter, fullgraph=True)
        monkeypatch.setattr(model, "get_compiled_call", lambda _: compiled)
        return model.generate(tokens, **static(mask, 10)), counter.frame_count

    with patch_model(model):
        expected = model.generate(tokens, **static(mask, 10))
    monkeypatch.setattr(model, "_valid_auto_compile_criteria", lambda *_: True)
    _, theirs = generate()
    with patch_model(model):
        found, ours = generate()
    torch._dynamo.reset()
    assert torch.equal(found, expected)
    assert 0 < ours <= theirs


@pytest.mark.parametrize("length", [6, 20])
@pytest.mark.parametrize("name", MODELS)
def test_padding_after_a_token_is_refused_before_a_token(name, length):
    tokens, mask = rows(length, padding=2)
    made = []
    with patch_model(model := make_model(name)):
        model.register_forward_hook(lambda *_: made.append(1))
        with pytest.raises(ValueError, match=r"padding must be on the left .* padding_side to 'le"):
            model.generate(tokens, **static(mask.flip(1), 3))
    assert not made


@pytest.mark.parametrize("name", MODELS)
def test_a_cache_shorter_than_the_window_is_refused_when_it_is_full(name):
    """transformers would forget keys that the window holds."""
    tokens, _ = rows(6)
    with patch_model(model := make_model(name)), torch.no_grad():
        cache = StaticCache(config=model.config, max_cache_len=WINDOW - 1)
        model(tokens, past_key_values=cache)
        model(tokens[:, :1], past_key_values=cache)
        with pytest.raises(ValueError, match=r"must hold the 8 tokens .* StaticCache of 7.*max_c"):
            model(tokens[:, :1], past_key_values=cache)
        with pytest.raises(ValueError, match=r"row of the input \(1\), got .* 2 rows.*new cache"):
            model(tokens[:1, :1], past_key_values=cache)


def test_windows_alone_are_never_full():
    tokens, _ = rows(30)
    with patch_model(model := make_model("mistral")), torch.no_grad():
        expected = model(tokens, use_cache=False).logits
        cache = StaticCache(config=model.config, max_cache_len=WINDOW)
        model(tokens[:, :20], past_key_values=cache)
        for token in range(20, 30):
            found = model(tokens[:, token : token + 1], past_key_values=cache).logits
            assert_equal_in_float64(found[:, 0], expected[:, token])
