"""Tests which calls run on the Hopper kernels, and which on the portable ones, without a GPU."""

import pytest
import torch

from lctrain.kernels import select_backend
from lctrain_kernels.gluon import support
from lctrain_kernels.gluon.support import (
    BACKWARD_LIMITS,
    FORWARD_LIMITS,
    Call,
    refusal,
)


def call(head_dim=128, dtype=torch.bfloat16, value_dim=None, keys=10, **options) -> Call:
    q = torch.zeros(10, 4, head_dim, dtype=dtype)
    k = torch.zeros(keys, 2, head_dim, dtype=dtype)
    v = torch.zeros(keys, 2, value_dim or head_dim, dtype=dtype)
    return Call(q, k, v, **options)


_SERVED = [
    (head_dim, {"dropout": dropout}) for head_dim in (8, 64, 128, 256) for dropout in (False, True)
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
        (
            {"head_dim": 256, "deterministic": True},
            "a deterministic backward of head dims above 128",
        ),
        ({"head_dim": 64, "deterministic": True}, "a deterministic backward of head dims up to 64"),
        ({"dout": torch.zeros(10, 4, 132, dtype=torch.bfloat16)[..., :128]}, "gradient of out"),
    ],
    ids=["D256-deterministic", "D64-deterministic", "dout"],
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
