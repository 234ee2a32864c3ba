"""Tests patched models on a StaticCache, for all attentions: the numbers of a full pass."""

import dataclasses

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import DynamicCache, StaticCache

from lctrain import patch_model
from lctrain.attention.forward import SPEC_ATTRIBUTE
from lctrain.models.architectures import attention_layers
from tests.models.attentions import ATTENTIONS, patched_model
from tests.numerics import assert_equal_in_float64

OPTIONS = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}


def padded_rows(length):
    tokens = torch.randint(3, 97, (2, length))
    mask = torch.ones_like(tokens)
    mask[1, : length // 3] = 0
    return tokens, mask


@pytest.mark.parametrize("length", [9, 30], ids=["few", "many"])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_generate_returns_the_tokens_of_a_dynamic_cache(make_llama, attention, length):
    tokens, mask = padded_rows(length)
    options = {"scale": "yarn", "window": 16} if attention == "dual_chunk" else {}
    with patched_model(make_llama(), attention, **options) as model:
        expected = model.generate(tokens, attention_mask=mask, **OPTIONS)
        static = {"attention_mask": mask, "cache_implementation": "static"}
        assert torch.equal(model.generate(tokens, **static, **OPTIONS), expected)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_parts_of_a_text_have_the_logits_of_a_full_pass(make_llama, attention):
    """Calls of 30, 20, 5 and 1 queries: by the kernels of packs, and by those of decoding."""
    tokens, mask = padded_rows(56)
    with patched_model(make_llama(), attention) as model, torch.no_grad():
        expected = model(tokens, attention_mask=mask, use_cache=False).logits
        cache, begin = StaticCache(config=model.config, max_cache_len=60), 0
        for end in (30, 50, 55, 56):
            part, seen = tokens[:, begin:end], mask[:, :end]
            found = model(part, attention_mask=seen, past_key_values=cache).logits
            real = mask[:, begin:end].bool()
            assert_equal_in_float64(found[real], expected[:, begin:end][real])
            begin = end


@pytest.mark.parametrize("attention", ["dual_chunk", "differential-1"])
def test_compiled_steps_do_not_recompile(make_llama, monkeypatch, attention):
    """On a GPU, generate() compiles the model for a StaticCache."""
    tokens, mask = padded_rows(20)
    torch._dynamo.reset()
    with patched_model(make_llama(num_hidden_layers=1), attention) as model:
        static = {"attention_mask": mask, "cache_implementation": "static"}
        expected = model.generate(tokens, **static, **OPTIONS)
        counter = CompileCounter()
        compiled = torch.compile(model.__call__, backend=counter, fullgraph=True)
        monkeypatch.setattr(model, "get_compiled_call", lambda _: compiled)
        monkeypatch.setattr(model, "_valid_auto_compile_criteria", lambda *_: True)
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert torch.equal(model.generate(tokens, **static, **OPTIONS), expected)
        assert counter.frame_count
    torch._dynamo.reset()


def test_dual_chunk_attention_takes_frequencies_that_depend_on_the_length(make_llama):
    """It uses those of short texts; flash attention is refused."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    tokens, mask = padded_rows(30)
    static = {"attention_mask": mask, "cache_implementation": "static"} | OPTIONS
    make = {"rope_parameters": rope, "max_position_embeddings": 16}
    with patched_model(make_llama(**make), "dual_chunk") as model:
        expected = model.generate(tokens, attention_mask=mask, **OPTIONS)
        assert torch.equal(model.generate(tokens, **static), expected)
    with (
        patched_model(make_llama(**make), "flash") as model,
        pytest.raises(ValueError, match="a cache of fixed size must come with RoPE frequencies"),
    ):
        model.generate(tokens, **static)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_padding_after_a_token_is_refused(make_llama, attention):
    tokens, mask = padded_rows(6)
    with (
        patched_model(make_llama(), attention) as model,
        pytest.raises(ValueError, match=r"padding must be on the left .* padding_side to 'left'"),
    ):
        model.generate(
            tokens, attention_mask=mask.flip(1), cache_implementation="static", **OPTIONS
        )


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_cache_that_does_not_fit_is_refused(make_llama, attention):
    tokens, _ = padded_rows(6)
    with patched_model(make_llama(), attention) as model, torch.no_grad():
        cache = StaticCache(config=model.config, max_cache_len=8)
        with pytest.raises(ValueError, match=r"must hold the 9 tokens .* StaticCache of 8.*max_c"):
            model(torch.cat((tokens, tokens[:, :3]), 1), past_key_values=cache)
        model(tokens, past_key_values=cache)
        with pytest.raises(ValueError, match=r"row of the input \(1\), got .* 2 rows.*new cache"):
            model(tokens[:1, :1], past_key_values=cache)
        for _ in range(2):
            model(tokens[:, :1], past_key_values=cache)
        with pytest.raises(ValueError, match="must hold the 9 tokens"):
            model(tokens[:, :1], past_key_values=cache)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_hopper_kernels_have_no_cache(make_llama, attention):
    tokens, _ = padded_rows(20)
    with patched_model(make_llama(), attention) as model:
        for layer in attention_layers(model).values():
            spec = dataclasses.replace(getattr(layer, SPEC_ATTRIBUTE), backend="hopper")
            setattr(layer, SPEC_ATTRIBUTE, spec)
        with pytest.raises(ValueError, match=r"got one of fixed size. Use a DynamicCache"):
            model.generate(tokens, cache_implementation="static", **OPTIONS)


def test_a_dynamic_cache_has_room(make_llama):
    with patch_model(model := make_llama()), torch.no_grad():
        cache = DynamicCache(config=model.config)
        for _ in range(3):
            model(torch.tensor([[3, 4]]), past_key_values=cache)
    assert cache.get_seq_length() == 6
