"""Tests transformers' continuous batching on patched models: the tokens of generate()."""

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from lctrain import patch_model
from lctrain.attention import paged
from lctrain.models.registration import register

OPTIONS = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
PROMPTS = [[5, 6, 7, 8], [9, 10, 11, 12, 13, 14, 15], [3]]


@pytest.fixture
def batching():
    return ContinuousBatchingConfig(
        num_blocks=16, max_batch_tokens=64, max_blocks_per_request=2, use_async_batching=False
    )


def generated(model, batching) -> list:
    found = model.generate_batch(
        PROMPTS,
        generation_config=GenerationConfig(**OPTIONS),
        continuous_batching_config=batching,
        warmup=False,
    )
    results = sorted(found.values(), key=lambda result: int(result.request_id.split("_")[1]))
    return [(result.generated_tokens, result.error) for result in results]


@pytest.mark.parametrize("table", [True, False], ids=["block_table", "gathered"])
def test_requests_get_the_tokens_of_generate(make_llama, batching, monkeypatch, table):
    model = make_llama()
    expected = [
        (model.generate(torch.tensor([prompt]), **OPTIONS)[0, len(prompt) :].tolist(), None)
        for prompt in PROMPTS
    ]
    batching.max_blocks_per_request = 2 if table else 0
    tables = []
    attend = paged.attend_paged

    def recorded(module, query, key, value, arguments, options):
        tables.append(arguments.get("block_table") is not None)
        return attend(module, query, key, value, arguments, options)

    monkeypatch.setattr("lctrain.attention.flash.attend_paged", recorded)
    with patch_model(model):
        assert generated(model, batching) == expected
    assert any(tables) == table
    assert not all(tables)


def test_dual_chunk_attention_says_that_it_cannot(make_llama, batching):
    model = make_llama()
    with (
        patch_model(model, attention="dual_chunk", chunk_size=32, local_size=8),
        pytest.raises(ValueError, match="lctrain_dual_chunk is not supported for continuous"),
    ):
        generated(model, batching)


@pytest.mark.parametrize(
    ("implementation", "by_length"), [("lctrain_dual_chunk", False), ("lctrain_flash", True)]
)
def test_a_paged_cache_needs_flash_attention(implementation, by_length):
    class PagedAttentionCache:
        pass

    inputs = {"cache": PagedAttentionCache()}
    with pytest.raises(ValueError, match="continuous batching must come with attention='flash'"):
        paged.layers_read_cache(torch.nn.Linear(1, 1), inputs, implementation, by_length)
    assert not paged.layers_read_cache(torch.nn.Linear(1, 1), {}, implementation, by_length)


def test_values_of_another_width_are_refused(make_llama):
    key, value = torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 4)
    with pytest.raises(ValueError, match="values of the keys' head dim, got 4 and 8"):
        paged.attend_paged(make_llama(), key, key, value, {}, {})


def test_other_attentions_get_no_block_tables(make_llama):
    from transformers.generation.continuous_batching import initialization

    register()
    config = make_llama().config
    for name, blocks in (("lctrain_flash", 4), ("sdpa", 0)):
        config._attn_implementation = name
        batching = ContinuousBatchingConfig(max_blocks_per_request=4)
        initialization.ensure_decode_fast_path_is_available(config, batching, False)
        assert batching.max_blocks_per_request == blocks
