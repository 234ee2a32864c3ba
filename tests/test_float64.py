"""Float64 references: transformers' casts to float32 are left out, everybody else's are not."""

from types import ModuleType

import pytest
import torch

CASTS = """
import torch
from torch import Tensor

def by_to(states): return states.to(torch.float32)
def by_to_keyword(states): return states.to(dtype=torch.float32)
def by_float(states): return states.float()
def by_softmax(states): return torch.nn.functional.softmax(states, dim=-1, dtype=torch.float32)
def by_sum(states): return torch.sum(states, -1, dtype=torch.float32)
"""
NAMES = ["by_to", "by_to_keyword", "by_float", "by_softmax", "by_sum"]


def module(name):
    """A module that casts to float32."""
    made = ModuleType(name)
    exec(CASTS, vars(made))
    return made


@pytest.mark.parametrize("fixture", ["in_float64", "float64_stays_float64"])
@pytest.mark.parametrize("cast", NAMES)
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("transformers.models.llama.modeling_llama", torch.float64),
        ("lctrain.attention.flash", torch.float32),
        ("lctrain_kernels.norm.torch", torch.float32),
        ("tests.oracle", torch.float32),
    ],
)
def test_only_casts_of_transformers_are_left_out(request, fixture, cast, name, expected):
    request.getfixturevalue(fixture)
    states = torch.ones(2, 3, dtype=torch.float64)
    assert getattr(module(name), cast)(states).dtype == expected


@pytest.mark.usefixtures("in_float64")
def test_a_product_of_mixed_precision_is_an_error_outside_of_transformers():
    left, right = torch.ones(2, 2, dtype=torch.float32), torch.ones(2, 2, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="same dtype"):
        left @ right
