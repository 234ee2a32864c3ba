"""Tests the Hopper kernels of varlen attention in the emulator: float64, dropout, isolation.

Documents are long enough for several tiles. test_hopper_gpu.py has the same tests on hardware.
"""

import dataclasses
import itertools

import pytest
import torch

from lctrain_kernels.gluon import config
from lctrain_kernels.varlen import hopper as varlen
from lctrain_kernels.varlen.hopper_bwd import BackwardPointers
from tests.kernels.gluon_emulator import emulate
from tests.kernels.oracle import (
    Case,
    assert_matches_oracle,
    attention,
    equal_lengths,
    make_inputs,
)

pytestmark = [
    pytest.mark.usefixtures("nan_filled_memory"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="test_hopper_gpu.py has a GPU"),
]

BFLOAT16, FLOAT16 = torch.bfloat16, torch.float16
LENGTHS = equal_lengths(150, 0, 1, 70)
UNEQUAL = ((70, 300), (130, 40), (1, 129), (65, 0), (0, 63))
PLAIN = Case(LENGTHS, 4, 2, 64, BFLOAT16, causal=True)
# With a sink, rows that see no key have an lse; whole blocks of them are nobody's.
BLIND = {
    "longer_queries": Case(((200, 60),), 2, 1, 128, BFLOAT16, causal=True, sink=True),
    "no_keys": Case(((65, 0), (70, 70)), 2, 1, 96, BFLOAT16, causal=True, sink=True),
}
CASES = {
    "D64-causal-g2": PLAIN,
    "D64-causal-unequal": dataclasses.replace(PLAIN, documents=UNEQUAL),
    "D64-full-unequal-g1-float16": Case(UNEQUAL, 2, 2, 64, FLOAT16, dout_order="tdh"),
    "D64-window-g4": Case(LENGTHS, 4, 1, 64, BFLOAT16, window=(40, 30)),
    "D64-window_left-causal-unequal": Case(UNEQUAL, 2, 1, 64, BFLOAT16, True, (50, -1)),
    "D64-window_right": Case(LENGTHS, 2, 2, 64, BFLOAT16, window=(-1, 37)),
    "D64-large_logits": dataclasses.replace(PLAIN, magnitude=30.0),
    "D64-dropout-g4": Case(UNEQUAL, 4, 1, 64, FLOAT16, dropout_p=0.3),
    "D128-causal-g8": Case(LENGTHS, 8, 1, 128, BFLOAT16, causal=True, fused_qkv=True),
    "D128-causal-g3": Case(LENGTHS, 3, 1, 128, BFLOAT16, causal=True, dout_order="htd"),
    "D96-softcap-sink-causal": Case(
        LENGTHS, 4, 2, 96, BFLOAT16, causal=True, softcap=3.0, sink=True
    ),
    "D40-full": Case(equal_lengths(131, 20), 2, 2, 40, FLOAT16),
    "D256-causal-g4": Case(LENGTHS, 4, 1, 256, BFLOAT16, causal=True, fused_qkv=True),
    "D96-causal-g4": Case(LENGTHS, 4, 1, 96, BFLOAT16, causal=True),
    "D72-window-unequal": Case(UNEQUAL, 2, 2, 72, FLOAT16, window=(40, 30)),
    "D200-window-unequal": Case(UNEQUAL, 2, 2, 200, FLOAT16, window=(40, 30), dout_order="htd"),
    "D256-everything": Case(
        *(UNEQUAL, 4, 1, 256, BFLOAT16, True, (100, -1)),
        window_on_device=True,
        softcap=20.0,
        sink=True,
        dropout_p=0.15,
    ),
    "D128-everything": Case(
        UNEQUAL,
        4,
        1,
        128,
        BFLOAT16,
        causal=True,
        window=(100, -1),
        window_on_device=True,
        softcap=20.0,
        sink=True,
        dropout_p=0.15,
        dout_order="htd",
    ),
}


@pytest.fixture
def hopper(monkeypatch):
    """Makes backend="hopper" run on this CPU."""
    emulate(monkeypatch, varlen)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_matches_float64(case, hopper):
    inputs = make_inputs(case)
    assert_matches_oracle(attention(case, inputs, backend="hopper"), case, inputs)


FORMS = {
    "adder": config.BackwardTile(64, 3),
    "registers": config.BackwardTile(64, 4, reduce_from_registers=True),
    "queries": config.BackwardTile(128, 3, reduce_from_registers=True),
}
FORMED = ("D64-causal-unequal", "D64-window-g4", "D128-causal-g3", "D64-dropout-g4")


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    ("name", "form"),
    [
        pytest.param(name, tile, id=f"{name}-{form}")
        for name, (form, tile) in itertools.product(FORMED, FORMS.items())
        if tile.block_m == 64 or (CASES[name].head_dim <= 64 and not CASES[name].dropout_p)
    ],
)
def test_forms_for_the_tuner(name, form, seed, hopper, monkeypatch):
    """Tests all backward variants that the tuner compares, including ones not in the table."""
    emulate(monkeypatch, varlen, seed)
    inputs = make_inputs(CASES[name])
    with config.override_tiles(backward=form):
        result = attention(CASES[name], inputs, backend="hopper")
    assert_matches_oracle(result, CASES[name], inputs)


@pytest.mark.parametrize(
    ("form", "head_dim"), [("registers", 40), ("queries", 40), (None, 136)], ids=str
)
@pytest.mark.parametrize("lengths", [(1,) * 60 + (70, 0, 2), (300,)], ids=["short", "long"])
def test_memory_of_partial_dq(lengths, form, head_dim, hopper, monkeypatch):
    """The float32 buffer has at most twice the rows of dq, however short the documents are."""
    sums = []

    def pointers(*tensors):
        sums.append(BackwardPointers(*tensors).dq_sum)
        return BackwardPointers(*tensors)

    monkeypatch.setattr(varlen, "BackwardPointers", pointers)
    case = Case(equal_lengths(*lengths), 2, 1, head_dim, FLOAT16, causal=True)
    inputs = make_inputs(case)
    with config.override_tiles(backward=FORMS.get(form)):
        result = attention(case, inputs, backend="hopper")
    assert_matches_oracle(result, case, inputs)
    assert inputs.q.numel() <= sums[0].numel() <= 2 * inputs.q.numel()


@pytest.mark.parametrize(
    "case",
    [
        Case(equal_lengths(300, 0, 70), 2, 1, 128, FLOAT16, causal=True),
        Case(UNEQUAL, 2, 1, 104, FLOAT16, window=(40, 30)),
    ],
    ids=["causal", "D104-window"],
)
def test_packs_of_long_documents_keep_the_bits_of_dk_and_dv(case, hopper):
    """Long documents add dq in another way; dk and dv of a document do not depend on its pack."""
    dim = case.head_dim
    adder, registers = (config.backward_tile(dim, False, True, long) for long in (False, True))
    assert (adder.reduce_from_registers, registers.reduce_from_registers) == (False, True)
    assert config.backward_tile(dim, True, True, True) == adder
    inputs = make_inputs(case)
    results = []
    for form in (adder, registers):
        with config.override_tiles(backward=form):
            results.append(attention(case, inputs, backend="hopper"))
        assert_matches_oracle(results[-1], case, inputs)
    assert torch.equal(results[0].dk, results[1].dk)
    assert torch.equal(results[0].dv, results[1].dv)


@pytest.mark.parametrize("name", ["D64-causal-unequal", "D64-window-g4", "D128-causal-g3"])
def test_deterministic_backward(name, hopper):
    case = dataclasses.replace(CASES[name], head_dim=128)  # of 64, the portable kernels have it
    inputs = make_inputs(case)
    result = attention(case, inputs, backend="hopper", deterministic=True)
    assert_matches_oracle(result, case, inputs)


THREE = {
    "causal": Case(equal_lengths(450, 0, 1, 192, 193, 130), 2, 2, 64, BFLOAT16, causal=True),
    "unequal-causal-sink": Case(
        ((200, 500), (400, 100), (1, 129), (65, 0), (385, 385)), 2, 2, 64, FLOAT16, True, sink=True
    ),
    "window-softcap": Case(equal_lengths(400, 70), 1, 1, 64, BFLOAT16, window=(100, 30), softcap=3),
    "full": Case(((300, 70), (130, 200)), 3, 3, 40, BFLOAT16),
    "two-for-g2": PLAIN,
    "two-for-dropout": Case(UNEQUAL, 1, 1, 64, FLOAT16, causal=True, dropout_p=0.3),
}


@pytest.mark.parametrize("block_n", [64, 128])
@pytest.mark.parametrize("case", THREE.values(), ids=THREE.keys())
def test_forward_with_three_warpgroups(case, block_n, hopper, monkeypatch):
    emulate(monkeypatch, varlen, seed=block_n)
    inputs = make_inputs(case)
    with config.override_tiles(forward=config.ForwardTile(block_n, 3, 2, consumers=3)):
        result = attention(case, inputs, backend="hopper")
    assert_matches_oracle(result, case, inputs)


GROWING = {
    "D64-three_warpgroups": Case(equal_lengths(600), 1, 1, 64, BFLOAT16, causal=True),
    "D128-g4-float16": Case(equal_lengths(600), 4, 1, 128, FLOAT16, causal=True),
    "D64-window-sink": Case(equal_lengths(600), 2, 1, 64, FLOAT16, window=(300, 0), sink=True),
}


@pytest.mark.parametrize(
    ("name", "step"),
    [
        *itertools.product(["D64-three_warpgroups"], [0.2, 1.0, 8.0, -1.0]),
        *itertools.product(["D128-g4-float16"], [0.2, 8.0]),
        *itertools.product(["D64-window-sink"], [1.0, -1.0]),
    ],
)
def test_logits_that_grow_from_block_to_block(name, step, hopper):
    """Logits grow by less or by more than the threshold at which the running maximum is raised.

    Kernels visit blocks of keys from the last to the first.
    """
    case = GROWING[name]
    inputs = make_inputs(case)
    with torch.no_grad():
        inputs.q[..., 0] = 8.0
        inputs.k[..., 0] = torch.arange(600)[:, None] // 64 * -step
    assert_matches_oracle(attention(case, inputs, backend="hopper"), case, inputs)


@pytest.mark.parametrize("case", BLIND.values(), ids=BLIND.keys())
@pytest.mark.parametrize("deterministic", [False, True], ids=["ordered", "deterministic"])
def test_blocks_that_see_no_key_have_no_gradient(deterministic, case, hopper):
    inputs = make_inputs(case)
    result = attention(case, inputs, backend="hopper", deterministic=deterministic)
    assert_matches_oracle(result, case, inputs)
    assert (result.dq[:65] == 0).all()


@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_queries_of_several_tiles_ahead(stages, seed, monkeypatch):
    emulate(monkeypatch, varlen, seed)
    case = Case(equal_lengths(150, 100, 60), 2, 1, 64, BFLOAT16, causal=True)
    inputs = make_inputs(case)
    with config.override_tiles(forward=config.forward_tile(64, 2, False)._replace(q_stages=stages)):
        result = attention(case, inputs, backend="hopper")
    assert_matches_oracle(result, case, inputs)


@pytest.mark.parametrize("seed", range(1, 6))
def test_whatever_the_order_of_warps_and_engines(seed, monkeypatch):
    """Products and copies complete as early or as late as their waits allow."""
    emulate(monkeypatch, varlen, seed)
    case = Case(equal_lengths(150, 70), 2, 1, 64, BFLOAT16, causal=True)
    inputs = make_inputs(case)
    assert_matches_oracle(attention(case, inputs, backend="hopper"), case, inputs)


@pytest.mark.parametrize(
    ("window", "documents", "group"),
    [
        ((-1, 0), equal_lengths(500, 70), 1),
        ((-1, -1), ((140, 400), (200, 20)), 2),
        ((300, 0), equal_lengths(600), 1),
        ((260, 130), ((500, 540), (1, 200)), 1),
    ],
    ids=["causal", "full-unequal-g2", "window", "window-unequal"],
)
def test_deterministic_gradients_whatever_the_order(window, documents, group, hopper, monkeypatch):
    """Programs add to dq in a fixed order, and each sees the additions before its own."""
    case = Case(documents, group, 1, 128, BFLOAT16, window=window)
    inputs = make_inputs(case)
    sums = float32_sums(monkeypatch)
    for deterministic in (True, False):
        sums.clear()
        for seed in range(4):
            emulate(monkeypatch, varlen, seed)
            result = attention(case, inputs, backend="hopper", deterministic=deterministic)
            if differ := not torch.equal(sums[-1], sums[0]):
                break
        assert differ != deterministic
        assert_matches_oracle(result, case, inputs)


def float32_sums(monkeypatch):
    """Returns a list that collects the float32 dq, whose rounding would hide the order."""
    sums = []
    describe = varlen.ragged_descriptor

    def described(tensor, rows, columns):
        if tensor.dtype == torch.float32:
            sums.append(tensor)
        return describe(tensor, rows, columns)

    monkeypatch.setattr(varlen, "ragged_descriptor", described)
    return sums


@pytest.mark.parametrize(
    ("dropout_p", "form"),
    [(0.0, "adder"), (0.0, "registers"), (0.0, "queries"), (0.2, "adder"), (0.2, "registers")],
)
def test_a_document_keeps_its_bits_whatever_its_neighbours(dropout_p, form, hopper):
    """Compares out, lse, dk and dv, but not dq, which programs add in varying order."""
    with config.override_tiles(backward=FORMS[form]):
        assert_isolated(dropout_p)


def test_blocks_of_queries_by_features():
    """Dropout and a softcap need the registers of 64 queries; the dQ warp adds no more."""
    large = config.BackwardTile(128, 2, reduce_from_registers=True)
    assert config.backward_tile(64, deterministic=False, plain=True).block_m == 128
    with config.override_tiles(backward=large):
        assert config.backward_tile(64, deterministic=False, plain=True) == large
        assert config.backward_tile(64, deterministic=False, plain=False).block_m == 64
        ordered = config.backward_tile(64, deterministic=True, plain=True)
        assert (ordered.block_m, ordered.reduce_from_registers) == (64, False)


def assert_isolated(dropout_p):
    case = dataclasses.replace(PLAIN, documents=equal_lengths(100, 140, 30), dropout_p=dropout_p)
    inputs = make_inputs(case)
    before = dict(attention(case, inputs, backend="hopper").items())
    for tensor in (inputs.q, inputs.k, inputs.v):
        tensor[:100] = torch.nan
        tensor[240:] = torch.inf
    after = dict(attention(case, inputs, backend="hopper").items())
    assert torch.equal(before["lse"][:, 100:240], after["lse"][:, 100:240])
    for part in ("out", "dk", "dv"):
        assert torch.equal(before[part][100:240], after[part][100:240]), part
    assert after["dq"][100:240].isfinite().all()
