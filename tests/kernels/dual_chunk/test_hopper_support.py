"""Tests which calls of dual chunk attention the Hopper kernels serve, without a GPU."""

import pytest
import torch

from lctrain_kernels.dual_chunk.hopper_support import BACKWARD_LIMITS, FORWARD_LIMITS
from lctrain_kernels.gluon.support import refusal
from tests.kernels.gluon.test_support import call


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
def test_neither_pass_is_served(options, reason):
    assert reason in refusal(call(**options), FORWARD_LIMITS)
    assert reason in refusal(call(**options), BACKWARD_LIMITS)


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
def test_the_forward_is_served(options, reason):
    assert refusal(call(**options), FORWARD_LIMITS) is None
    assert refusal(call(**options), BACKWARD_LIMITS) == reason
