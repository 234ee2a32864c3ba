"""Tests that ranks of context parallelism draw the dropout masks of the unsharded run.

Out, lse and dq of a run of queries, and all results of a slice of heads, then have the bits of the
unsharded run. So have dk and dv of a run of queries, compared with an unsharded backward in which
the other queries have no gradient.
"""

import dataclasses

import pytest
import torch

from lctrain_kernels.differential import hopper as differential
from lctrain_kernels.dual_chunk import hopper as dual_chunk
from lctrain_kernels.options import checked_options
from lctrain_kernels.tile.config import TileConfig, override_configs
from lctrain_kernels.varlen import hopper as varlen
from lctrain_kernels.varlen.operators import Operands
from lctrain_kernels.varlen.probabilities import attention_probabilities
from tests.kernels.gluon_emulator import emulate
from tests.kernels.shards import (
    ATTENTIONS,
    DROPOUT_P,
    heads_of_a_rank,
    make_inputs,
    pack_of,
    queries_of_a_rank,
    rows_of,
    run,
    without_gradients_elsewhere,
)
from tests.kernels.test_gpu_contract import compiled_kernels
from tests.numerics import assert_equal_in_float64, assert_far_apart

HAS_GPU = torch.cuda.is_available()
# Two ranks split the second document at 128; the first rank holds all of the first document.
LENGTHS, RANKS = (20, 160), (((0, 20), (0, 128)), ((20, 20), (128, 160)))
GPU_LENGTHS = (300, 1000, 129, 640)
GPU_RANKS = (
    ((0, 128), (0, 256), (0, 0), (0, 640)),
    ((128, 256), (256, 896), (0, 128), (640, 640)),
    ((256, 300), (896, 1000), (128, 129), (640, 640)),
)
by_attention = pytest.mark.parametrize("attention", ATTENTIONS)


def bits_equal(actual, expected, name):
    if isinstance(expected, tuple):
        assert len(actual) == len(expected)
        for index, (one, other) in enumerate(zip(actual, expected, strict=True)):
            bits_equal(one, other, f"{name} {index}")
    else:
        assert torch.equal(actual, expected), name


def assert_runs_of_queries(attention, inputs, ranks, backend, compare=bits_equal, forward=False):
    """Compares every rank that holds runs of queries with the unsharded run."""
    whole = run(attention, inputs, backend, has_backward=not forward)
    for runs in ranks:
        part = run(attention, queries_of_a_rank(inputs, runs), backend, has_backward=not forward)
        queries, keys = (x.to(inputs.dout.device) for x in rows_of(runs, inputs.runs))
        compare(part.out, whole.out[queries], "out")
        compare(part.lse, tuple(x[:, queries] for x in whole.lse), "lse")
        compare(part.dqueries, tuple(x[queries] for x in whole.dqueries), "dq")
        if not forward:
            masked = run(attention, without_gradients_elsewhere(inputs, runs), backend)
            compare(part.dkeys, tuple(x[keys] for x in masked.dkeys), "dk, dv")


def assert_slices_of_heads(attention, inputs, ranks, backend, compare=bits_equal, forward=False):
    """Compares ranks that each hold one key/value head with the unsharded run."""
    whole = run(attention, inputs, backend, has_backward=not forward)
    heads, heads_k = inputs.dout.shape[1], inputs.keys[0].shape[1]
    group = heads // heads_k
    for rank in ranks:
        queries, keys = slice(rank * group, (rank + 1) * group), slice(rank, rank + 1)
        shard = heads_of_a_rank(inputs, queries, keys)
        part = run(attention, shard, backend, has_backward=not forward)
        compare(part.out, whole.out[:, queries], "out")
        compare(part.lse, tuple(x[queries] for x in whole.lse), "lse")
        compare(part.dqueries, tuple(x[:, queries] for x in whole.dqueries), "dq")
        compare(part.dkeys, tuple(x[:, keys] for x in whole.dkeys), "dk, dv")


@by_attention
def test_reference(attention):
    inputs = make_inputs(attention, LENGTHS, 4, 2, 8, torch.float64)
    assert_runs_of_queries(attention, inputs, RANKS, "pytorch", assert_equal_in_float64)
    assert_slices_of_heads(attention, inputs, [0, 1], "pytorch", assert_equal_in_float64)


@by_attention
def test_a_rank_that_passes_no_offset_draws_another_mask(attention):
    inputs = make_inputs(attention, (160,), 2, 1, 8, torch.float64)
    whole = run(attention, inputs, "pytorch", has_backward=False)
    queries = queries_of_a_rank(inputs, [(128, 160)])
    part = run(attention, queries, "pytorch", has_backward=False, query_offsets=(0,))
    assert_far_apart(part.out, whole.out[128:])
    heads = heads_of_a_rank(inputs, slice(1, 2), slice(0, 1))
    heads = dataclasses.replace(heads, first_head=0)
    part = run(attention, heads, "pytorch", has_backward=False)
    assert_far_apart(part.out, whole.out[:, 1:])


def test_probabilities_of_a_rank():
    inputs = make_inputs("varlen", (48,), 4, 4, 8, torch.float64)
    shard = heads_of_a_rank(queries_of_a_rank(inputs, [(16, 48)]), slice(2, 4), slice(2, 4))
    weights = []
    for call in (inputs, shard):
        q, k, v = (*call.queries, *call.keys)
        options = checked_options(
            q.device,
            8,
            1,
            q.shape[1],
            "pytorch",
            causal=True,
            dropout_p=DROPOUT_P,
            dropout_seed=7,
            first_head=call.first_head,
        )
        weights.append(attention_probabilities(Operands(q, k, v), pack_of(call), options))
    assert_equal_in_float64(weights[1], weights[0][:, 2:, 16:])
    assert (weights[1] < 0).any(), "dropout drops some"


@pytest.fixture
def large_tiles():
    """Makes the interpreter compute tiles of 64, which take it less time than smaller ones."""
    tile = TileConfig(64, 64, 4, 1)
    kernels = [f"{name}_{kind}" for name in ("varlen", "dual_chunk", "diff") for kind in PASSES]
    with override_configs(**dict.fromkeys(kernels, tile)):
        yield


PASSES = ("fwd", "dq", "dkv")


@by_attention
@pytest.mark.skipif(HAS_GPU, reason="test_runs_of_queries_on_a_gpu has a GPU")
def test_runs_of_queries_in_the_interpreter(attention, large_tiles):
    inputs = make_inputs(attention, LENGTHS, 2, 1, 16, torch.float16)
    assert_runs_of_queries(attention, inputs, RANKS[1:], "triton")


@by_attention
@pytest.mark.skipif(HAS_GPU, reason="test_slices_of_heads_on_a_gpu has a GPU")
def test_slices_of_heads_in_the_interpreter(attention, large_tiles):
    inputs = make_inputs(attention, (40,), 4, 2, 16, torch.float16)
    assert_slices_of_heads(attention, inputs, [1], "triton")


EMULATED = [
    ("varlen", varlen, 128),
    ("dual_chunk", dual_chunk, 64),
    ("differential", differential, 64),
]


@pytest.mark.parametrize(("attention", "module", "head_dim"), EMULATED, ids=ATTENTIONS)
@pytest.mark.skipif(HAS_GPU, reason="the tests on a GPU run the kernels themselves")
def test_hopper_kernels_in_the_emulator(attention, module, head_dim, monkeypatch):
    """With dropout, only varlen attention has a Hopper backward."""
    forward = attention != "varlen"
    emulate(monkeypatch, module)
    inputs = make_inputs(attention, LENGTHS, 2, 1, head_dim, torch.float16)
    assert_runs_of_queries(attention, inputs, RANKS[1:], "hopper", forward=forward)
    inputs = make_inputs(attention, (70,), 4, 2, head_dim, torch.float16)
    assert_slices_of_heads(attention, inputs, [1], "hopper", forward=forward)


BACKENDS = [
    pytest.param("triton", marks=pytest.mark.gpu),
    pytest.param("auto", marks=[pytest.mark.gpu, pytest.mark.hopper], id="hopper"),
]


@by_attention
@pytest.mark.parametrize("backend", BACKENDS)
def test_runs_of_queries_on_a_gpu(backend, attention, device):
    inputs = make_inputs(attention, GPU_LENGTHS, 4, 2, 128, torch.bfloat16, device)
    assert_runs_of_queries(attention, inputs, GPU_RANKS, backend)


@by_attention
@pytest.mark.parametrize("backend", BACKENDS)
def test_slices_of_heads_on_a_gpu(backend, attention, device):
    inputs = make_inputs(attention, GPU_LENGTHS, 4, 2, 128, torch.bfloat16, device)
    assert_slices_of_heads(attention, inputs, [0, 1], backend)


@pytest.mark.gpu
@by_attention
def test_ranks_compile_no_kernel_of_their_own(attention, device):
    """Query offsets and first heads change; after the first rank, no kernel is compiled."""
    inputs = make_inputs(attention, (300, 640), 4, 2, 128, torch.bfloat16, device)
    counts = []
    for start, first_head in ((128, 1), (256, 2), (128, 16), (16, 8)):
        shard = queries_of_a_rank(inputs, [(start, 300), (0, 640)])
        run(attention, dataclasses.replace(shard, first_head=first_head), "auto")
        counts.append(compiled_kernels())
    assert len(set(counts)) == 1, f"compiled for these ranks: {counts}"
