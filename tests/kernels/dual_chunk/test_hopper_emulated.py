"""Tests the Hopper kernels of dual chunk attention in the emulator: float64, dropout, isolation.

Only in float16: the kernels that rotate q and k run in Triton's interpreter, which rounds to
bfloat16 towards zero. test_hopper_gpu.py tests bfloat16 on the hardware.
"""

import dataclasses

import pytest
import torch

from lctrain_kernels.dual_chunk import api
from lctrain_kernels.dual_chunk import hopper as dual_chunk
from lctrain_kernels.dual_chunk.hopper_support import BackwardForm, override_backward
from lctrain_kernels.gluon.config import BackwardTile
from tests.kernels.gluon_emulator import emulate
from tests.kernels.oracle import (
    DROPOUT_SEED,
    Case,
    assert_matches_oracle,
    attention,
    dense,
    equal_lengths,
    frequencies,
    make_inputs,
)
from tests.numerics import assert_error_at_most_twice

pytestmark = [
    pytest.mark.usefixtures("nan_filled_memory"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="test_hopper_gpu.py has a GPU"),
]

# Chunks of 147 tokens: c, c + 1, S + 1, S + 2, none, one, and three chunks.
PLAIN = Case(equal_lengths(147, 148, 201, 202, 0, 1, 330), 2, 1, 64, chunks=(200, 53))
UNEQUAL = ((64, 329), (229, 64), (1, 400), (65, 0), (100, 240))
CASES = {
    "D64-g2": PLAIN,
    # The first query that would see INTER keys, at 200, is behind the end. Its block begins at 192.
    "D64-no_inter": Case(equal_lengths(200, 195, 193), 2, 1, 64, chunks=(200, 53)),
    "D64-unequal": dataclasses.replace(PLAIN, documents=UNEQUAL),
    "D64-many_chunks": Case(equal_lengths(390, 45), 1, 1, 64, chunks=(70, 22), dout_order="htd"),
    "D64-chunks_smaller_than_tiles": Case(equal_lengths(150, 77), 2, 1, 64, chunks=(40, 11)),
    "D64-chunks_of_three": Case(equal_lengths(70, 7), 1, 1, 64, chunks=(4, 1)),
    "D64-local_size_0": Case(equal_lengths(300, 20), 2, 2, 64, chunks=(147, 0)),
    "D64-local_size_close": Case(equal_lengths(280), 2, 1, 64, chunks=(200, 150)),
    # A tile of keys in two chunks, all of whose queries are near: in one run of blocks.
    "D64-local_size_half": Case(equal_lengths(500), 1, 1, 64, chunks=(290, 145)),
    "D64-large_logits": dataclasses.replace(PLAIN, magnitude=30.0),
    "D128-g4": Case(equal_lengths(20, 203), 4, 1, 128, chunks=(100, 30), dout_order="tdh"),
    "D128-scale-fused_qkv": Case(
        equal_lengths(90, 160), 2, 2, 128, chunks=(60, 11), logit_scale=True, fused_qkv=True
    ),
    "D96-g3": Case(equal_lengths(130), 3, 1, 96, chunks=(60, 11)),
    "D40": Case(equal_lengths(131, 20), 2, 2, 40, chunks=(60, 11)),
}
DROPOUT_CASES = {
    "D64-g4": Case(UNEQUAL, 4, 1, 64, chunks=(100, 30), dropout_p=0.3, logit_scale=True),
    "D128-g1": Case(equal_lengths(60, 210), 1, 1, 128, chunks=(77, 30), dropout_p=0.2),
}


def forward(case, inputs, backend="hopper"):
    """Returns (out, lse), without gradients."""
    options = {"dropout_p": case.dropout_p, "dropout_seed": DROPOUT_SEED}
    with torch.no_grad():
        return api.dual_chunk_attn_varlen_func(
            inputs.q,
            inputs.k,
            inputs.v,
            inputs.cu_seqlens_q,
            max(queries for queries, _ in case.documents),
            inv_freq=frequencies(case, "cpu"),
            chunk_size=case.chunks[0],
            local_size=case.chunks[1],
            logit_scale=inputs.logit_scale,
            cu_seqlens_k=inputs.cu_seqlens_k,
            max_seqlen_k=max(keys for _, keys in case.documents),
            return_lse=True,
            backend=backend,
            **(options if case.dropout_p else {}),
        )


@pytest.fixture
def hopper(monkeypatch):
    """Makes backend="hopper" run on this CPU."""
    emulate(monkeypatch, dual_chunk)


FORMS = {
    "dq_warp": BackwardForm(BackwardTile(64, 2)),
    "dq_warp-full_weights": BackwardForm(BackwardTile(64, 2), full_weights=True),
    "later": BackwardForm(BackwardTile(64, 3, reduce_from_registers=True), full_weights=True),
}


@pytest.fixture(params=FORMS.values(), ids=FORMS.keys())
def form(request):
    """Replaces the form of the backward."""
    with override_backward(request.param):
        yield request.param


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_matches_float64(case, form, hopper):
    inputs = make_inputs(case)
    assert_matches_oracle(attention(case, inputs, backend="hopper"), case, inputs)


@pytest.mark.parametrize("case", DROPOUT_CASES.values(), ids=DROPOUT_CASES.keys())
def test_forward_of_dropout(case, hopper):
    inputs = make_inputs(case)
    out, lse = forward(case, inputs)
    exact, plain = (dense(case, inputs, dtype) for dtype in (torch.float64, case.dtype))
    assert_error_at_most_twice(out, plain.out, exact.out, "out")
    assert_error_at_most_twice(lse, plain.lse, exact.lse, "lse")


def test_a_named_backend_refuses_what_it_cannot_do(hopper):
    case = DROPOUT_CASES["D128-g1"]
    with pytest.raises(ValueError, match="does not serve the backward of dropout"):
        attention(case, make_inputs(case), backend="hopper")
    case = Case(equal_lengths(3), 1, 1, 256, chunks=(200, 53))
    with pytest.raises(ValueError, match="dual chunk attention of head dims above 128"):
        forward(case, make_inputs(case))


@pytest.mark.parametrize("seed", range(1, 6))
def test_whatever_the_order_of_warps_and_engines(seed, form, monkeypatch):
    """Products and copies complete as early or as late as their waits allow."""
    emulate(monkeypatch, dual_chunk, seed)
    case = Case(equal_lengths(150, 70), 2, 1, 64, chunks=(60, 11))
    inputs = make_inputs(case)
    assert_matches_oracle(attention(case, inputs, backend="hopper"), case, inputs)


@pytest.mark.parametrize("seed", [0, 2, 4, 5])
def test_queries_at_the_far_position_stay_while_they_are_needed(seed, monkeypatch):
    """With these seeds, releasing the queries' buffer one product too early fails the test."""
    emulate(monkeypatch, dual_chunk, seed)
    case = Case(equal_lengths(700), 4, 1, 64, chunks=(70, 10))
    inputs = make_inputs(case)
    out, _ = forward(case, inputs)
    exact, plain = (dense(case, inputs, dtype) for dtype in (torch.float64, case.dtype))
    assert_error_at_most_twice(out, plain.out, exact.out, "out")


@pytest.mark.parametrize("chunks", [(60, 11), (131, 50)], ids=["c49", "c81"])
def test_both_ways_to_add_dq_give_dk_and_dv_the_same_bits(chunks, hopper):
    """So a document keeps them in every pack, though a call chooses by its documents' lengths."""
    case = dataclasses.replace(PLAIN, documents=equal_lengths(330, 90), chunks=chunks)
    inputs = make_inputs(case)
    found = []
    for name in ("dq_warp-full_weights", "later"):
        with override_backward(FORMS[name]):
            found.append(dict(attention(case, inputs, backend="hopper").items()))
    for part in ("dk", "dv"):
        assert torch.equal(found[0][part], found[1][part]), part


def test_a_document_keeps_its_bits_whatever_its_neighbours(form, hopper):
    """Compares out, lse, dk and dv, but not dq, which programs add in varying order."""
    case = dataclasses.replace(PLAIN, documents=equal_lengths(100, 240, 30), chunks=(90, 20))
    inputs = make_inputs(case)
    before = dict(attention(case, inputs, backend="hopper").items())
    for tensor in (inputs.q, inputs.k, inputs.v):
        tensor[:100] = torch.nan
        tensor[340:] = torch.inf
    after = dict(attention(case, inputs, backend="hopper").items())
    assert torch.equal(before["lse"][:, 100:340], after["lse"][:, 100:340])
    for part in ("out", "dk", "dv"):
        assert torch.equal(before[part][100:340], after[part][100:340]), part
    assert after["dq"][100:340].isfinite().all()
