import pytest
import torch
from torch.nn import functional

from lctrain_kernels.norm import fused_add_rms_norm, layer_norm, rms_norm, rms_norm_residual
from tests.kernels.fused_cases import all_backends, assert_error_at_most_twice_plain
from tests.numerics import assert_errors_at_most_twice

GEMMA = {"weight_offset": 1.0, "float32_product": True}


def plain_norm(x, weight, *, weight_offset=0.0, float32_product=False):
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
    if float32_product:
        return (wide * (weight_offset + weight.to(wide.dtype))).to(x.dtype)
    return weight * wide.to(x.dtype)


@pytest.mark.parametrize("columns", [8, 100, 384])
@pytest.mark.parametrize("options", [{}, GEMMA], ids=["llama", "gemma"])
@all_backends
def test_rms_norm(device, dtype, backend, options, columns) -> None:
    x, weight = torch.randn(3, 13, columns, device=device), torch.randn(columns, device=device)
    assert_error_at_most_twice_plain(
        lambda x, w: rms_norm(x, w, backend=backend, **options),
        lambda x, w: plain_norm(x, w, **options),
        (x, weight),
        dtype,
    )


@pytest.mark.parametrize("options", [{}, GEMMA], ids=["llama", "gemma"])
@all_backends
def test_fused_add_rms_norm_adds_the_gradient_of_the_sum(device, dtype, backend, options) -> None:
    x, residual = torch.randn(2, 37, 100, device=device).unbind()
    assert_error_at_most_twice_plain(
        lambda x, r, w: fused_add_rms_norm(x, r, w, backend=backend, **options),
        lambda x, r, w: (plain_norm(x + r, w, **options), x + r),
        (x, residual, torch.randn(100, device=device)),
        dtype,
    )


@pytest.mark.parametrize("options", [{}, GEMMA], ids=["llama", "gemma"])
@all_backends
def test_rms_norm_residual_adds_both_gradients_of_x(device, dtype, backend, options) -> None:
    x = torch.randn(37, 100, device=device)
    assert_error_at_most_twice_plain(
        lambda x, w: rms_norm_residual(x, w, backend=backend, **options),
        lambda x, w: (plain_norm(x, w, **options), x * 1.0),
        (x, torch.randn(100, device=device)),
        dtype,
    )


@pytest.mark.parametrize("used", [0, 1])
def test_one_result_of_rms_norm_residual_may_be_unused(used) -> None:
    x, weight = torch.randn(5, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    rms_norm_residual(x, weight)[used].sum().backward()
    expected = x.detach().clone().requires_grad_()
    (rms_norm(expected, weight) if used == 0 else expected).sum().backward()
    assert torch.equal(x.grad, expected.grad)
    assert (weight.grad is None) == (used == 1)


@pytest.mark.parametrize("columns", [8, 100])
@all_backends
def test_layer_norm(device, dtype, backend, columns) -> None:
    x = torch.randn(37, columns, device=device) + 2.0  # the mean matters
    assert_error_at_most_twice_plain(
        lambda x, w, b: layer_norm(x, w, b, backend=backend),
        lambda x, w, b: functional.layer_norm(x, (columns,), w, b),
        (x, torch.randn(columns, device=device), torch.randn(columns, device=device)),
        dtype,
    )


@pytest.mark.parametrize("backend", ["pytorch", "triton"])
def test_only_one_result_of_the_fused_addition_is_used(backend) -> None:
    x, residual = torch.randn(2, 50, 8).unbind()
    weight = torch.randn(8)

    def plain_gradients(which, dtype):
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in (x, residual, weight)]
        total = leaves[0] + leaves[1]
        (plain_norm(total, leaves[2]), total)[which].square().sum().backward()
        return {str(i): leaf.grad for i, leaf in enumerate(leaves) if leaf.grad is not None}

    for which in (0, 1):
        tensors = [t.clone().requires_grad_() for t in (x, residual, weight)]
        fused_add_rms_norm(*tensors, backend=backend)[which].square().sum().backward()
        found = {str(i): t.grad for i, t in enumerate(tensors) if t.grad is not None}
        plain, exact = (plain_gradients(which, dtype) for dtype in (torch.float32, torch.float64))
        assert found.keys() == plain.keys()
        assert_errors_at_most_twice(found, plain, exact)


@pytest.mark.parametrize("backend", ["pytorch", "triton"])
def test_expanded_gradients_and_strided_inputs(backend) -> None:
    x = torch.randn(60, 4, 16)[:, 1:3, :8].requires_grad_()
    weight = torch.randn(8, requires_grad=True)
    grads = torch.autograd.grad(rms_norm(x, weight, backend=backend).sum(), (x, weight))
    plain, exact = (
        torch.autograd.grad(plain_norm(*leaves).sum(), leaves)
        for leaves in ((x, weight), (x.double(), weight.double()))
    )
    assert_errors_at_most_twice(*(dict(zip("xw", g, strict=True)) for g in (grads, plain, exact)))


@pytest.mark.parametrize("backend", ["pytorch", "triton"])
def test_a_norm_of_a_norm_leaves_saved_tensors_alone(backend) -> None:
    """Applies two norms in a row, as in Gemma 2, and runs the backward twice on one graph."""
    x, weight = torch.randn(50, 8).requires_grad_(), torch.randn(8).requires_grad_()
    twice = rms_norm(rms_norm(x, weight, backend=backend), weight, backend=backend).square().sum()
    first = torch.autograd.grad(twice, (x, weight), retain_graph=True)
    second = torch.autograd.grad(twice, (x, weight))
    plain, exact = (
        torch.autograd.grad(plain_norm(plain_norm(a, b), b).square().sum(), (a, b))
        for a, b in ((x, weight), (x.double(), weight.double()))
    )
    assert all(map(torch.equal, first, second))
    assert_errors_at_most_twice(*(dict(zip("xw", g, strict=True)) for g in (first, plain, exact)))


@pytest.mark.parametrize("backend", ["pytorch", "triton"])
def test_residual_stream_in_float32_under_half_precision(backend) -> None:
    x, residual = torch.randn(5, 8).half().requires_grad_(), torch.randn(5, 8).requires_grad_()
    weight = torch.ones(8, requires_grad=True)
    y, total = fused_add_rms_norm(x, residual, weight, backend=backend)
    assert (y.dtype, total.dtype) == (torch.float32, torch.float32)
    (y.sum() + total.square().sum()).backward()
    assert [t.grad.dtype for t in (x, residual, weight)] == [
        torch.float16,
        torch.float32,
        torch.float32,
    ]


@pytest.mark.parametrize("backend", ["pytorch", "triton"])
def test_no_rows(backend) -> None:
    x, weight = torch.randn(0, 8, requires_grad=True), torch.ones(8, requires_grad=True)
    rms_norm(x, weight, backend=backend).sum().backward()
    assert x.grad.shape == (0, 8)
    assert torch.equal(weight.grad, torch.zeros(8))


def test_frozen_weight_gets_no_gradient() -> None:
    x, weight = torch.randn(5, 8, requires_grad=True), torch.ones(8)
    rms_norm(x, weight, backend="triton").sum().backward()
    assert weight.grad is None
    assert x.grad is not None


def test_compiled_graph_has_no_break() -> None:
    x, residual = torch.randn(2, 5, 8).unbind()
    weight = torch.randn(8, requires_grad=True)

    def function(x, residual):
        y, total = fused_add_rms_norm(x, residual, weight)
        return (y * total).sum() + rms_norm(total, weight).square().sum()

    x, residual = x.requires_grad_(), residual.requires_grad_()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    grads = torch.autograd.grad(compiled(x, residual), (x, residual, weight))
    expected = torch.autograd.grad(function(x, residual), (x, residual, weight))
    assert all(map(torch.equal, grads, expected))


def test_operator_satisfies_the_rules_of_torch_library() -> None:
    x, residual = torch.randn(2, 5, 8).unbind()
    weight = torch.randn(8, requires_grad=True)
    arguments = (x, residual, weight, None, 1e-6, 0.0, False, False, "pytorch")
    torch.library.opcheck(torch.ops.lctrain.norm.default, arguments)


@pytest.mark.gpu
def test_more_elements_than_int32_counts() -> None:
    columns = 4096
    x = torch.randn(2**31 // columns + 8, columns, device="cuda", dtype=torch.bfloat16)
    weight = torch.ones(columns, device="cuda", dtype=torch.bfloat16)
    tail = rms_norm(x, weight)[-8:]
    assert torch.equal(tail, rms_norm(x[-8:].clone(), weight))


BAD_INPUTS = {
    "columns": ({"weight": torch.ones(3)}, "weight must have shape"),
    "integers": ({"x": torch.ones(2, 4, dtype=torch.int64)}, "must be floating point"),
    "eps": ({"eps": -1.0}, "eps must be at least 0"),
    "backend": ({"backend": "cuda"}, "backend must be one of"),
    "float64": ({"x": torch.ones(2, 4).double(), "backend": "triton"}, "at most 32 bits"),
}


@pytest.mark.parametrize(("change", "message"), BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_input_is_an_error_that_names_it(change, message) -> None:
    arguments = {"x": torch.ones(2, 4), "weight": torch.ones(4)}
    with pytest.raises(ValueError, match=message):
        rms_norm(**{**arguments, **change})


def test_residual_of_another_shape_is_an_error() -> None:
    with pytest.raises(ValueError, match="residual must be floating point"):
        fused_add_rms_norm(torch.ones(2, 4), torch.ones(1, 4), torch.ones(4))


def test_bias_of_another_dtype_is_an_error() -> None:
    with pytest.raises(ValueError, match="bias must have the shape and dtype"):
        layer_norm(torch.ones(2, 4), torch.ones(4), torch.ones(4).half())
