"""Tests the formula of exchanged bytes against bytes counted around every collective."""

import pytest
import torch

from lctrain.distributed.context import ContextShard
from lctrain.distributed.shared_pack import ContextGroups
from lctrain.distributed.traffic import (
    AttentionWidths,
    Received,
    received_backward,
    received_forward,
)
from tests.distributed.context_cases import EIGHT, LONG, SHORT, Settings, fine_shard, share
from tests.distributed.simulated import Ranks, groups_of
from tests.numerics import near

DTYPES = [torch.bfloat16, torch.float64]


@pytest.mark.parametrize(("size", "heads"), [(1, 1), (2, 1), (2, 2), (4, 2), (8, 1), (8, 8)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["plain", "one_lambda"])
def test_counted_bytes_equal_the_formula(name, size, heads, dtype, monkeypatch):
    settings = Settings(EIGHT, 8, dtype)
    widths = AttentionWidths.plain(8, 8, 8)
    if name == "one_lambda":  # values are twice as wide, and there are two branches
        widths = AttentionWidths(2 * 64, 4 * 64, 2 * 64)
    for lengths in (LONG, SHORT):
        shard = fine_shard(lengths, size, heads)
        ranks = Ranks(size)

        def run(rank, shard=shard):
            groups = ContextGroups(*groups_of(rank, size, heads))
            return share(name, shard, rank, groups, settings)

        ranks.run(run, monkeypatch)
        for rank, counted in enumerate(ranks.received):
            both = zip(
                received_forward(shard, rank, widths, dtype.itemsize),
                received_backward(shard, rank, widths, dtype.itemsize),
                strict=True,
            )
            expected = dict(zip(Received._fields, map(sum, both), strict=True))
            assert {key: counted.get(key, 0) for key in expected} == expected


@pytest.mark.parametrize("size", [2, 4, 8])
def test_bytes_per_token_of_an_8b_model(size):
    """32 query and 8 key/value heads of 128 in bfloat16, on a document that divides evenly."""
    tokens, ranks = 2**17, size - 1
    widths = AttentionWidths.plain(32, 8, 128)
    keys = received_forward(ContextShard.of([tokens], size), 0, widths, 2)
    assert sum(keys) / tokens == near(2 * 8 * 128 * 2 * ranks / size)
    heads = received_forward(ContextShard.of([tokens], size, size), 0, widths, 2)
    assert sum(heads) / tokens == near((2 * 32 + 2 * 8) * 128 * 2 * ranks / size**2)
