"""Tests the Hopper kernels of varlen attention on a GPU: float64, dropout, isolation, refusals."""

import dataclasses

import pytest
import torch

from lctrain.kernels import flash_attn_varlen_func, select_backend
from lctrain_kernels.gluon import config
from tests.kernels.cases import GPU_CASES, GPU_PLAIN
from tests.kernels.oracle import (
    Case,
    assert_matches_oracle,
    attention,
    cumulative,
    equal_lengths,
    make_inputs,
)

pytestmark = [pytest.mark.gpu, pytest.mark.hopper, pytest.mark.usefixtures("nan_filled_memory")]

CASES = {name: case for name, case in GPU_CASES.items() if case.dtype != torch.float32}
LONG = equal_lengths(1000, 0, 517, 1, 300, 129, 2100)
LONG_CASES = {
    "D128-causal-g4": Case(LONG, 8, 2, 128, torch.bfloat16, causal=True),
    "D128-causal-g2": Case(LONG, 4, 2, 128, torch.bfloat16, causal=True),
    "D128-full-g1": Case(LONG, 2, 2, 128, torch.bfloat16),
    "D128-dropout-g8": Case(LONG, 8, 1, 128, torch.bfloat16, causal=True, dropout_p=0.1),
    "D128-window-softcap": Case(
        LONG, 4, 1, 128, torch.bfloat16, causal=True, window=(200, -1), softcap=10.0
    ),
    "D128-window-g1": Case(LONG, 2, 2, 128, torch.bfloat16, window=(300, 100)),
    "D64-causal-g1": Case(LONG, 4, 4, 64, torch.bfloat16, causal=True),
    "D64-dropout-window-g1": Case(LONG, 4, 4, 64, torch.bfloat16, window=(300, 100), dropout_p=0.2),
    "D96-causal-g4": Case(LONG, 4, 1, 96, torch.bfloat16, causal=True),
    "D256-causal-g4": Case(LONG, 4, 1, 256, torch.bfloat16, causal=True),
    "D256-dropout-softcap": Case(
        LONG, 4, 1, 256, torch.bfloat16, causal=True, dropout_p=0.1, softcap=10.0
    ),
    "D128-one_long": Case(equal_lengths(4500), 4, 1, 128, torch.bfloat16, causal=True),
    "D128-large_logits": Case(LONG, 4, 1, 128, torch.bfloat16, causal=True, magnitude=30.0),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_matches_float64(case, device):
    """The portable kernels' cases; calls that the Hopper kernels refuse run on portable kernels."""
    inputs = make_inputs(case, device)
    assert select_backend(device, case.dtype) == "hopper"
    assert_matches_oracle(attention(case, inputs), case, inputs)


@pytest.mark.parametrize("case", LONG_CASES.values(), ids=LONG_CASES.keys())
def test_documents_of_many_tiles(case, device):
    inputs = make_inputs(case, device)
    assert_matches_oracle(attention(case, inputs), case, inputs)


@pytest.mark.parametrize("name", ["D128-causal-g4", "D64-causal", "D96-window-g1"])
def test_named(name, device):
    case = GPU_CASES[name]
    inputs = make_inputs(case, device)
    assert_matches_oracle(attention(case, inputs, backend="hopper"), case, inputs)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("D128-everything-g8", "ALiBi"),
    ],
)
def test_a_named_backend_refuses_what_it_cannot_do(name, reason, device):
    case = GPU_CASES[name]
    with pytest.raises(ValueError, match=reason):
        attention(case, make_inputs(case, device), backend="hopper")


@pytest.mark.parametrize("heads", [(4, 1), (2, 2)], ids=["g4", "g1"])
def test_drops_the_same_weights_as_the_portable_kernels(heads, device):
    """With uniform weights and one-hot values, out shows the mask."""
    lengths = (128, 77, 1, 128)
    cu = cumulative(lengths, device)
    q = torch.zeros(sum(lengths), heads[0], 128, device=device, dtype=torch.bfloat16)
    k = torch.zeros(sum(lengths), heads[1], 128, device=device, dtype=torch.bfloat16)
    eye = torch.cat([torch.eye(128, device=device, dtype=torch.bfloat16)[:n] for n in lengths])
    v = eye[:, None].expand(-1, heads[1], -1).contiguous()
    kept = {}
    for backend in ("hopper", "triton"):
        out = flash_attn_varlen_func(
            q, k, v, cu, cu, 128, 128, 0.3, causal=True, dropout_seed=77, backend=backend
        )
        kept[backend] = out != 0
    visible = heads[0] * sum(n * (n + 1) // 2 for n in lengths)
    assert 0.65 < kept["triton"].sum().item() / visible < 0.75
    assert torch.equal(kept["hopper"], kept["triton"])


@pytest.mark.parametrize("name", ["D128-causal-g4", "D64-dropout-window-g1", "D256-causal-g4"])
def test_a_document_keeps_its_bits_whatever_its_neighbours(name, device):
    """Compares out, lse, dk and dv, but not dq, which programs add in varying order."""
    case = LONG_CASES[name]
    inputs = make_inputs(case, device)
    before = dict(attention(case, inputs).items())
    begin = sum(length for length, _ in LONG[:2])
    end = begin + LONG[2][0]
    for tensor in (inputs.q, inputs.k, inputs.v):
        with torch.no_grad():
            tensor[:begin] = torch.nan
            tensor[end:] = torch.inf
    after = dict(attention(case, inputs).items())
    for part, tensor in before.items():
        if part.startswith("lse"):
            assert torch.equal(tensor[:, begin:end], after[part][:, begin:end]), part
        elif part in ("out", "dk", "dv"):
            assert torch.equal(tensor[begin:end], after[part][begin:end]), part
        elif part == "dq":
            assert after[part][begin:end].isfinite().all()


@pytest.mark.parametrize(
    ("queries", "from_registers"),
    [(64, False), (64, True), (128, True)],
    ids=["adder", "registers", "queries"],
)
@pytest.mark.parametrize("name", [name for name in LONG_CASES if not name.startswith("D256")])
def test_all_ways_of_adding_dq(name, queries, from_registers, device):
    """The tile table uses one way per head dim and kind of call; the tuner compares all."""
    case = LONG_CASES[name]
    if queries == 128 and case.head_dim > 64:
        pytest.skip("blocks of 128 queries need the registers of D = 64")
    inputs = make_inputs(case, device)
    tile = config.BackwardTile(queries, 2, reduce_from_registers=from_registers)
    with config.override_tiles(backward=tile):
        result = attention(case, inputs, backend="hopper")
    assert_matches_oracle(result, case, inputs)


@pytest.mark.parametrize(
    "name", ["D128-causal-g4", "D128-dropout-g8", "D128-window-softcap", "D128-full-g1"]
)
def test_deterministic_gradients_keep_their_bits(name, device):
    options = {"deterministic": True, "backend": "hopper"}
    case = LONG_CASES[name]
    inputs = make_inputs(case, device)
    result = attention(case, inputs, **options)
    assert_matches_oracle(result, case, inputs)
    first = dict(result.items())
    for _ in range(20):
        for part, tensor in attention(case, inputs, **options).items():
            assert torch.equal(tensor, first[part]), part


@pytest.mark.parametrize("dropout_p", [0.0, 0.1], ids=["plain", "dropout"])
def test_two_thousand_documents(device, dropout_p):
    lengths = [(37 * index) % 90 for index in range(2000)]
    case = dataclasses.replace(GPU_PLAIN, documents=equal_lengths(*lengths), dropout_p=dropout_p)
    inputs = make_inputs(case, device)
    result = attention(case, inputs)
    assert_matches_oracle(result, case, inputs, sample=[*range(0, 2000, 61), 1999])
