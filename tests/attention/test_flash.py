"""Tests the attention function of lctrain_flash alone: it honours or refuses every argument."""

import pytest
import torch
from torch import nn

from lctrain.attention.flash import flash_attention_forward
from tests.numerics import assert_equal_in_float64

B, H, HK, S, D = 2, 4, 2, 7, 8


def states(queries=S, keys=S, value_dim=D, batch=B, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def normal(heads, tokens, dim):
        return torch.randn(batch, heads, tokens, dim, generator=generator, dtype=dtype)

    return normal(H, queries, D), normal(HK, keys, D), normal(HK, keys, value_dim)


def layer(causal=True):
    module = nn.Module()
    module.is_causal = causal
    return module.eval()


def dense(query, key, value, visible, scale=D**-0.5, softcap=None, sinks=None):
    """Returns dense attention [B, S, H, Dv]; `visible` broadcasts to [B, 1, S, Sk]."""
    key, value = (x.repeat_interleave(H // HK, dim=1) for x in (key, value))
    logits = query @ key.mT * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        sink = sinks[None, :, None, None].expand(*logits.shape[:3], 1)
        weights = torch.cat([logits, sink], -1).softmax(-1)[..., :-1]
    else:
        weights = logits.softmax(-1)
    return (weights.nan_to_num() @ value).transpose(1, 2)


def visible(causal, window=None, queries=S, keys=S):
    distance = torch.arange(queries)[:, None] + keys - queries - torch.arange(keys)
    seen = distance >= 0 if causal else torch.ones(queries, keys, dtype=torch.bool)
    if window is not None:
        seen = seen & (distance < window) & (distance > -window)
    return seen[None, None]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.usefixtures("in_float64")
def test_scaling_window_softcap_and_sinks(causal, window):
    query, key, value = states()
    sinks = torch.linspace(-1, 1, H, dtype=torch.float64)
    out, weights = flash_attention_forward(
        layer(causal),
        query,
        key,
        value,
        None,
        scaling=0.5,
        sliding_window=window,
        softcap=2.0,
        s_aux=sinks,
    )
    assert weights is None
    expected = dense(query, key, value, visible(causal, window), 0.5, 2.0, sinks)
    assert_equal_in_float64(out, expected)


@pytest.mark.usefixtures("in_float64")
def test_is_causal_of_the_call_wins_over_the_module_s():
    query, key, value = states()
    out = flash_attention_forward(layer(True), query, key, value, None, is_causal=False)[0]
    assert_equal_in_float64(out, dense(query, key, value, visible(False)))


@pytest.mark.parametrize("value_dim", [4, 12])
@pytest.mark.usefixtures("in_float64")
def test_values_of_another_width(value_dim):
    query, key, value = states(value_dim=value_dim)
    out = flash_attention_forward(layer(), query, key, value, None)[0]
    assert out.shape == (B, S, H, value_dim)
    assert_equal_in_float64(out, dense(query, key, value, visible(True)))


@pytest.mark.usefixtures("in_float64")
def test_fewer_queries_than_keys_are_the_last_ones():
    query, key, value = states(queries=3)
    out = flash_attention_forward(layer(), query, key, value, None)[0]
    assert_equal_in_float64(out, dense(query, key, value, visible(True, queries=3)))


@pytest.mark.parametrize("queries", [3, S])
@pytest.mark.usefixtures("in_float64")
def test_padding(queries):
    query, key, value = states(queries=queries)
    mask = torch.ones(B, S, dtype=torch.bool)
    mask[0, :2] = False
    out = flash_attention_forward(layer(), query, key, value, mask)[0]
    seen = visible(True, queries=queries) & mask[:, None, None]
    assert_equal_in_float64(out, dense(query, key, value, seen))


@pytest.mark.usefixtures("in_float64")
def test_padded_keys_of_cross_attention():
    query, key, value = states(queries=3)
    mask = torch.ones(B, S, dtype=torch.bool)
    mask[0, 4:] = False
    out = flash_attention_forward(layer(False), query, key, value, mask)[0]
    assert_equal_in_float64(out, dense(query, key, value, mask[:, None, None]))


@pytest.mark.usefixtures("in_float64")
def test_padded_queries_of_a_bidirectional_layer_see_the_real_keys():
    query, key, value = states()
    mask = torch.ones(B, S, dtype=torch.bool)
    mask[0, 4:] = False
    out = flash_attention_forward(layer(False), query, key, value, mask)[0]
    assert_equal_in_float64(out, dense(query, key, value, mask[:, None, None]))


POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
EDGES = torch.tensor([0, 3, 7], dtype=torch.int32)
PACK = {"cu_seq_lens_q": EDGES, "cu_seq_lens_k": EDGES, "max_length_q": 4, "max_length_k": 4}


@pytest.mark.parametrize(
    "inputs",
    [PACK, {"position_ids": POSITIONS}, {"attention_mask": torch.tensor([[1, 1, 1, 2, 2, 2, 2]])}],
    ids=["cu_seq_lens", "position_ids", "segments"],
)
@pytest.mark.usefixtures("in_float64")
def test_packed_rows(inputs):
    query, key, value = states(batch=1)
    mask = inputs.get("attention_mask")
    others = {name: given for name, given in inputs.items() if name != "attention_mask"}
    out = flash_attention_forward(layer(), query, key, value, mask, **others)[0]
    document = torch.tensor([0, 0, 0, 1, 1, 1, 1])
    seen = visible(True) & (document[:, None] == document)[None, None]
    assert_equal_in_float64(out, dense(query, key, value, seen))


@pytest.mark.usefixtures("in_float64")
def test_position_ids_that_do_not_restart_are_rows():
    query, key, value = states()
    positions = torch.arange(S)[None]
    out = flash_attention_forward(layer(), query, key, value, None, position_ids=positions)[0]
    assert_equal_in_float64(out, dense(query, key, value, visible(True)))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"output_attentions": True}, "output_attentions must be False, got True"),
        ({"position_bias": torch.zeros(1)}, "position_bias must be None, got a bias per pair"),
        ({"head_mask": torch.zeros(1)}, "head_mask must be None, got a mask over heads"),
        ({"cache": object()}, "cache must be None, got a paged key/value cache"),
        ({"block_indices": torch.zeros(1)}, "block_indices must be None, got a choice of keys"),
        ({"novelty": torch.zeros(1)}, "novelty must be None, got a tensor whose meaning is not"),
        ({"attention_mask": torch.zeros(B, 1, S, S)}, r"attention_mask must be \[batch, tokens\]"),
        ({"attention_mask": torch.ones(B, 5).bool()}, "must cover the 7 keys, got 5"),
        (PACK, r"packed inputs must be one row \[1, T\], got 2 rows"),
        (PACK | {"attention_mask": torch.ones(B, S).bool()}, "must be None for packed inputs"),
        (
            {"position_ids": torch.zeros(3, B, S, dtype=torch.int64)},
            r"position_ids must be \[batch, tokens\], got \[3, 2, 7\]",
        ),
    ],
)
def test_refused(inputs, message):
    mask = inputs.get("attention_mask")
    others = {name: given for name, given in inputs.items() if name != "attention_mask"}
    with pytest.raises(ValueError, match=message):
        flash_attention_forward(layer(), *states(), mask, **others)


def test_packs_with_a_filled_cache_are_refused():
    with pytest.raises(ValueError, match="as many keys as queries, got 7 and 3"):
        flash_attention_forward(layer(), *states(queries=3, batch=1), None, **PACK)


def test_boundaries_of_other_rows_are_refused():
    from lctrain.attention.boundaries import from_rows

    boundaries = from_rows(1, S, S, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"must have the \(1, 7\) rows and tokens"):
        flash_attention_forward(layer(), *states(), None, lctrain_boundaries=boundaries)


def test_mixed_dtypes_follow_the_values():
    query, key, value = states(dtype=torch.float32)
    out = flash_attention_forward(layer(), query, key, value.bfloat16(), None)[0]
    assert out.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert flash_attention_forward(layer(), query, key, value, None)[0].dtype == torch.bfloat16


def test_the_pack_is_searched_once_for_all_layers(monkeypatch):
    from lctrain.attention import documents

    searches = []
    find = documents.find_segments
    monkeypatch.setattr(documents, "find_segments", lambda *p: searches.append(1) or find(*p))
    positions = POSITIONS.clone()
    for _ in range(3):
        flash_attention_forward(layer(), *states(batch=1), None, position_ids=positions)
    assert len(searches) == 1
    positions[0, 3] = 3  # another pack in the same tensor
    flash_attention_forward(layer(), *states(batch=1), None, position_ids=positions)
    assert len(searches) == 2
