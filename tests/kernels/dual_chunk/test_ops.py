"""Tests dual chunk attention with opcheck and torch.compile, and its errors on bad arguments."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from lctrain.kernels import dual_chunk_attn_varlen_func, flash_attn_varlen_func, make_schedule
from tests.kernels.oracle import Case, equal_lengths, frequencies, make_inputs

CASE = Case(equal_lengths(16, 9), dtype=torch.float32, dropout_p=0.2, logit_scale=True)
FORWARD = torch.ops.lctrain.dual_chunk_forward.default
BACKWARD = torch.ops.lctrain.dual_chunk_backward.default


def forward_arguments(*, schedule=None, requires_grad=True) -> tuple:
    inputs = make_inputs(CASE)
    leaves = [x.requires_grad_(requires_grad) for x in (inputs.q, inputs.k, inputs.v)]
    return (
        *leaves,
        frequencies(CASE, "cpu"),
        inputs.logit_scale,
        7,
        2,
        inputs.cu_seqlens_q,
        inputs.cu_seqlens_k,
        None if schedule is None else schedule.q_tiles,
        None if schedule is None else schedule.k_tiles,
        None,
        torch.tensor([16, 0], dtype=torch.int32),
        6,
        0.25,
        -1,
        0,
        None,
        0.0,
        CASE.dropout_p,
        torch.tensor([5]),
        3,
        None,
        None,
        False,
        "pytorch",
    )


@pytest.mark.parametrize("scheduled", [False, True], ids=["", "schedule"])
def test_opcheck_forward(scheduled):
    """Checks schema, autograd registration and fake implementation, also under AOT dispatch."""
    schedule = make_schedule([16, 9]) if scheduled else None
    torch.library.opcheck(FORWARD, forward_arguments(schedule=schedule))


@pytest.mark.parametrize("with_dlse", [False, True], ids=["", "dlse"])
def test_opcheck_backward(with_dlse):
    arguments = forward_arguments(requires_grad=False)
    out, lse = FORWARD(*arguments)
    dlse = torch.randn_like(lse) if with_dlse else None
    torch.library.opcheck(
        BACKWARD,
        (torch.randn_like(out), dlse, *arguments, out, lse),
        test_utils=("test_schema", "test_faketensor"),
    )


def call(q, k, v, cu, **options):
    arguments = {"inv_freq": frequencies(CASE, q.device), "chunk_size": 7, "local_size": 2}
    return dual_chunk_attn_varlen_func(q, k, v, cu, 16, **(arguments | options))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_as_one_graph(backend):
    torch._dynamo.reset()

    def function(q, k, v, cu):
        out, lse = call(q * 2, k, v, cu, dropout_p=0.2, dropout_seed=9, return_lse=True)
        return out.sin().sum() + lse.square().sum()

    inputs = make_inputs(CASE)
    leaves = [x.requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    results = []
    for run in (function, torch.compile(function, fullgraph=True, backend=backend)):
        loss = run(*leaves, inputs.cu_seqlens_q)
        results.append((loss, *torch.autograd.grad(loss, leaves)))
    for expected, actual in zip(*results, strict=True):
        assert torch.equal(actual, expected)


def test_checkpointing_replays_the_drawn_seed():
    inputs = make_inputs(CASE)
    leaves = [x.requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    results = []
    for recompute in (False, True):
        torch.manual_seed(3)

        def attend(*qkv):
            return call(*qkv, inputs.cu_seqlens_q, dropout_p=0.3)

        out = checkpoint(attend, *leaves, use_reentrant=False) if recompute else attend(*leaves)
        results.append(torch.autograd.grad(out.sin().sum(), leaves))
    for expected, actual in zip(*results, strict=True):
        assert torch.equal(actual, expected)


def test_flops_are_those_of_causal_attention():
    inputs = make_inputs(CASE)
    cu = inputs.cu_seqlens_q
    counts = []
    for attend in (
        lambda *qkv: call(*qkv, cu),
        lambda *qkv: flash_attn_varlen_func(*qkv, cu, cu, 16, 16, causal=True),
    ):
        leaves = [x.clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
        with FlopCounterMode(display=False) as counter:
            attend(*leaves).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


BAD = {
    "local_size-large": (
        {"local_size": 7},
        ValueError,
        r"local_size must be at least 0 and below chunk_size \(7\), got 7.*an eighth",
    ),
    "local_size-negative": ({"local_size": -1}, ValueError, "local_size must be at least 0"),
    "chunk_size-float": (
        {"chunk_size": 7.0},
        TypeError,
        "chunk_size must be a Python int, got float. Pass a number of tokens",
    ),
    "inv_freq-length": (
        {"inv_freq": torch.ones(4)},
        ValueError,
        r"inv_freq must have shape \[8\] \(head_dim / 2\), got \(4,\). Partial rotary",
    ),
    "inv_freq-dtype": (
        {"inv_freq": torch.ones(8, dtype=torch.float64)},
        TypeError,
        r"inv_freq must be a float32 tensor, got torch.float64. Call .float\(\)",
    ),
    "inv_freq-none": ({"inv_freq": None}, TypeError, "inv_freq must be a float32 tensor"),
    "inv_freq-device": (
        {"inv_freq": torch.ones(8, device="meta")},
        ValueError,
        r"inv_freq must be on q's device \(cpu\), got meta. Move it",
    ),
    "logit_scale-length": (
        {"logit_scale": torch.ones(3)},
        ValueError,
        r"logit_scale must have shape \[2\] \(one per document\), got \(3,\). Give every document",
    ),
    "logit_scale-negative": (
        {"logit_scale": torch.tensor([1.0, -1.0])},
        ValueError,
        r"logit_scale must be positive, got -1.0",
    ),
    "logit_scale-gradient": (
        {"logit_scale": torch.ones(2, requires_grad=True)},
        ValueError,
        r"logit_scale must not require a gradient.*Pass logit_scale.detach\(\)",
    ),
    "logit_scale-list": (
        {"logit_scale": [1.0, 1.0]},
        TypeError,
        "logit_scale must be a float32 tensor, got list",
    ),
    "cu_seqlens_k": (
        {"cu_seqlens_k": torch.tensor([0, 25], dtype=torch.int32)},
        ValueError,
        "cu_seqlens and cu_seqlens_k must describe the same documents, got 2 and 1",
    ),
    "max_seqlen_k": (
        {"max_seqlen_k": torch.tensor(16)},
        TypeError,
        "max_seqlen_k must be a Python int, got Tensor",
    ),
    "dropout": ({"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\), got 1.0"),
    "scale": ({"softmax_scale": 0.0}, ValueError, "softmax_scale must be finite and > 0"),
    "backend": ({"backend": "cuda"}, ValueError, "backend must be one of"),
    "schedule": (
        {"schedule": make_schedule([16, 8])},
        ValueError,
        "q must hold the 24 tokens that schedule was built for, got 25",
    ),
}


@pytest.mark.parametrize(("change", "error", "message"), BAD.values(), ids=BAD.keys())
def test_bad_arguments(change, error, message):
    inputs = make_inputs(CASE)
    with pytest.raises(error, match=message):
        call(inputs.q, inputs.k, inputs.v, inputs.cu_seqlens_q, **change)


def test_an_odd_head_dim_has_no_pairs():
    inputs = make_inputs(Case(equal_lengths(16), head_dim=15))
    with pytest.raises(ValueError, match=r"head_dim must be even, got 15.*flash_attn_varlen_func"):
        call(inputs.q, inputs.k, inputs.v, inputs.cu_seqlens_q)
