"""Tests which calls of differential attention the Hopper kernels serve, without a GPU."""

import dataclasses

import pytest
import torch

from lctrain.kernels import diff_attn_varlen_func
from lctrain_kernels import backend
from lctrain_kernels.differential.hopper_support import (
    BACKWARD_LIMITS,
    FORWARD_LIMITS,
    DifferentialCall,
)
from lctrain_kernels.gluon.support import refusal


def differential_call(
    head_dim=64, value_dim=128, two_k=True, dtype=torch.bfloat16, keys=10, **options
) -> DifferentialCall:
    q = torch.zeros(10, 4, head_dim, dtype=dtype)
    k = torch.zeros(keys, 2, head_dim, dtype=dtype)
    v = torch.zeros(keys, 2, value_dim, dtype=dtype)
    return DifferentialCall(q, q, k, k if two_k else None, v, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("head_dim", "value_dim", "two_k"),
    [(64, 128, True), (64, 64, True), (32, 64, False), (24, 48, True), (96, 96, False),
     (128, 128, False)],
)  # fmt: skip
def test_both_differential_passes_are_served(head_dim, value_dim, two_k, dtype):
    call = differential_call(head_dim, value_dim, two_k, dtype)
    assert refusal(call, FORWARD_LIMITS) is None
    assert refusal(call, BACKWARD_LIMITS) is None


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dtype": torch.float32}, "dtypes other than"),
        ({"head_dim": 96, "value_dim": 192}, "above 128"),
        ({"keys": 0}, "without keys"),
        ({"head_dim": 20, "value_dim": 40}, "multiples of 16 bytes"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_neither_differential_pass_is_served(options, reason):
    assert reason in refusal(differential_call(**options), FORWARD_LIMITS)
    assert reason in refusal(differential_call(**options), BACKWARD_LIMITS)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"head_dim": 96, "value_dim": 96}, "a k per branch"),
        ({"deterministic": True}, "deterministic"),
        ({"dropout": True}, "backward of dropout"),
        ({"dout": torch.zeros(10, 4, 132, dtype=torch.bfloat16)[..., :128]}, "gradient of out"),
    ],
    ids=["two_k", "deterministic", "dropout", "dout"],
)
def test_only_the_differential_forward_is_served(options, reason):
    assert refusal(differential_call(**options), FORWARD_LIMITS) is None
    assert reason in refusal(differential_call(**options), BACKWARD_LIMITS)


def test_every_branch_must_be_aligned():
    call = differential_call()
    for name in ("q1", "q2", "k1", "k2", "v"):
        expanded = getattr(call, name)[:1].expand(10, -1, -1)
        unaligned = dataclasses.replace(call, **{name: expanded})
        assert "16 bytes" in refusal(unaligned, FORWARD_LIMITS), name


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dropout_p": 0.1}, "does not serve the backward of dropout. Pass backend='auto'"),
        ({"value_dim": 256, "head_dim": 128}, "does not serve values of head dims above 128"),
    ],
    ids=["dropout", "values"],
)
def test_differential_attention_refuses_by_name(options, reason, monkeypatch):
    monkeypatch.setattr(backend, "hopper_serves", lambda device: True)
    dims = {name: options.pop(name) for name in ("head_dim", "value_dim") if name in options}
    call = differential_call(**dims)
    cu = torch.tensor([0, 10], dtype=torch.int32)
    q = call.q1.requires_grad_()
    arguments = (q, call.q2, call.k1, call.k2, call.v, torch.tensor(0.5), cu, 10)
    with pytest.raises(ValueError, match=reason):
        diff_attn_varlen_func(*arguments, backend="hopper", **options)
