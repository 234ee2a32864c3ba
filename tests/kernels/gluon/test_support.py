"""Which calls run on the Hopper kernels and which on the portable ones, decided without a GPU."""

import dataclasses

import pytest
import torch

from lctrain.kernels import diff_attn_varlen_func, select_backend
from lctrain_kernels import backend
from lctrain_kernels.gluon import support
from lctrain_kernels.gluon.support import (
    BACKWARD_LIMITS,
    DIFFERENTIAL_BACKWARD_LIMITS,
    DIFFERENTIAL_FORWARD_LIMITS,
    FORWARD_LIMITS,
    Call,
    DifferentialCall,
    refusal,
)


def call(head_dim=128, dtype=torch.bfloat16, value_dim=None, keys=10, **options) -> Call:
    q = torch.zeros(10, 4, head_dim, dtype=dtype)
    k = torch.zeros(keys, 2, head_dim, dtype=dtype)
    v = torch.zeros(keys, 2, value_dim or head_dim, dtype=dtype)
    return Call(q, k, v, **options)


_SERVED = [
    (head_dim, {"dropout": dropout}) for head_dim in (8, 64, 128) for dropout in (False, True)
]
_SERVED += [(head_dim, {"deterministic": True, "dropout": True}) for head_dim in (72, 96, 128)]


@pytest.mark.parametrize(("head_dim", "options"), _SERVED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_both_passes_are_served(head_dim, options, dtype):
    assert refusal(call(head_dim, dtype, **options), FORWARD_LIMITS) is None
    assert refusal(call(head_dim, dtype, **options), BACKWARD_LIMITS) is None


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dtype": torch.float32}, "dtypes other than"),
        ({"value_dim": 64}, "another head dim"),
        ({"head_dim": 264}, "above 256"),
        ({"keys": 0}, "without keys"),
        ({"alibi": True}, "ALiBi"),
        ({"head_dim": 20}, "multiples of 16 bytes"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_neither_pass_is_served(options, reason):
    assert reason in refusal(call(**options), FORWARD_LIMITS)
    assert reason in refusal(call(**options), BACKWARD_LIMITS)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"head_dim": 256}, "above 128"),
        ({"head_dim": 64, "deterministic": True}, "a deterministic backward of head dims up to 64"),
        ({"dout": torch.zeros(10, 4, 132, dtype=torch.bfloat16)[..., :128]}, "gradient of out"),
    ],
    ids=["D256", "D64-deterministic", "dout"],
)
def test_only_the_forward_is_served(options, reason):
    assert refusal(call(**options), FORWARD_LIMITS) is None
    assert reason in refusal(call(**options), BACKWARD_LIMITS)


def test_views_of_a_fused_projection_are_served():
    fused = torch.zeros(10, 8, 128, dtype=torch.bfloat16)
    q, k, v = fused.split([4, 2, 2], dim=1)
    assert refusal(Call(q, k, v), BACKWARD_LIMITS) is None
    assert "16 bytes" in refusal(Call(q[..., 4:68], k[..., :64], v[..., :64]), FORWARD_LIMITS)
    assert "16 bytes" in refusal(Call(q[:1].expand(10, -1, -1), k, v), FORWARD_LIMITS)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dtype": torch.float32}, "dtypes other than"),
        ({"head_dim": 136}, "dual chunk attention of head dims above 128"),
        ({"keys": 0}, "without keys"),
        ({"head_dim": 20}, "multiples of 16 bytes"),
    ],
    ids=["float32", "D136", "no_keys", "D20"],
)
def test_neither_pass_of_dual_chunk_attention_is_served(options, reason):
    assert reason in refusal(call(**options), support.DUAL_CHUNK_FORWARD_LIMITS)
    assert reason in refusal(call(**options), support.DUAL_CHUNK_BACKWARD_LIMITS)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, None),
        ({"deterministic": True}, "a deterministic backward"),
        ({"dropout": True}, "the backward of dropout"),
        ({"dout": torch.zeros(10, 4, 132, dtype=torch.bfloat16)[..., :128]},
         "a gradient of out whose strides are no multiples of 16 bytes"),
    ],
    ids=["plain", "deterministic", "dropout", "dout"],
)  # fmt: skip
def test_the_forward_of_dual_chunk_attention_is_served(options, reason):
    assert refusal(call(**options), support.DUAL_CHUNK_FORWARD_LIMITS) is None
    assert refusal(call(**options), support.DUAL_CHUNK_BACKWARD_LIMITS) == reason


def test_a_triton_that_is_not_known_is_said_once_to_be(recwarn):
    assert support.knows_triton((3, 6))
    assert support.knows_triton((3, 9))
    assert not support.knows_triton(None)
    assert not recwarn
    for version in ((3, 5), (3, 10)):
        with pytest.warns(UserWarning, match=r"know Triton 3\.6 to 3\.9, not 3\.\d+: .*portable"):
            assert not support.knows_triton(version)


def test_a_device_that_is_no_hopper_gpu(monkeypatch):
    monkeypatch.setattr(support, "_KNOWN_TRITON", True)
    monkeypatch.setattr(support, "_DEVICES", frozenset({1}))
    assert not support.available(torch.device("cpu"))
    assert not support.available(torch.device("cuda", 0))
    assert support.available(torch.device("cuda", 1))
    assert select_backend("cuda:1") == "hopper"
    assert select_backend("cuda:0") == "triton"
    monkeypatch.setattr(support, "_KNOWN_TRITON", False)
    assert select_backend("cuda:1") == "triton"


@pytest.mark.parametrize(
    ("device", "dtype", "message"),
    [
        ("cpu", torch.bfloat16, "needs tensors on a Hopper GPU"),
        ("cuda:0", torch.float32, "takes float16 or bfloat16, got torch.float32"),
    ],
)
def test_naming_it_where_it_cannot_serve(device, dtype, message):
    with pytest.raises(ValueError, match=message):
        select_backend(device, dtype, "hopper")


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
    assert refusal(call, DIFFERENTIAL_FORWARD_LIMITS) is None
    assert refusal(call, DIFFERENTIAL_BACKWARD_LIMITS) is None


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
    assert reason in refusal(differential_call(**options), DIFFERENTIAL_FORWARD_LIMITS)
    assert reason in refusal(differential_call(**options), DIFFERENTIAL_BACKWARD_LIMITS)


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
    assert refusal(differential_call(**options), DIFFERENTIAL_FORWARD_LIMITS) is None
    assert reason in refusal(differential_call(**options), DIFFERENTIAL_BACKWARD_LIMITS)


def test_every_branch_must_be_aligned():
    call = differential_call()
    for name in ("q1", "q2", "k1", "k2", "v"):
        expanded = getattr(call, name)[:1].expand(10, -1, -1)
        unaligned = dataclasses.replace(call, **{name: expanded})
        assert "16 bytes" in refusal(unaligned, DIFFERENTIAL_FORWARD_LIMITS), name


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
