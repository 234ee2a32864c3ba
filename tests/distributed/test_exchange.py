"""Tests attention on shared packs: every layout of ranks computes what one rank does."""

import functools
import re

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lctrain.distributed.attention import (
    diff_attn_shared_func,
    dual_chunk_attn_shared_func,
    flash_attn_shared_func,
)
from lctrain.distributed.context import ContextShard
from lctrain.distributed.exchange import exchange
from lctrain.distributed.shared_pack import ContextGroups, SharedPack
from lctrain_kernels.schedule import device_schedule
from lctrain_kernels.tile.config import TileConfig, override_configs
from tests.distributed.context_cases import (
    CASES,
    EIGHT,
    LONG,
    SHORT,
    Result,
    Settings,
    all_shared,
    fine_shard,
    put_together,
    share,
    whole,
)
from tests.distributed.ranks import join, run_ranks
from tests.distributed.simulated import Ranks, groups_of
from tests.numerics import assert_equals_one_rank

one_rank = functools.lru_cache(whole)


def simulate(name, shard, settings, monkeypatch) -> tuple[Result, Ranks]:
    """Returns the results of simulated ranks, put together, and the ranks."""
    ranks = Ranks(shard.size)

    def run(rank):
        groups = ContextGroups(*groups_of(rank, shard.size, shard.heads))
        return share(name, shard, rank, groups, settings)

    return put_together(shard, ranks.run(run, monkeypatch)), ranks


def check(found, settings):
    """Compares the results of a group of processes with those of one rank."""
    for (name, lengths), (shard, results) in found.items():
        mine, theirs = put_together(shard, results), one_rank(name, lengths, settings)
        assert_equals_one_rank(mine.rows, theirs.rows)
        assert_equals_one_rank(mine.trained, theirs.trained)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("size", "heads"), [(1, 1), (2, 1), (4, 2), (4, 4), (8, 1), (8, 8)])
@pytest.mark.parametrize("lengths", [LONG, SHORT], ids=["long", "short"])
def test_several_ranks_compute_what_one_does(name, size, heads, lengths, monkeypatch):
    """Dropout 0.1 with options, dual chunk and differential attention; all ranks in one process."""
    settings = Settings(EIGHT if size == 8 else Settings.heads)
    shard = fine_shard(lengths, size, heads)
    mine, ranks = simulate(name, shard, settings, monkeypatch)
    theirs = one_rank(name, lengths, settings)
    assert_equals_one_rank(mine.rows, theirs.rows)
    assert_equals_one_rank(mine.trained, theirs.trained)
    assert all(calls == ranks.calls[0] for calls in ranks.calls)


@pytest.fixture
def large_tiles():
    """Makes the interpreter compute tiles of 64, which take it less time than smaller ones."""
    tile = TileConfig(TILE, TILE, 4, 1)
    kernels = [f"{name}_{kind}" for name in ("varlen", "dual_chunk", "diff") for kind in PASSES]
    with override_configs(**dict.fromkeys(kernels, tile)):
        yield


PASSES = ("fwd", "dq", "dkv")
TILE = 64


@pytest.mark.parametrize("name", ["options", "wide_chunks", "differential_2"])
@pytest.mark.parametrize("exchanged", ["heads", "keys"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="test_shards.py has a GPU")
def test_bits_in_the_interpreter(name, exchanged, large_tiles, monkeypatch):
    """All bits with exchanged heads; of output and queries' gradients with gathered keys."""
    lengths, heads = ((256, 20), 1) if exchanged == "keys" else ((40,), 2)
    shard = fine_shard(lengths, 2, heads, TILE)
    settings = Settings((heads, heads), 16, torch.float16, "triton")
    mine, _ = simulate(name, shard, settings, monkeypatch)
    theirs = one_rank(name, lengths, settings)
    queries = 3 if CASES[name].function == "diff" else 2
    compared = len(theirs.rows) if exchanged == "heads" else queries
    for index in range(compared):
        assert torch.equal(mine.rows[index], theirs.rows[index]), index


def test_gradients_of_keys_are_added_in_float32(monkeypatch):
    shard = fine_shard(LONG, 2, 1)
    settings = Settings(dtype=torch.bfloat16)
    _, ranks = simulate("plain", shard, settings, monkeypatch)
    assert ranks.dtypes == {
        ("all_gather", torch.bfloat16),
        ("reduce_scatter", torch.float32),
    }


def saved_numbers(function):
    """Calls a function, and returns how many numbers autograd saved, each tensor once."""
    saved = {}

    def pack(tensor):
        if tensor.is_floating_point():
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = function()
    assert out.grad_fn is not None
    return sum(saved.values()) // out.element_size()


@pytest.mark.parametrize(("size", "heads"), [(4, 4), (4, 1), (4, 2)])
def test_what_is_kept_for_the_backward(size, heads, monkeypatch):
    """Queries, keys, values, output and lse of one call, and no gathered key beside them."""
    shard, count, dim = fine_shard(LONG, size, heads), 4, 8

    def run(rank):
        shared = SharedPack.of(shard, rank, "cpu", ContextGroups(*groups_of(rank, size, heads)))
        rows = shard.tokens[rank]
        q, k, v = (torch.ones(rows, count, dim).requires_grad_() for _ in range(3))
        found = saved_numbers(lambda: flash_attn_shared_func(q, k, v, shared, causal=True))
        share, pack = count // heads, shared.pack
        kept = (2 * pack.total_q + 2 * pack.total_k) * dim + pack.total_q
        return found, kept * share

    for found, kept in Ranks(size).run(run, monkeypatch):
        assert found == kept


@pytest.mark.parametrize("heads", [1, 2])
def test_recomputation_repeats_the_collectives(heads, monkeypatch):
    """Two checkpointed layers: the gradients of plain ones, and one order of calls on all ranks."""
    shard = fine_shard(LONG, 2, heads)
    x = torch.randn(sum(LONG), 2, 8, generator=torch.Generator().manual_seed(0))

    def run(rank, is_checkpointed):
        shared = SharedPack.of(shard, rank, "cpu", ContextGroups(*groups_of(rank, 2, heads)))
        own = x[torch.from_numpy(shard.indices(rank))].requires_grad_()

        def layer(rows):
            options = {"causal": True, "dropout_p": 0.1, "dropout_seed": 3}
            return rows + flash_attn_shared_func(rows, rows, rows, shared, **options)

        rows = own
        for _ in range(2):
            if is_checkpointed:
                rows = checkpoint(layer, rows, use_reentrant=False, preserve_rng_state=False)
            else:
                rows = layer(rows)
        rows.square().sum().backward()
        return own.grad

    plain, again = Ranks(2), Ranks(2)
    expected = plain.run(lambda rank: run(rank, False), monkeypatch)
    found = again.run(lambda rank: run(rank, True), monkeypatch)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    assert again.calls[0] == again.calls[1]
    assert len(again.calls[0]) > len(plain.calls[0])


def test_the_first_rank_draws_the_seed(monkeypatch):
    """So peers may seed their generators differently, for dropout outside of attention."""
    lengths, size = (100, 40), 2
    shard, tokens = fine_shard(lengths, size, 1), sum(lengths)
    q = torch.randn(tokens, 2, 8, generator=torch.Generator().manual_seed(0))

    def run(rank):
        shared = SharedPack.of(shard, rank, "cpu", ContextGroups(*groups_of(rank, size, 1)))
        own = q[torch.from_numpy(shard.indices(rank))]
        torch.manual_seed(rank + 1)
        return flash_attn_shared_func(own, own, own, shared, causal=True, dropout_p=0.5)

    with torch.random.fork_rng():
        parts = torch.cat(Ranks(size).run(run, monkeypatch))
        torch.manual_seed(1)
        one = SharedPack.of(ContextShard.of(lengths, 1), 0, "cpu")
        alone = flash_attn_shared_func(q, q, q, one, causal=True, dropout_p=0.5)
    assert torch.equal(parts, alone[torch.from_numpy(shard.order)])


def test_the_pack_of_a_rank_is_not_that_of_all():
    """Boundaries, lengths, offsets and ids of the chunks; without a schedule of the whole pack."""
    shard = fine_shard(LONG, 4, 2)
    ids = torch.arange(10, 15, dtype=torch.int32)
    for rank in range(4):
        groups = ContextGroups(*groups_of(rank, 4, 2))
        pack = SharedPack.of(shard, rank, "cpu", groups, ids).pack
        chunks = shard.chunks[rank // 2]
        assert pack.cu_seqlens_q.diff().tolist() == [c.stop - c.start for c in chunks]
        assert pack.cu_seqlens_k.diff().tolist() == [c.stop for c in chunks]
        assert pack.max_seqlen_q == max(c.stop - c.start for c in chunks)
        assert pack.max_seqlen_k == max(c.stop for c in chunks)
        assert pack.query_offsets.tolist() == [c.start for c in chunks]
        assert pack.document_ids.tolist() == [10 + c.document for c in chunks]
        assert pack.schedule is None


@pytest.mark.parametrize("heads", [1, 2])
def test_inference_keeps_one_tile_schedule_for_all_layers(heads):
    """The schedule of inference tensors, which no version guards, is built for every call."""
    shard = fine_shard(LONG, 2, heads)
    with torch.inference_mode():
        ids = torch.arange(len(LONG), dtype=torch.int32)
        pack = SharedPack.of(shard, 1, "cpu", ContextGroups(), ids).pack
        schedules = [
            device_schedule(pack.cu_seqlens_q, pack.cu_seqlens_k, pack.total_q, pack.total_k)
            for _ in range(2)
        ]
    assert schedules[0] is schedules[1]


@pytest.mark.parametrize("rank", [-1, 2, 5])
def test_ranks_outside_of_the_group_are_refused(rank):
    with pytest.raises(ValueError, match=rf"rank must be in \[0, 2\), got {rank}\. Pass the index"):
        SharedPack.of(ContextShard.of([700], 2), rank, "cpu")


@pytest.mark.parametrize("groups", [None, ContextGroups()])
def test_heads_groups_need_process_groups(groups):
    with pytest.raises(ValueError, match=r"heads groups of 2 of 4 ranks, got none\. Pass ContextG"):
        SharedPack.of(ContextShard.of([700], 4, 2), 0, "cpu", groups)


def shared_by(heads):
    return SharedPack.of(ContextShard.of([10], 4, heads), 0, "cpu")


@pytest.mark.parametrize("heads", [1, 2])
def test_options_are_those_of_all_heads_and_documents(heads):
    """Their shapes are checked before a rank takes its part of them."""
    shard = ContextShard.of((700, 9), 2, heads)
    shared = SharedPack.of(shard, 0, "cpu")
    q, k = torch.zeros(shard.tokens[0], 4, 8), torch.zeros(shard.tokens[0], 2, 8)
    ones = torch.ones
    dual = {"inv_freq": ones(4), "chunk_size": 64, "local_size": 8}
    both = (q, q, k, k, k)
    shapes = r"must have shape \[4\] or \[2, 4\], got "
    for slopes in (ones(6), ones(2, 5), ones(3, 4)):
        with pytest.raises(ValueError, match=shapes + re.escape(str(tuple(slopes.shape)))):
            flash_attn_shared_func(q, k, k, shared, causal=True, alibi_slopes=slopes)
    with pytest.raises(ValueError, match=r"learnable_sink must have shape \[4\], got \(6,\)"):
        flash_attn_shared_func(q, k, k, shared, causal=True, learnable_sink=ones(6))
    with pytest.raises(ValueError, match=r"logit_scale must have shape \[2\], .* got \(3,\)"):
        dual_chunk_attn_shared_func(q, k, k, shared, **dual, logit_scale=ones(3))
    with pytest.raises(ValueError, match=r"lam must be a scalar .* \[4\] or .* got \(6,\)"):
        diff_attn_shared_func(*both, ones(6), shared)
    message = "first_head must be left out where ranks share a pack, got 0"
    with pytest.raises(ValueError, match=message):
        flash_attn_shared_func(q, k, k, shared, causal=True, first_head=0)
    with pytest.raises(ValueError, match=message):
        dual_chunk_attn_shared_func(q, k, k, shared, **dual, first_head=0)
    with pytest.raises(ValueError, match=message):
        diff_attn_shared_func(*both, ones(4), shared, first_head=0)


def test_what_cannot_be_exchanged():
    rows = torch.zeros(10, 6, 8)
    message = "must divide the heads, got 4 ranks and 6 heads. Gather keys"
    with pytest.raises(ValueError, match=message):
        exchange(torch.add, [rows[:3]], [], shared_by(4))
    message = "tensors must hold the 10 tokens of rank 0, got 9. Select the tokens"
    with pytest.raises(ValueError, match=message):
        exchange(torch.add, [rows], [rows[:9]], shared_by(1))
    message = "causal must be True to gather keys, got False. Exchange heads"
    with pytest.raises(ValueError, match=message):
        flash_attn_shared_func(rows, rows, rows, shared_by(1))
    with pytest.raises(ValueError, match=message):
        diff_attn_shared_func(*[rows] * 5, torch.ones(()), shared_by(1), causal=False)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "heads"), [(4, 2), (8, 1), (8, 8)])
def test_processes_compute_what_one_does(size, heads, tmp_path):
    """Two ranks are tested in test_sharded.py."""
    run_ranks("tests.distributed.test_exchange", size, tmp_path, str(heads))
    settings = Settings(EIGHT if size == 8 else Settings.heads)
    check(torch.load(tmp_path / "found.pt", weights_only=False), settings)


def main() -> None:
    """Computes as one of the ranks; rank 0 writes the results."""
    rank, _, folder, (heads,) = join()
    found = all_shared(int(heads))
    if rank == 0:
        torch.save(found, folder / "found.pt")
