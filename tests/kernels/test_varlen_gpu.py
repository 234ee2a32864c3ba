"""Varlen attention on a GPU against float64: the broad grid, the same body as test_varlen.py.

Every distinct combination of flags, head dim, group and dtype compiles three kernels, so the cases
cover pairs of features, not their product.
"""

import dataclasses

import pytest
import torch

from lctrain.kernels import select_backend
from tests.kernels.oracle import (
    Case,
    assert_matches_oracle,
    attention,
    equal_lengths,
    make_inputs,
)

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("nan_filled_memory")]

LENGTHS = equal_lengths(0, 1, 63, 64, 65, 127, 129, 300)
UNEQUAL = ((64, 129), (129, 64), (1, 127), (65, 0), (0, 63), (127, 127), (300, 20), (20, 300))
BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32

PLAIN = Case(LENGTHS, heads=4, heads_k=2, head_dim=64, dtype=BFLOAT16, causal=True)
CASES = {
    "D64-causal": PLAIN,
    "D64-causal-unequal": dataclasses.replace(PLAIN, documents=UNEQUAL),
    "D64-causal-large_logits": dataclasses.replace(PLAIN, magnitude=45.0),
    "D64-causal-fused_qkv": dataclasses.replace(PLAIN, fused_qkv=True, dout_order="htd"),
    "D64-causal-dropout": dataclasses.replace(PLAIN, dropout_p=0.1),
    "D64-full-unequal-g1": Case(UNEQUAL, heads_k=4, head_dim=64, dtype=BFLOAT16, dout_order="tdh"),
    "D64-window_left-causal": dataclasses.replace(PLAIN, window=(50, -1), documents=UNEQUAL),
    "D64-window_right": dataclasses.replace(PLAIN, causal=False, window=(-1, 37)),
    "D128-causal-g4": Case(LENGTHS, heads_k=1, head_dim=128, dtype=BFLOAT16, causal=True),
    "D128-full-dropout-g4-float16": Case(
        UNEQUAL, heads_k=1, head_dim=128, dtype=FLOAT16, dropout_p=0.3
    ),
    "D128-window-sink-causal": Case(
        UNEQUAL, head_dim=128, dtype=BFLOAT16, causal=True, window=(70, -1), sink=True
    ),
    "D128-everything-g8": Case(
        UNEQUAL,
        heads=16,
        head_dim=128,
        dtype=BFLOAT16,
        causal=True,
        window=(100, -1),
        window_on_device=True,
        softcap=20.0,
        alibi="documents",
        sink=True,
        dropout_p=0.15,
        dout_order="htd",
    ),
    "D80-causal-dropout-g8": Case(
        LENGTHS, heads=8, heads_k=1, head_dim=80, dtype=BFLOAT16, causal=True, dropout_p=0.5
    ),
    "D96-window-g1": Case(LENGTHS, heads_k=4, head_dim=96, dtype=BFLOAT16, window=(66, 12)),
    "D96-softcap-causal": Case(
        LENGTHS, head_dim=96, dtype=BFLOAT16, causal=True, softcap=3.0, magnitude=2.0
    ),
    "D256-causal-g4": Case(LENGTHS, heads_k=1, head_dim=256, dtype=BFLOAT16, causal=True),
    "D256-dropout-softcap-g1": Case(
        UNEQUAL, heads_k=4, head_dim=256, dtype=BFLOAT16, dropout_p=0.1, softcap=5.0
    ),
    "D20-causal-alibi-float16": Case(
        LENGTHS, head_dim=20, dtype=FLOAT16, causal=True, alibi="heads", sink=True
    ),
    "D40-full-dropout": Case(LENGTHS, head_dim=40, dtype=BFLOAT16, dropout_p=0.1),
    "D8-causal-g3": Case(LENGTHS, heads=3, heads_k=1, head_dim=8, dtype=BFLOAT16, causal=True),
    "D200-causal-fused_qkv": Case(
        LENGTHS, head_dim=200, dtype=FLOAT16, causal=True, fused_qkv=True
    ),
    "D64-causal-float32": dataclasses.replace(PLAIN, dtype=FLOAT32),
    "D72-window-dropout-float32": Case(
        UNEQUAL, head_dim=72, dtype=FLOAT32, window=(40, 40), dropout_p=0.2
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_matches_float64(case, device):
    inputs = make_inputs(case, device)
    assert_matches_oracle(attention(case, inputs, backend="triton"), case, inputs)


def test_large_logits_are_large(device):
    inputs = make_inputs(CASES["D64-causal-large_logits"], device)
    logits = inputs.q[:300, 0].float() @ inputs.k[:300, 0].float().T / 8
    assert 5e3 < logits.abs().max() < 2e4


def test_auto_is_triton(device):
    inputs = make_inputs(PLAIN, device)
    assert select_backend(device, BFLOAT16) == "triton"
    named = dict(attention(PLAIN, inputs, backend="triton").items())
    for name, tensor in attention(PLAIN, inputs, backend="auto").items():
        assert torch.equal(tensor, named[name]), name


@pytest.mark.parametrize("dropout_p", [0.0, 0.1], ids=["plain", "dropout"])
def test_two_thousand_documents(device, dropout_p):
    lengths = [(37 * index) % 90 for index in range(2000)]
    case = dataclasses.replace(PLAIN, documents=equal_lengths(*lengths), dropout_p=dropout_p)
    inputs = make_inputs(case, device)
    result = attention(case, inputs)
    for name, tensor in result.items():
        assert tensor.isfinite().all(), name
    assert_matches_oracle(result, case, inputs, sample=[*range(0, 2000, 61), 1999])


def test_a_hundred_thousand_tokens_beside_a_hundred_documents_of_twenty(device):
    lengths = [20] * 50 + [100_000] + [20] * 50
    case = dataclasses.replace(PLAIN, heads=2, heads_k=1, documents=equal_lengths(*lengths))
    inputs = make_inputs(case, device)
    result = attention(case, inputs)
    assert_matches_oracle(result, case, inputs, chunk=1024, sample=[0, 49, 50, 51, 100])
    short = [index for index, length in enumerate(lengths) if length == 20]
    assert_matches_oracle(result, case, inputs, sample=short)


def test_a_window_in_a_long_document(device):
    """Its ranges begin and end far from the document's ends."""
    case = dataclasses.replace(
        PLAIN, documents=((20_000, 20_000), (5_000, 20_000)), window=(50, -1)
    )
    inputs = make_inputs(case, device)
    assert_matches_oracle(attention(case, inputs), case, inputs, chunk=512)
