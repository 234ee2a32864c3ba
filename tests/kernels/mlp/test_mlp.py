import pytest
import torch
from torch.nn import functional

from lctrain_kernels.mlp import bias_gelu, gated_linear, geglu, swiglu
from tests.kernels.fused_cases import all_backends, assert_error_at_most_twice_plain

ACTIVATIONS = {
    "silu": functional.silu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "gelu": functional.gelu,
}


def ours(name: str, gate, up, backend):
    if name == "silu":
        return swiglu(gate, up, backend=backend)
    return geglu(gate, up, approximate="tanh" if name == "gelu_tanh" else "none", backend=backend)


@pytest.mark.parametrize("name", ACTIVATIONS)
@all_backends
def test_gated_activation(device, dtype, backend, name) -> None:
    gate, up = (3.0 * torch.randn(2, 3, 7, 33, device=device)).unbind()
    assert_error_at_most_twice_plain(
        lambda g, u: ours(name, g, u, backend),
        lambda g, u: ACTIVATIONS[name](g) * u,
        (gate, up),
        dtype,
    )


@pytest.mark.parametrize("name", ["silu", "gelu_tanh"])
@all_backends
def test_gate_and_up_side_by_side(device, dtype, backend, name) -> None:
    packed = torch.randn(5, 34, device=device)
    assert_error_at_most_twice_plain(
        lambda x: ours(name, x, None, backend),
        lambda x: ACTIVATIONS[name](x[:, :17]) * x[:, 17:],
        (packed,),
        dtype,
    )


@pytest.mark.parametrize("name", ACTIVATIONS)
@all_backends
def test_gated_linear_computes_the_product_again(device, dtype, backend, name) -> None:
    # In a few hundred entries, plain PyTorch's largest error is partly luck.
    gate, up = torch.randn(2, 3, 70, 133, device=device).unbind()
    assert_error_at_most_twice_plain(
        lambda g, u, w: gated_linear(g, u, w, activation=name, backend=backend),
        lambda g, u, w: functional.linear(ACTIVATIONS[name](g) * u, w),
        (gate, up, torch.randn(12, 133, device=device)),
        dtype,
    )


@all_backends
def test_gated_linear_adds_the_residual(device, dtype, backend) -> None:
    gate, up = torch.randn(2, 3, 7, 33, device=device).unbind()
    residual = torch.randn(3, 7, 12, device=device)
    assert_error_at_most_twice_plain(
        lambda g, u, w, r: gated_linear(g, u, w, residual=r, backend=backend),
        lambda g, u, w, r: functional.linear(functional.silu(g) * u, w) + r,
        (gate, up, torch.randn(12, 33, device=device), residual),
        dtype,
    )


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@all_backends
def test_bias_gelu(device, dtype, backend, approximate) -> None:
    assert_error_at_most_twice_plain(
        lambda x, b: bias_gelu(x, b, approximate=approximate, backend=backend),
        lambda x, b: functional.gelu(x + b, approximate=approximate),
        (torch.randn(37, 33, device=device), torch.randn(33, device=device)),
        dtype,
    )


@pytest.mark.parametrize("backend", ["pytorch", "triton"])
def test_nothing_is_written_into_saved_tensors(backend) -> None:
    gate, up = (t.requires_grad_() for t in torch.randn(2, 5, 8).unbind())
    before = gate.detach().clone(), up.detach().clone()
    out = swiglu(gate, up, backend=backend).sum()
    first = torch.autograd.grad(out, (gate, up), retain_graph=True)
    second = torch.autograd.grad(out, (gate, up))
    for a, b in zip((*first, gate, up), (*second, *before), strict=True):
        assert torch.equal(a, b)


def test_gated_linear_saves_gate_up_and_weight_alone() -> None:
    gate, up = (t.requires_grad_() for t in torch.randn(2, 5, 8).unbind())
    weight = torch.randn(3, 8, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape), lambda x: x):
        gated_linear(gate, up, weight)
    assert saved == [gate.shape, up.shape, weight.shape]


def test_gated_linear_under_autocast() -> None:
    gate, up = torch.randn(2, 5, 8).unbind()
    weight = torch.randn(3, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = gated_linear(gate, up, weight)
    out.sum().backward()
    assert (out.dtype, weight.grad.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("name", ["gated", "gated_packed", "gated_linear", "bias_gelu"])
def test_operators_satisfy_the_rules_of_torch_library(name) -> None:
    gate, up = (t.requires_grad_() for t in torch.randn(2, 5, 8).unbind())
    tensors = {
        "gated": (gate, up),
        "gated_packed": (gate,),
        "gated_linear": (gate, up, torch.randn(3, 8), torch.randn(len(gate), 3)),
        "bias_gelu": (gate, torch.randn(8)),
    }[name]
    activation = "gelu" if name == "bias_gelu" else "silu"
    operator = getattr(torch.ops.lctrain, name).default
    torch.library.opcheck(operator, (*tensors, activation, "pytorch"))


def test_compiled_graph_has_no_break() -> None:
    gate, up, weight, bias = torch.randn(5, 8), torch.randn(5, 8), torch.randn(3, 8), torch.randn(3)

    def function(gate, up, weight, bias):
        out = bias_gelu(gated_linear(swiglu(gate, up), up, weight), bias)
        return out.square().sum() + geglu(torch.cat((gate, up), -1)).sum()

    leaves = [tensor.requires_grad_() for tensor in (gate, up, weight, bias)]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    gradients = torch.autograd.grad(compiled(*leaves), leaves)
    assert all(map(torch.equal, gradients, torch.autograd.grad(function(*leaves), leaves)))


@pytest.mark.gpu
def test_more_elements_than_int32_counts() -> None:
    columns = 8192
    shape = (2**31 // columns + 8, columns)
    gate, up = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    tail = swiglu(gate, up)[-8:]
    assert torch.equal(tail, swiglu(gate[-8:].clone(), up[-8:].clone()))


BAD_CALLS = {
    "shapes": (lambda: swiglu(torch.ones(2, 3), torch.ones(2, 4)), "gate and up must be"),
    "odd": (lambda: swiglu(torch.ones(2, 3)), "gate without up must hold both"),
    "gelu": (lambda: geglu(torch.ones(2), approximate="sigmoid"), "approximate must be"),
    "weight": (
        lambda: gated_linear(torch.ones(2, 3), torch.ones(2, 3), torch.ones(4, 5)),
        "weight must be",
    ),
    "activation": (
        lambda: gated_linear(*torch.ones(2, 2, 3), torch.ones(4, 3), activation="relu"),
        "activation must be one of",
    ),
    "bias": (lambda: bias_gelu(torch.ones(2, 3), torch.ones(4)), "bias must have shape"),
    "integers": (lambda: bias_gelu(torch.ones(2, 3).long()), "x must be floating point"),
}


@pytest.mark.parametrize(("call", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_input_is_an_error_that_names_it(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()
