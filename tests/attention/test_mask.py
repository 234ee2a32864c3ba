"""Compares the mask function of lctrain's attentions with transformers' dense masks."""

from functools import partial

import pytest
import torch
from transformers import DynamicCache, LlamaConfig
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    chunked_causal_mask_function,
    create_bidirectional_mask,
    create_causal_mask,
    create_sliding_window_causal_mask,
    sliding_window_causal_mask_function,
)

from lctrain.attention.mask import flash_attention_mask
from lctrain.models.registration import register

POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]])


@pytest.fixture
def mask_of():
    """Returns make(create, attention, **inputs), which calls the mask function `create`."""
    register()

    def make(create, attention, **inputs):
        config = LlamaConfig(attn_implementation=attention, sliding_window=3)
        embeddings = torch.zeros(2, 6, 4)
        arguments = {"attention_mask": None, "past_key_values": None} | inputs
        return create(config=config, inputs_embeds=embeddings, **arguments)

    return make


@pytest.mark.parametrize("create", [create_causal_mask, create_sliding_window_causal_mask])
def test_packed_rows_give_the_numbers_of_their_documents(mask_of, create):
    segments = mask_of(create, "lctrain_flash", position_ids=POSITIONS)
    assert segments.tolist() == [[1, 1, 1, 2, 2, 3], [1] * 6]
    visible = mask_of(create, "sdpa", position_ids=POSITIONS)[:, 0]
    assert not (visible & (segments[:, :, None] != segments[:, None, :])).any()


@pytest.mark.parametrize(
    "create", [create_causal_mask, create_sliding_window_causal_mask, create_bidirectional_mask]
)
def test_plain_rows_need_no_mask_and_padding_is_passed_on(mask_of, create):
    positions = {} if create is create_bidirectional_mask else {"position_ids": POSITIONS[1:]}
    assert mask_of(create, "lctrain_flash", **positions) is None
    padding = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    found = mask_of(create, "lctrain_flash", attention_mask=padding)
    assert found.dtype == torch.bool
    assert torch.equal(found, padding.bool())


@pytest.mark.parametrize("seen", [2, 7])
@pytest.mark.parametrize("beyond", [0, 3])
@pytest.mark.parametrize("create", [create_causal_mask, create_sliding_window_causal_mask])
def test_padding_is_that_of_the_keys_which_a_cache_holds(mask_of, create, seen, beyond):
    """A sliding layer's cache drops early keys; a mask may have more columns than keys."""
    padding = torch.ones(2, seen + 6 + beyond, dtype=torch.int64)
    padding[0, : seen + 1] = padding[1, -1 - beyond] = 0
    padding[1, seen + 6 :] = 0

    def make(attention):
        sliding = create is create_sliding_window_causal_mask
        cache = DynamicCache(config=LlamaConfig(sliding_window=3) if sliding else None)
        keys = torch.zeros(2, 1, seen, 4)
        cache.update(keys, keys, 0)
        return mask_of(create, attention, attention_mask=padding, past_key_values=cache)

    visible = make("sdpa")
    assert torch.equal(make("lctrain_flash"), visible[:, 0].any(-2))


@pytest.mark.parametrize("attention_mask", [None, torch.ones(2, 6)])
def test_patterns_of_the_model_s_own_are_refused(mask_of, attention_mask):
    def everything(batch, head, query, key):
        return query >= 0

    with pytest.raises(ValueError, match=r"pattern of its own.*Call unpatch\(\)"):
        mask_of(
            create_causal_mask,
            "lctrain_flash",
            attention_mask=attention_mask,
            or_mask_function=everything,
        )


@pytest.mark.parametrize("attention_mask", [None, torch.ones(2, 6)])
def test_blocks_that_see_the_future_are_refused(mask_of, attention_mask):
    with pytest.raises(ValueError, match=r"pattern of its own|sees the future"):
        mask_of(
            create_causal_mask,
            "lctrain_flash",
            attention_mask=attention_mask,
            block_sequence_ids=torch.tensor([[-1, 0, 0, -1, 1, 1]] * 2),
        )


@pytest.mark.parametrize("q_offset", [0, torch.tensor(0)])
@pytest.mark.parametrize("attention_mask", [None, torch.ones(1, 5).bool()])
def test_caches_of_fixed_size(q_offset, attention_mask):
    arguments = (1, 5, 8, q_offset)
    for seen in (causal_mask_function, sliding_window_causal_mask_function(3)):
        rows = flash_attention_mask(*arguments, mask_function=seen, attention_mask=attention_mask)
        assert rows.dtype == torch.int32
        assert rows.flatten().tolist() == [0, 5]
    with pytest.raises(ValueError, match=r"got one of fixed size|pattern of its own"):
        flash_attention_mask(
            *arguments,
            mask_function=chunked_causal_mask_function(3, torch.zeros(1, dtype=torch.int64)),
            attention_mask=attention_mask,
        )


def test_masks_of_callables_without_a_name_are_refused():
    """Such as a partial function that a model combines with the causal mask."""
    block = partial(chunked_causal_mask_function(3, torch.zeros(1, dtype=torch.int64)))
    with pytest.raises(ValueError, match="pattern of its own"):
        flash_attention_mask(
            *(1, 5, 8),
            mask_function=and_masks(block, causal_mask_function),
            attention_mask=torch.ones(1, 8, dtype=torch.bool),
            allow_is_causal_skip=False,
        )


def test_one_query_over_a_full_window_of_fixed_size():
    """Columns of the mask before the window are left out; padding reaches into it in row 1."""
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[0, :2] = mask[1, :7] = False
    rows = flash_attention_mask(
        *(2, 1, 6, 11, 6),
        mask_function=sliding_window_causal_mask_function(6),
        attention_mask=mask,
        allow_is_causal_skip=False,
    )
    assert rows[..., 0, 0].tolist() == [[0, 1], [6, 6]]
