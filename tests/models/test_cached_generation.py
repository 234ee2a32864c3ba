"""Tests generation of patched models on filled caches, which the decode kernels read."""

import pytest
import torch
from transformers import DiffLlamaConfig, DiffLlamaForCausalLM, DynamicCache, StaticCache

from lctrain import patch_model
from lctrain.attention import flash
from lctrain.attention.cached import cached_rows
from lctrain.models.batching import require_batching
from lctrain.models.differential import to_differential
from tests.numerics import assert_equal_in_float64, assert_error_at_most_twice

OPTIONS = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}


@pytest.fixture
def calls(monkeypatch):
    """Counts the calls that the decode kernels compute."""
    counted = []
    attend = flash.attend_cached

    def count(*arguments):
        counted.append(arguments)
        return attend(*arguments)

    monkeypatch.setattr(flash, "attend_cached", count)
    return counted


@pytest.mark.parametrize("window", [None, 6], ids=["full", "window"])
@pytest.mark.parametrize("padded", [False, True], ids=["rows", "padded"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_returns_the_tokens_of_transformers(make_llama, calls, cache, padded, window):
    model, tokens = make_llama(), torch.randint(3, 97, (2, 9))
    mask = torch.ones_like(tokens)
    mask[1, :4] = 1 - padded
    options = OPTIONS | {"attention_mask": mask}
    if cache == "static":
        options["cache_implementation"] = "static"
    with patch_model(model, sliding_window=window):
        found = model.generate(tokens, **options)
    # Two layers; the first of five calls fills a DynamicCache, and is computed as a pack.
    assert len(calls) == 2 * (4 if cache == "dynamic" else 5)
    if window is None:
        assert torch.equal(found, model.generate(tokens, **options))
    else:
        calls.clear()
        with patch_model(model, sliding_window=window):
            logits = model(found[:, :-1], attention_mask=torch.cat((mask, mask[:, :4] | 1), 1))
        assert torch.equal(logits.logits[:, 8:].argmax(-1), found[:, 9:])
        assert not calls


@pytest.mark.parametrize("attention", ["flash", "dual_chunk", "differential"])
@pytest.mark.parametrize("cache", ["dynamic", "static", "paged"])
def test_a_window_that_the_layers_do_not_know_is_refused(make_llama, attention, cache):
    """transformers would forget keys to which the layers attend, without an error."""
    model, tokens = make_llama(), torch.randint(3, 97, (1, 9))
    if attention == "differential":
        model = DiffLlamaForCausalLM(DiffLlamaConfig(**model.config.to_diff_dict())).eval()
    model.config.sliding_window = 4

    def generate():
        if cache == "paged":
            return require_batching(model)
        return model.generate(
            tokens, cache_implementation=cache if cache == "static" else None, **OPTIONS
        )

    message = (
        rf"sliding_window must be None in the config of {type(model).__name__}, got 4: its layers "
        r"attend to all keys.* Set model.config.sliding_window = None before you generate"
    )
    with patch_model(model, attention=attention):
        with pytest.raises(ValueError, match=message):
            generate()
        assert model(tokens, use_cache=False).logits.isfinite().all()
        model.config.sliding_window = None
        generate()


def test_several_queries_and_padding_between_tokens(make_llama, calls):
    """Padding between tokens is computed as before, without the decode kernels."""
    model, tokens = make_llama(), torch.randint(3, 97, (2, 12))
    for hole, expected in ((slice(0, 3), 2), (slice(2, 5), 0)):
        mask = torch.ones_like(tokens)
        mask[1, hole] = 0

        def continued(model, mask=mask):
            cache = DynamicCache(config=model.config)
            model(tokens[:, :8], mask[:, :8], past_key_values=cache)
            return model(tokens[:, 8:], mask, past_key_values=cache).logits

        with torch.no_grad():
            plain, exact = continued(model), continued(make_llama().double())
            calls.clear()
            with patch_model(model):
                found = continued(model)
        assert len(calls) == expected
        assert_error_at_most_twice(found, plain, exact)


def test_a_step_on_a_static_cache_compiles_to_one_graph(make_llama):
    """transformers gives the layers the ranges of the rows instead of a mask."""
    model, tokens = make_llama(), torch.randint(3, 97, (2, 9))
    torch._dynamo.reset()

    def steps(forward):
        cache = StaticCache(config=model.config, max_cache_len=16)
        logits = [model(tokens, past_key_values=cache).logits[:, -1]]
        for length in (10, 11):
            options = {
                "attention_mask": cached_rows(None, 2, length, "cpu"),
                "position_ids": torch.full((2, 1), length - 1),
            }
            token = logits[-1].argmax(-1)[:, None]
            logits.append(forward(token, past_key_values=cache, **options).logits[:, -1])
        return torch.stack(logits)

    with patch_model(model), torch.no_grad():
        compiled = torch.compile(model.forward, backend="aot_eager", fullgraph=True)
        assert torch.equal(steps(compiled), steps(model))


@pytest.mark.parametrize("attention", ["dual_chunk", "differential-1", "differential-2"])
def test_steps_of_other_attentions_read_the_cache(attention, make_llama, monkeypatch):
    """A step computes the logits of a full pass, by the decode kernels of its attention."""
    import lctrain_kernels

    name = "dual_chunk_attn_with_kvcache" if attention == "dual_chunk" else "diff_attn_with_kvcache"
    decode, counted = getattr(lctrain_kernels, name), []

    def count(*arguments, **options):
        counted.append(options.get("halves"))
        return decode(*arguments, **options)

    monkeypatch.setattr(lctrain_kernels, name, count)
    if attention == "differential-1":
        model = DiffLlamaForCausalLM(DiffLlamaConfig(**make_llama().config.to_diff_dict())).eval()
    else:
        model = make_llama()
        model = to_differential(model).eval() if attention == "differential-2" else model
    options = {"window": 24} if attention == "dual_chunk" else {}
    model, tokens = model.double(), torch.randint(3, 97, (2, 60))
    mask = torch.ones_like(tokens)
    mask[1, :7] = 0
    with patch_model(model, attention=attention.partition("-")[0], **options), torch.no_grad():
        expected = model(tokens, attention_mask=mask, use_cache=False).logits
        assert not counted
        cache = model(tokens[:, :50], attention_mask=mask[:, :50], use_cache=True).past_key_values
        for begin, end in ((50, 51), (51, 55), (55, 56)):
            found = model(
                tokens[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache
            ).logits
            assert_equal_in_float64(found, expected[:, begin:end])
    assert len(counted) == 3 * model.config.num_hidden_layers
    assert set(counted) <= {None, attention == "differential-1"}
