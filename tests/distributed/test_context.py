"""Tests the division of packs over a context group, and attention on divided packs."""

import numpy as np
import pytest
import torch

from lctrain.distributed.context import BORDER, ContextShard
from lctrain.distributed.exchange import exchange_heads
from tests.distributed.context_cases import all_shared, whole
from tests.distributed.ranks import join, run_ranks
from tests.numerics import assert_equal_in_float64

PACKS = {
    "one": [4096],
    "short": [1] * 50,
    "mixed": [5000, 1, 300, 0, 64, 1024, 130, 2049],
    "none": [],
}


@pytest.mark.parametrize("size", [1, 2, 3, 8, 64, 1024])
@pytest.mark.parametrize("name", PACKS)
def test_every_token_is_computed_once(name, size):
    lengths = PACKS[name]
    shard = ContextShard.of(lengths, size)
    assert sorted(shard.order.tolist()) == list(range(sum(lengths)))
    assert sum(shard.work) == sum(length * (length + 1) // 2 for length in lengths)
    for rank, chunks in enumerate(shard.chunks):
        assert len(shard.indices(rank)) == shard.tokens[rank]
        assert list(chunks) == sorted(chunks)
        assert all(chunk.start % BORDER == 0 for chunk in chunks)
    assert len(shard.keys(0, 7)) == sum(chunk.stop for chunk in shard.chunks[0])
    assert shard == ContextShard.of(list(lengths), size)


def test_keys_are_the_document_up_to_the_chunk():
    shard = ContextShard.of([600, 300], 2)
    stride = max(shard.tokens)
    gathered = np.full(2 * stride, -1)
    for rank in range(2):
        places = shard.indices(rank)
        gathered[rank * stride : rank * stride + len(places)] = places
    begins = [0, 600]
    for rank in range(2):
        expected = [begins[d] + i for d, _, stop in shard.chunks[rank] for i in range(stop)]
        assert gathered[shard.keys(rank, stride)].tolist() == expected


@pytest.mark.parametrize("sigma", [1.0, 1.5])
def test_eight_ranks_have_equal_work(sigma):
    """On packs of 128k tokens with log-normal lengths, as the mean over 20 packs."""
    random = np.random.default_rng(0)
    work, tokens = [], []
    for _ in range(20):
        lengths, left = [], 2**17
        while left:
            drawn = int(random.lognormal(8.5 - sigma**2 / 2, sigma))
            lengths.append(min(left, max(1, drawn)))
            left -= lengths[-1]
        shard = ContextShard.of(lengths, 8)
        work.append(max(shard.work) / np.mean(shard.work))
        tokens.append(max(shard.tokens) / np.mean(shard.tokens))
    assert np.mean(work) <= 1.05
    assert np.mean(tokens) <= 1.02


@pytest.mark.parametrize(
    ("lengths", "size", "message"),
    [([5], 0, "size must be at least 1, got 0"), ([5, -1], 2, "lengths must be at least 0, got -")],
)
def test_what_cannot_be_divided(lengths, size, message):
    with pytest.raises(ValueError, match=message):
        ContextShard.of(lengths, size)


def test_heads_that_cannot_be_exchanged():
    shard = ContextShard.of([10], 4)
    with pytest.raises(ValueError, match="must divide the heads, got 4 ranks and 6 heads"):
        exchange_heads(torch.add, [torch.zeros(10, 6, 8)], shard)


def check(found):
    """Compares the results of a group with those of one rank."""
    references = {(case, lengths): whole(case, lengths) for case, _, lengths in found}
    for (case, exchange, lengths), results in found.items():
        for mine, theirs in zip(results, references[case, lengths], strict=True):
            assert_equal_in_float64(mine, theirs, f"{case} by {exchange}")


@pytest.mark.slow
@pytest.mark.parametrize("size", [4, 8])
def test_more_ranks_compute_what_one_does(tmp_path, size):
    """Two ranks are tested in test_sharded.py."""
    run_ranks("tests.distributed.test_context", size, tmp_path)
    check(torch.load(tmp_path / "found.pt"))


if __name__ == "__main__":
    rank, _, folder, _ = join()
    found = all_shared()
    if rank == 0:
        torch.save(found, folder / "found.pt")
