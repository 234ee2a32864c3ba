"""The registry of implementations, and how nouns reach the operators."""

import pytest
import torch

import lctrain_kernels  # noqa: F401  (registers the attentions)
from lctrain_kernels.options import AttentionOptions
from lctrain_kernels.pack import Pack
from lctrain_kernels.registry import BACKWARD, FORWARD, choose, refusals, require_backend
from lctrain_kernels.varlen.operators import Operands

ATTENTIONS = ("varlen", "dual_chunk", "differential")
CU_SEQLENS = torch.tensor([0, 3], dtype=torch.int32)


def operands(head_dim=64, *, requires_grad=False):
    x = torch.zeros(3, 2, head_dim, dtype=torch.bfloat16, requires_grad=requires_grad)
    return Operands(x, x, x)


def options(**changes):
    return AttentionOptions(softmax_scale=0.1, **{"backend": "hopper", **changes})


@pytest.mark.parametrize("direction", [FORWARD, BACKWARD])
def test_every_refusal_has_its_reason(direction):
    slopes = options(alibi_slopes=torch.zeros(2))
    found = refusals("varlen", direction, operands(), slopes)
    assert found == {"pytorch": None, "triton": None, "hopper": "ALiBi slopes"}


def test_a_refused_call_goes_to_the_next_implementation():
    assert choose("varlen", FORWARD, operands(), options()).backend == "hopper"
    slopes = options(alibi_slopes=torch.zeros(2))
    assert choose("varlen", FORWARD, operands(), slopes).backend == "triton"
    assert choose("varlen", FORWARD, operands(), options(backend="pytorch")).backend == "pytorch"


def test_passes_are_chosen_by_themselves():
    wide = operands(256)
    assert choose("varlen", FORWARD, wide, options()).backend == "hopper"
    assert choose("varlen", BACKWARD, wide, options()).backend == "triton"


def test_a_named_backend_refuses_what_a_gradient_will_ask_for():
    require_backend("varlen", operands(256), options(), operands(256))
    trained = operands(256, requires_grad=True)
    message = "does not serve the backward of head dims above 128"
    with pytest.raises(ValueError, match=message):
        require_backend("varlen", trained, options(), trained)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_operators_take_the_fields_of_both_nouns(attention):
    """The backward takes what the forward does, so that it recomputes the same weights."""
    forward, backward = (
        [argument.name for argument in getattr(torch.ops.lctrain, name).default._schema.arguments]
        for name in (f"{attention}_forward", f"{attention}_backward")
    )
    shared = [*Pack._fields, *AttentionOptions._fields]
    assert forward[-len(shared) :] == shared
    assert set(forward) < set(backward)
