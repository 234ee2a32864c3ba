"""Tests the launch arguments of the Hopper kernels."""

import dataclasses

import pytest
import torch
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from lctrain_kernels.gluon.launch import ragged_descriptor


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_descriptor_passes_the_checks_that_it_leaves_out(dtype):
    tensor = torch.zeros(30, 2, 64, dtype=dtype)[:, 1:]
    made = ragged_descriptor(tensor, 64, 64)
    fields = {field.name: getattr(made, field.name) for field in dataclasses.fields(made)}
    assert made == TensorDescriptor(**fields)  # whose constructor checks all of them
    assert made.base is tensor
    assert (made.shape[3:], made.strides[3:]) == ([1, 64], [64, 1])


def test_descriptors_share_no_lists():
    tensor = torch.zeros(30, 2, 64, dtype=torch.float16)
    first, second = (ragged_descriptor(tensor, 64, 64) for _ in range(2))
    for name in ("shape", "strides", "block_shape"):
        assert getattr(first, name) is not getattr(second, name)
