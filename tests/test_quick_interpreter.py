"""Tests the interpreter that leaves out repeated work: kernels compute what they did."""

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter runs on a CPU")


@triton.jit
def largest(x):
    return tl.max(tl.where(x > 0, x, 0.0), 0)


@triton.jit
def scale_kernel(x_ptr, out_ptr, N: tl.constexpr, FAILS: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, N)).to(tl.float32)
    tl.static_assert(not FAILS)
    tl.store(out_ptr + tl.arange(0, N), x * largest(x))


@triton.jit
def add_one_kernel(x_ptr, out_ptr, N: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, N))
    tl.store(out_ptr + tl.arange(0, N), x + 1)


def run(dtype, fails=False):
    x = torch.arange(-4, 4, dtype=dtype)
    out = torch.empty_like(x)
    scale_kernel[(1,)](x, out, 8, fails)
    return x, out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int32])
def test_launches_one_after_the_other(dtype):
    for _ in range(2):
        x, out = run(dtype)
        assert torch.equal(out, 3 * x)


def test_the_language_is_restored_after_a_launch_even_if_it_fails():
    functions = tl.load, tl.store, tl.tensor.__add__
    run(torch.float32)
    assert (tl.load, tl.store, tl.tensor.__add__) == functions
    with pytest.raises(Exception, match="AssertionError"):
        run(torch.float32, fails=True)
    assert (tl.load, tl.store, tl.tensor.__add__) == functions
    x, out = run(torch.float32)
    assert torch.equal(out, 3 * x)


def test_a_launch_replaces_the_functions_of_a_module_once(monkeypatch):
    from triton.runtime import interpreter

    replaced = []
    patch = interpreter._patch_lang.patch
    monkeypatch.setattr(
        interpreter._patch_lang, "patch", lambda f: (replaced.append(f.__name__), patch(f))[1]
    )
    run(torch.float32)
    assert replaced[0] == "scale_kernel"
    assert "largest" not in replaced
    assert len(replaced) == len(set(replaced))


def test_a_sum_of_integers_is_computed_once(monkeypatch):
    from triton.language.semantic import TritonSemantic

    asserted = []
    monkeypatch.setattr(TritonSemantic, "device_assert", lambda *args: asserted.append(args))
    x = torch.tensor([0, -3, 2**31 - 1, 7], dtype=torch.int32)
    out = torch.empty_like(x)
    add_one_kernel[(1,)](x, out, 4)
    assert torch.equal(out, x + 1)  # the largest integer wraps, as on a GPU
    assert not asserted
