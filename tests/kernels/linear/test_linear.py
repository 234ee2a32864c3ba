"""Tests linear layers that add inside their products, beside plain layers and additions."""

import pytest
import torch
from torch.nn import functional

from lctrain_kernels.linear import linear_add, merged_linear
from tests.kernels.fused_cases import assert_error_at_most_twice_plain
from tests.numerics import assert_equal_sums

CASES = [
    ("cpu", torch.float32),
    ("cpu", torch.bfloat16),
    pytest.param("cuda", torch.float32, marks=pytest.mark.gpu),
    pytest.param("cuda", torch.bfloat16, marks=pytest.mark.gpu),
]
devices = pytest.mark.parametrize(("device", "dtype"), CASES)


@pytest.mark.parametrize("widths", [(48,), (48, 16, 16)])
@devices
def test_merged_linear_is_several_linear_layers(device, dtype, widths) -> None:
    x = torch.randn(3, 41, 64, device=device)
    assert_error_at_most_twice_plain(
        merged_linear,
        lambda x, *weights: tuple(functional.linear(x, weight) for weight in weights),
        (x, *(torch.randn(width, 64, device=device) for width in widths)),
        dtype,
    )


@devices
def test_linear_add_is_a_linear_layer_and_an_addition(device, dtype) -> None:
    x, residual = torch.randn(3, 41, 64, device=device), torch.randn(3, 41, 48, device=device)
    assert_error_at_most_twice_plain(
        linear_add,
        lambda x, weight, residual: residual + functional.linear(x, weight),
        (x, torch.randn(48, 64, device=device), residual),
        dtype,
    )


@pytest.mark.parametrize("frozen", [("x",), ("first",), ("second",), ("first", "second")])
def test_only_the_gradients_that_are_needed(frozen) -> None:
    x, first, second = torch.randn(5, 8), torch.randn(6, 8), torch.randn(4, 8)
    results = []
    for function in (merged_linear, lambda x, *w: [functional.linear(x, one) for one in w]):
        leaves = [
            tensor.detach().requires_grad_(name not in frozen)
            for name, tensor in (("x", x), ("first", first), ("second", second))
        ]
        out = function(*leaves)
        sum(one.sum() for one in out).backward()
        results.append([leaf.grad for leaf in leaves])
    for ours, plain in zip(*results, strict=True):
        assert (ours is None) == (plain is None)
        if plain is not None:
            assert_equal_sums(ours, plain)


def test_an_output_may_be_unused() -> None:
    x, first, second = (torch.randn(4, 4, requires_grad=True) for _ in range(3))
    _, used = merged_linear(x, first, second)
    used.sum().backward()
    assert first.grad is None
    assert torch.equal(x.grad, torch.ones(4, 4) @ second)


def test_nothing_is_written_into_what_the_caller_holds() -> None:
    x, weight = torch.randn(5, 8, requires_grad=True), torch.randn(8, 8, requires_grad=True)
    out = merged_linear(x, weight, weight)
    upstream = [torch.randn(5, 8) for _ in range(2)]
    before = [t.clone() for t in upstream]
    first = torch.autograd.grad(out, (x, weight), upstream, retain_graph=True)
    second = torch.autograd.grad(out, (x, weight), upstream)
    for one, other in zip((*first, *upstream), (*second, *before), strict=True):
        assert torch.equal(one, other)


def test_autocast_casts_to_its_dtype_and_gives_float32_gradients() -> None:
    x, weight = torch.randn(5, 8, requires_grad=True), torch.randn(6, 8, requires_grad=True)
    residual = torch.randn(5, 6, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        (out,), total = merged_linear(x, weight), linear_add(x, weight, residual)
    assert out.dtype == total.dtype == torch.bfloat16
    (out.sum() + total.sum()).backward()
    assert {t.grad.dtype for t in (x, weight, residual)} == {torch.float32}


def test_compiles_without_a_graph_break() -> None:
    x, weight = torch.randn(5, 8, requires_grad=True), torch.randn(8, 8)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def function(x):
        a, b = merged_linear(x, weight, weight)
        return linear_add(a, weight, b)

    assert torch.equal(function(x), linear_add(x @ weight.t(), weight, x @ weight.t()))


X = torch.ones(3, 4)
BAD_CALLS = {
    "no weight": (lambda: merged_linear(X), "weights must not be empty"),
    "integers": (lambda: merged_linear(X.long(), X), "x must be floating point"),
    "columns": (lambda: merged_linear(X, torch.ones(2, 5)), r"weight must be .*\[N, 4\]"),
    "dtype": (lambda: merged_linear(X, X.double()), "weight must be torch.float32"),
    "residual": (lambda: linear_add(X, X, X), r"residual must be .*\(3, 3\)"),
    "residual's dtype": (lambda: linear_add(X, X, torch.ones(3, 3).half()), "residual must be"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_arguments_are_named(case) -> None:
    call, message = BAD_CALLS[case]
    with pytest.raises(ValueError, match=message):
        call()
