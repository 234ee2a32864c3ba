"""Tests the division of packs over the ranks of a context group."""

from itertools import pairwise

import numpy as np
import pytest

from lctrain.distributed.context import BORDER, ContextShard, choose_heads
from tests.numerics import near

PACKS = {
    "one": [4096],
    "short": [1] * 50,
    "mixed": [5000, 1, 300, 0, 64, 1024, 130, 2049],
    "none": [],
}


def random_lengths(random, sigma, tokens=2**17):
    """Returns log-normal lengths that fill a pack."""
    lengths, left = [], tokens
    while left:
        drawn = int(random.lognormal(8.5 - sigma**2 / 2, sigma))
        lengths.append(min(left, max(1, drawn)))
        left -= lengths[-1]
    return lengths


@pytest.mark.parametrize(
    ("size", "heads"),
    [(1, 1), (2, 1), (3, 3), (8, 1), (8, 4), (8, 8), (64, 1), (64, 8), (1024, 1), (1024, 8)],
)
@pytest.mark.parametrize("name", PACKS)
def test_every_token_is_computed_once(name, size, heads):
    lengths = PACKS[name]
    shard = ContextShard.of(lengths, size, heads)
    assert sorted(shard.order.tolist()) == list(range(sum(lengths)))
    assert sum(shard.work) == near(sum(length * (length + 1) // 2 for length in lengths))
    assert sum(shard.tokens) == sum(shard.group_tokens) == sum(lengths)
    assert len(shard.tokens) == len(shard.work) == size
    parts = [shard.indices(rank) for rank in range(size)]
    assert np.array_equal(np.concatenate(parts), shard.order)
    for rank, own in enumerate(parts):
        assert len(own) == shard.tokens[rank]
    assert len(shard.chunks) == size // heads
    for chunks in shard.chunks:
        assert list(chunks) == sorted(chunks)
        assert all(chunk.start % BORDER == 0 for chunk in chunks)
        for one, two in pairwise(chunks):
            assert one.document < two.document or one.stop < two.start, "chunks that meet are one"
    assert shard == ContextShard.of(list(lengths), size, heads)


def test_chunks_begin_where_tiles_do():
    """At other multiples of 16 bits are lost, and elsewhere dropout masks, too."""
    assert BORDER % 128 == 0


@pytest.mark.parametrize(("size", "heads"), [(2, 1), (8, 1), (8, 2), (1024, 8)])
@pytest.mark.parametrize("name", PACKS)
def test_keys_are_the_document_up_to_the_chunk(name, size, heads):
    lengths = PACKS[name]
    shard = ContextShard.of(lengths, size, heads)
    stride, begins = max(shard.group_tokens), np.concatenate([[0], np.cumsum(lengths)])
    gathered = np.full(size // heads * stride, -1)
    first = 0
    for group, count in enumerate(shard.group_tokens):
        gathered[group * stride :][:count] = shard.order[first : first + count]
        first += count
    for rank in range(0, size, heads)[:64]:
        chunks = shard.chunks[rank // heads]
        keys = shard.keys(rank)
        expected = [begins[d] + i for d, _, stop in chunks for i in range(stop)]
        assert gathered[keys.places].tolist() == expected
        together = np.concatenate([keys.last, keys.repeated])
        assert sorted(together.tolist()) == list(range(len(expected)))
        for part in (keys.last, keys.repeated):
            assert len(set(keys.places[part].tolist())) == len(part)
        assert set(keys.places[keys.repeated]) <= set(keys.places[keys.last])


@pytest.mark.parametrize("sigma", [1.0, 1.5])
def test_eight_ranks_have_equal_work(sigma):
    """On packs of 128k tokens with log-normal lengths, as the mean over 20 packs."""
    random = np.random.default_rng(0)
    work, tokens = [], []
    for _ in range(20):
        lengths = random_lengths(random, sigma)
        shard = ContextShard.of(lengths, 8)
        work.append(max(shard.work) / np.mean(shard.work))
        tokens.append(max(shard.tokens) / np.mean(shard.tokens))
    assert np.mean(work) <= 1.05
    assert np.mean(tokens) <= 1.02


@pytest.mark.parametrize(
    ("lengths", "size", "message"),
    [
        ([5], (0,), "size must be at least 1, got 0"),
        ([5, -1], (2,), "lengths must be at least 0, got -"),
        ([5], (4, 3), "heads must divide the 4 ranks, got 3"),
    ],
)
def test_what_cannot_be_divided(lengths, size, message):
    with pytest.raises(ValueError, match=message):
        ContextShard.of(lengths, *size)


def test_a_heads_group_has_equal_tokens():
    shard = ContextShard.of(PACKS["mixed"], 8, 8)
    assert max(shard.tokens) - min(shard.tokens) <= 1
    assert np.array_equal(shard.order, np.arange(sum(PACKS["mixed"])))


@pytest.mark.parametrize(
    ("exchange", "size", "key_heads", "on_machine", "expected"),
    [
        ("heads", 4, 8, 8, 4),
        ("keys", 4, 8, 8, 1),
        ("auto", 8, 8, 8, 8),
        ("auto", 16, 8, 8, 8),  # heads inside a machine, keys between
        ("auto", 8, 2, 8, 2),
        ("auto", 8, 3, 8, 1),
        ("auto", 6, 8, 4, 2),  # no heads group crosses machines
    ],
)
def test_heads_are_exchanged_inside_a_machine(exchange, size, key_heads, on_machine, expected):
    assert choose_heads(exchange, size, key_heads, on_machine) == expected


def test_exchanges_that_do_not_exist():
    with pytest.raises(ValueError, match="exchange must be one of auto, heads, keys, got 'ring'"):
        choose_heads("ring", 2, 8, 8)
    with pytest.raises(
        ValueError, match=r"must divide the key/value heads .* 16 ranks and 8 heads"
    ):
        choose_heads("heads", 16, 8, 8)
