"""An Operation leaves out the dispatcher in eager mode, and nothing that watches it can tell."""

import pytest
import torch
import torch.fx
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from lctrain.kernels import bias_gelu, flash_attn_varlen_func, fused_add_rms_norm, layer_norm
from lctrain_kernels.fused_operator import Operation, is_unwatched


def attend(q, k, v):
    ends = torch.tensor([0, 3, 8], dtype=torch.int32, device=q.device)
    return flash_attn_varlen_func(q, k, v, ends, ends, 5, 5, causal=True)


def normalise(x, weight, bias):
    return layer_norm(x, weight, bias)


CALLS = {
    "varlen": (attend, [(8, 2, 8)] * 3, "varlen_forward"),
    "norm": (normalise, [(2, 4, 8), (8,), (8,)], "norm"),
    "bias_gelu": (bias_gelu, [(2, 4, 8), (8,)], "bias_gelu"),
}
each_call = pytest.mark.parametrize("name", CALLS)


def make(name, dtype=torch.float64):
    call, shapes, operator = CALLS[name]
    generator = torch.Generator().manual_seed(3)
    inputs = [torch.randn(s, dtype=dtype, generator=generator).requires_grad_() for s in shapes]
    return call, inputs, operator


class Dispatched(TorchDispatchMode):
    """Collects the names of lctrain's operators."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "lctrain":
            self.names.append(function._schema.name.removeprefix("lctrain::"))
        return function(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    """Collects the functions that lctrain's operators are."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@each_call
def test_results_and_gradients_are_the_operators(name, monkeypatch):
    call, inputs, _ = make(name)
    results = []
    for watched in (False, True):
        if watched:
            monkeypatch.setattr("lctrain_kernels.fused_operator.is_unwatched", lambda _: False)
        out = call(*inputs)
        out = out[0] if isinstance(out, tuple) else out
        with torch.no_grad():
            plain = call(*inputs)
        assert torch.equal(plain, out)
        assert not plain.requires_grad
        results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    for direct, dispatched in zip(*results, strict=True):
        assert torch.equal(direct, dispatched)
        assert direct.shape == dispatched.shape


@each_call
def test_eager_calls_leave_out_the_dispatcher(name, monkeypatch):
    call, inputs, _ = make(name)
    passed = []
    original = Operation.__call__

    def record(self, *arguments):
        passed.append(is_unwatched(arguments))
        return original(self, *arguments)

    monkeypatch.setattr(Operation, "__call__", record)
    call(*inputs).sum().backward()
    assert len(passed) >= 2  # forward and backward
    assert all(passed)


@each_call
def test_what_watches_sees_the_operators(name):
    call, inputs, operator = make(name)
    with Dispatched() as mode:
        call(*inputs).sum().backward()
    assert operator in mode.names
    assert any("backward" in one for one in mode.names)
    with Functions() as functions:
        call(*inputs)
    assert any(f"lctrain.{operator}" in one for one in functions.names)
    with profile() as profiler:
        call(*inputs)
    assert f"lctrain::{operator}" in {event.key for event in profiler.key_averages()}


def test_flop_counters_see_attention():
    call, inputs, _ = make("varlen")
    with FlopCounterMode(display=False) as counter:
        call(*inputs).sum().backward()
    assert counter.get_total_flops() > 0


@each_call
def test_other_tensors_pass_the_dispatcher(name):
    call, inputs, _ = make(name)
    with FakeTensorMode() as mode:
        fake = call(*(mode.from_tensor(x) for x in inputs))
    assert fake.shape == call(*inputs).shape
    meta = [x.detach().to("meta").requires_grad_() for x in inputs]
    out = call(*meta)
    assert out.is_meta
    assert [x.shape for x in torch.autograd.grad(out.sum(), meta)] == [x.shape for x in inputs]


def test_functorch_passes_the_dispatcher():
    def asked(x):
        assert not is_unwatched((x,))
        return x

    torch.vmap(asked)(torch.ones(2, 3))
    assert is_unwatched((torch.ones(2), None, 3, torch.nn.Parameter(torch.ones(1))))


def test_symbols_and_negated_views_pass_the_dispatcher():
    """Kernels read memory, which holds the negative of a view with the negative bit."""
    x, weight, _ = (tensor.detach() for tensor in make("norm")[1])
    proxy = torch.fx.Proxy(torch.fx.Graph().placeholder("x"))
    assert is_unwatched((x, weight, None, 3, 0.5, True, "auto", torch.float32))
    assert not is_unwatched((proxy, weight))
    negated = torch.complex(x, x).conj().imag
    assert negated.is_neg()
    assert not is_unwatched((negated, weight))


@pytest.mark.parametrize("shape", [(8,), (1, 8), (5, 8), (2, 3, 8), (0, 8), (2, 0, 8)], ids=str)
@pytest.mark.parametrize("broken", [False, True], ids=["contiguous", "strided"])
def test_rows_of_any_shape(shape, broken):
    """Norm and GELU take [..., H] as rows, in any strides, and autograd sees no view in them."""
    values = torch.randn(*shape, 2 if broken else 1, dtype=torch.float64)
    x = values[..., 0].requires_grad_()
    rows = x.detach().reshape(-1, 8).contiguous().requires_grad_()
    weight, bias = torch.randn(2, 8, dtype=torch.float64).requires_grad_()
    for call in (lambda x: layer_norm(x, weight, bias), lambda x: bias_gelu(x, bias)):
        out, wanted = call(x), call(rows)
        assert out._base is None
        assert torch.equal(out, wanted.reshape(shape))
        gradient = torch.randn_like(wanted)
        found = torch.autograd.grad(out, (x, bias), gradient.reshape(shape))
        expected = torch.autograd.grad(wanted, (rows, bias), gradient)
        assert torch.equal(found[0], expected[0].reshape(shape))
        assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("shape", [(5, 1, 8), (2, 3, 1, 8), (1, 1, 8)], ids=str)
def test_rows_whose_strides_pytorch_ignores(shape, device):
    """A dimension of size 1 may have any stride, as in [1, S, H] transposed for one sequence."""
    generator = torch.Generator().manual_seed(4)
    rows = torch.randn(3, *shape, generator=generator).to(device)
    weight, bias = torch.randn(2, 8, generator=generator).to(device)
    moved = [torch.empty_like(row).copy_(row) for row in rows]
    strides = (*moved[0].stride()[:-2], 999, 1)
    x, residual, dout = (row.as_strided(shape, strides) for row in moved)
    assert x.is_contiguous()
    options = {"backend": "triton"}
    for call in (
        lambda x, residual: fused_add_rms_norm(x, residual, weight, **options)[0],
        lambda x, residual: bias_gelu(x, bias, **options) + residual,
    ):
        found = [tensor.detach().requires_grad_() for tensor in (x, residual)]
        wanted = [tensor.detach().requires_grad_() for tensor in rows[:2]]
        out, expected = call(*found), call(*wanted)
        assert torch.equal(out, expected)
        gradients = torch.autograd.grad(out, found, dout)
        expected = torch.autograd.grad(expected, wanted, rows[2])
        assert all(map(torch.equal, gradients, expected))
