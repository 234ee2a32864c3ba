"""Tests the registry of implementations, and the arguments of the operators."""

import functools
from pathlib import Path

import pytest
import torch

from lctrain.kernels import rms_norm  # registers all operations, too
from lctrain_kernels.fused_backend import FusedCall, fused_backend
from lctrain_kernels.options import AttentionOptions
from lctrain_kernels.pack import PackTensors
from lctrain_kernels.registry import BACKWARD, FORWARD, choose, refusals, require_backend
from lctrain_kernels.serving import FUSED, fused_matrix, serving, support_matrix
from lctrain_kernels.varlen.operators import Operands

ROOT = Path(__file__).parents[2]

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
    wide, fixed = operands(256), options(deterministic=True)
    assert choose("varlen", FORWARD, wide, fixed).backend == "hopper"
    assert choose("varlen", BACKWARD, wide, fixed).backend == "triton"
    assert choose("varlen", BACKWARD, wide, options()).backend == "hopper"


def test_a_named_backend_refuses_what_a_gradient_will_ask_for():
    fixed = options(deterministic=True)
    require_backend("varlen", operands(256), fixed, operands(256))
    trained = operands(256, requires_grad=True)
    require_backend("varlen", trained, options(), trained)
    message = "does not serve a deterministic backward of head dims above 128"
    with pytest.raises(ValueError, match=message):
        require_backend("varlen", trained, fixed, trained)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_operators_take_the_fields_of_both_nouns(attention):
    """Operators take the fields of PackTensors and AttentionOptions; the backward takes more."""
    forward, backward = (
        [argument.name for argument in getattr(torch.ops.lctrain, name).default._schema.arguments]
        for name in (f"{attention}_forward", f"{attention}_backward")
    )
    shared = [*PackTensors._fields, *AttentionOptions._fields]
    assert forward[-len(shared) :] == shared
    assert set(forward) < set(backward)


def test_what_a_model_of_dual_chunk_attention_is_told():
    assert serving("dual_chunk", 128, torch.bfloat16) == "hopper"
    told = serving("dual_chunk", 256, torch.bfloat16)
    assert told == "triton (not hopper: dual chunk attention of head dims above 128)"


def test_what_a_model_is_told():
    assert serving("varlen", 128, torch.bfloat16) == "hopper"
    assert serving("varlen", 256, torch.bfloat16) == "hopper"
    told = serving("varlen", 256, torch.bfloat16, deterministic=True)
    assert told == "hopper, and triton for a deterministic backward of head dims above 128"
    told = serving("varlen", 320, torch.bfloat16)
    assert told == "triton (not hopper: head dims above 256)"
    assert serving("varlen", 128, torch.bfloat16, deterministic=True) == "hopper"
    told = serving("varlen", 64, torch.bfloat16, deterministic=True)
    assert told == "hopper, and triton for a deterministic backward of head dims up to 64"
    told = serving("dual_chunk", 128, torch.bfloat16, deterministic=True)
    assert told == "hopper, and triton for a deterministic backward"


def test_what_a_differential_model_is_told():
    told_of = functools.partial(serving, "differential", dtype=torch.bfloat16)
    assert told_of(64, value_dim=128) == "hopper"
    assert told_of(128, shared_k=True) == "hopper"
    told = told_of(128)
    assert told == "hopper, and triton for the backward of head dims above 64 with a k per branch"
    assert told_of(128, value_dim=256) == "triton (not hopper: values of head dims above 128)"


def test_the_support_matrix_is_that_of_the_registry():
    """docs/support.md agrees with the registry."""
    page = (ROOT / "docs" / "support.md").read_text()
    for row in (*support_matrix(), *fused_matrix()):
        assert f"| {' | '.join(row)} |" in page, row


@pytest.mark.parametrize("operation", FUSED)
def test_fused_operations_say_what_they_refuse(operation):
    """rotary has no BACKWARD of its own: it rotates back by the forward."""
    wide = FusedCall(torch.device("cuda"), torch.float64)
    half = wide._replace(dtype=torch.bfloat16)
    for direction in (FORWARD,) if operation == "rotary" else (FORWARD, BACKWARD):
        found = refusals(operation, direction, wide, None)
        assert found.keys() == {"triton", "pytorch"}
        assert found["pytorch"] is None
        assert "torch.float64, but" in found["triton"]
        assert refusals(operation, direction, half, None) == {"triton": None, "pytorch": None}


@pytest.mark.parametrize("operation", FUSED)
def test_a_named_fused_backend_says_why_it_cannot_serve(operation, monkeypatch):
    monkeypatch.setattr("lctrain_kernels.fused_backend.interpreting", lambda: False)
    call = FusedCall(torch.device("cpu"), torch.bfloat16)
    assert fused_backend(operation, call) == "pytorch"
    message = r"backend='triton' does not serve tensors on cpu, unless TRITON_INTERPRET=1 .* Pass"
    with pytest.raises(ValueError, match=message):
        fused_backend(operation, call, "triton")
    with pytest.raises(ValueError, match="backend must be one of auto, triton, pytorch, got 'gpu'"):
        fused_backend(operation, call, "gpu")


def test_a_fused_backend_without_triton(monkeypatch):
    monkeypatch.setattr("lctrain_kernels.fused_backend.TRITON_INSTALLED", False)
    call = FusedCall(torch.device("cuda"), torch.bfloat16)
    assert fused_backend("norm", call) == "pytorch"
    with pytest.raises(ValueError, match="does not serve a Python without the package triton"):
        fused_backend("norm", call, "triton")


def test_rows_beyond_the_kernels_of_a_norm():
    call = FusedCall(torch.device("cuda"), torch.bfloat16, 32769)
    assert fused_backend("norm", call) == "pytorch"
    with pytest.raises(ValueError, match="does not serve rows of more than 32768 columns"):
        fused_backend("norm", call, "triton")


def test_the_choice_of_a_fused_backend_is_traced(monkeypatch):
    """On a GPU, torch.compile(fullgraph=True) traces the refusals; here the kernel is not run."""
    monkeypatch.setattr("lctrain_kernels.fused_backend.interpreting", lambda: True)

    class Norm(torch.nn.Module):
        def forward(self, x, weight):
            return rms_norm(x, weight, backend="triton")

    torch._dynamo.reset()
    program = torch.export.export(Norm(), (torch.randn(4, 8), torch.ones(8)), strict=True)
    calls = [node for node in program.graph.nodes if "lctrain.norm" in str(node.target)]
    assert [node.args[-1] for node in calls] == ["triton"]
