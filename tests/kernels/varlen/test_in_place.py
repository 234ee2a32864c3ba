"""Tests gradients of varlen attention in the memory of rebuilt q, k and v: they have the same bits.

The Hopper kernels run in the emulator, in several orders of their warps.
"""

import dataclasses
import gc
import subprocess
import sys
from contextlib import nullcontext

import numpy
import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lctrain_kernels import operators
from lctrain_kernels.by_head import backward_by_head
from lctrain_kernels.gluon import config
from lctrain_kernels.in_place import inputs_rebuilt, is_unheld
from lctrain_kernels.varlen import hopper, reference
from tests.kernels import oracle
from tests.kernels.gluon_emulator import emulate
from tests.kernels.oracle import (
    Case,
    assert_matches_oracle,
    attention,
    equal_lengths,
    make_inputs,
)

LENGTHS = equal_lengths(150, 0, 1, 70)
UNEQUAL = ((70, 300), (130, 40), (1, 129), (65, 0), (0, 63))
PLAIN = Case(LENGTHS, 4, 2, 64, torch.bfloat16, causal=True)
WIDE = dataclasses.replace(PLAIN, head_dim=128)
"""Case -> operands that the Hopper backward overwrites."""
HOPPER = {
    "D64": (PLAIN, "qkv"),
    "D64-unequal-dropout": (dataclasses.replace(PLAIN, documents=UNEQUAL, dropout_p=0.3), "qkv"),
    "D96": (dataclasses.replace(PLAIN, head_dim=96), "qkv"),
    "D96-deterministic": (dataclasses.replace(PLAIN, head_dim=96), "kv"),
    "D128": (WIDE, "kv"),
    "D128-long": (WIDE, "qkv"),
    "D128-unequal-softcap-sink": (
        dataclasses.replace(WIDE, documents=UNEQUAL, softcap=20.0, sink=True),
        "kv",
    ),
    "D256": (dataclasses.replace(PLAIN, head_dim=256, heads=2, heads_k=1), "qkv"),
}
PORTABLE = {
    "grouped": Case(equal_lengths(50, 17), heads=4, heads_k=2, causal=True),
    "dropout-softcap": Case(((7, 20), (33, 33)), causal=True, dropout_p=0.2, softcap=3.0),
    "alibi-sink": Case(equal_lengths(40), heads=4, heads_k=4, alibi="heads", sink=True),
}


@pytest.fixture
def rebuilt(monkeypatch):
    """Returns a function that runs a case's attention on inputs that its backward rebuilds."""
    plain = oracle.flash_attn_varlen_func

    def rebuilding(q, k, v, *given, by_head=False, **options):
        def layer(*leaves):
            operands = [x.clone(memory_format=torch.contiguous_format) for x in leaves]
            with inputs_rebuilt(), backward_by_head() if by_head else nullcontext():
                out, lse = plain(*operands, *given, **options)
            return out * torch.ones((), dtype=out.dtype, device=out.device), lse

        return checkpoint(layer, q, k, v, use_reentrant=False)

    def run(case, inputs, **options):
        with monkeypatch.context() as patch:
            patch.setattr(oracle, "flash_attn_varlen_func", rebuilding)
            return attention(case, inputs, **options)

    return run


def note_overwritten(monkeypatch, module, name):
    """Returns a list that gets, for every backward of a module, the operands that it overwrites."""
    found = []
    original = getattr(module, name)

    def noting(dout, dlse, q, k, v, *given, into=None, **named):
        if module is hopper:  # out, lse, pack, options, into
            into = given[4] if len(given) > 4 else None
        pairs = zip("qkv", (q, k, v), into or (None,) * 3, strict=True)
        found.append(
            "".join(n for n, x, to in pairs if to is not None and to.data_ptr() == x.data_ptr())
        )
        if module is hopper:
            return original(dout, dlse, q, k, v, *given)
        return original(dout, dlse, q, k, v, *given, into=into, **named)

    monkeypatch.setattr(module, name, noting)
    return found


@pytest.mark.usefixtures("nan_filled_memory")
@pytest.mark.skipif(torch.cuda.is_available(), reason="test_hopper_gpu.py has a GPU")
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", HOPPER)
def test_the_hopper_kernels_give_the_same_bits(name, seed, rebuilt, monkeypatch):
    case, expected = HOPPER[name]
    options = {"backend": "hopper", "deterministic": "deterministic" in name}
    inputs = make_inputs(case)
    if "long" in name:
        monkeypatch.setattr(config, "LONG", 8)
    emulate(monkeypatch, hopper, seed)
    apart = dict(attention(case, inputs, **options).items())
    found = note_overwritten(monkeypatch, hopper, "varlen_bwd")
    emulate(monkeypatch, hopper, seed)
    is_plain = operators.is_plain_backward

    def collect(ctx):
        gc.collect()  # the emulator of the recomputed forward holds its operands in cycles
        return is_plain(ctx)

    monkeypatch.setattr(operators, "is_plain_backward", collect)
    result = dict(rebuilt(case, inputs, **options).items())
    assert found == [expected]
    for key, value in apart.items():
        assert torch.equal(result[key], value), key


@pytest.mark.gpu
@pytest.mark.hopper
@pytest.mark.parametrize("name", HOPPER)
def test_the_hopper_kernels_on_a_gpu(name, rebuilt, monkeypatch):
    case, expected = HOPPER[name]
    options = {"backend": "hopper", "deterministic": "deterministic" in name}
    inputs = make_inputs(case, "cuda")
    if "long" in name:
        monkeypatch.setattr(config, "LONG", 8)
    apart = dict(attention(case, inputs, **options).items())
    found = note_overwritten(monkeypatch, hopper, "varlen_bwd")
    result = rebuilt(case, inputs, **options)
    assert found == [expected]
    assert_matches_oracle(result, case, inputs)
    for key, value in result.items():
        # Without determinism, partial dq is added in an order that depends on timing.
        assert torch.equal(value, apart[key]) or (key == "dq" and not options["deterministic"]), key


@pytest.mark.parametrize("by_head", [False, True], ids=["all-heads", "by-head"])
@pytest.mark.parametrize("backend", ["pytorch", "triton"])
@pytest.mark.parametrize("name", PORTABLE)
def test_the_portable_paths_give_the_same_bits(
    name, backend, by_head, rebuilt, device, monkeypatch
):
    case = PORTABLE[name]
    place = "cpu" if backend == "pytorch" else device
    if backend == "pytorch":  # torch's batched products choose their order by the number of heads
        case = dataclasses.replace(case, dtype=torch.float64)
    inputs = make_inputs(case, place)
    apart = dict(attention(case, inputs, backend=backend).items())
    found = note_overwritten(monkeypatch, reference, "varlen_backward")
    result = dict(rebuilt(case, inputs, backend=backend, by_head=by_head).items())
    if backend == "pytorch":
        assert found == ([""] * case.heads_k if by_head else ["qkv"])
    for key, value in apart.items():
        assert torch.equal(result[key], value), key


def holders():
    """Returns functions that take hold of a tensor's memory, by name."""
    return {
        "name": lambda x: x,
        "view": lambda x: x[1:],
        "detached": lambda x: x.detach(),
        "storage": lambda x: x.untyped_storage(),
        "numpy": lambda x: x.numpy(),
        "node": lambda x: x.requires_grad_() * x,
    }


@pytest.mark.parametrize("name", holders())
def test_a_tensor_that_something_holds(name):
    tensors = [torch.zeros(4, 3)]
    assert is_unheld(tensors, 0)
    held = holders()[name](tensors[0])
    assert not is_unheld(tensors, 0)
    del held
    assert is_unheld(tensors, 0) == (name != "numpy")  # torch keeps no count of NumPy's views


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(4, 3)[:2],
        lambda: torch.zeros(4, 3)[1:],
        lambda: torch.zeros(4, 3).t(),
        lambda: torch.zeros(0, 3),
        lambda: torch.zeros(1, 3).expand(4, 3),
        lambda: torch.nn.Parameter(torch.zeros(4, 3)),
        lambda: torch.from_numpy(numpy.zeros((4, 3))),
        lambda: torch.from_dlpack(numpy.zeros((4, 3))),
        lambda: torch.frombuffer(bytearray(96), dtype=torch.float64).view(4, 3),
    ],
    ids=[
        "part",
        "offset",
        "transposed",
        "empty",
        "expanded",
        "subclass",
        "numpy",
        "dlpack",
        "buffer",
    ],
)
def test_a_tensor_that_does_not_have_memory_of_its_own(make):
    assert not is_unheld([make()], 0)


@pytest.mark.parametrize("as_tensor", [torch.from_numpy, torch.from_dlpack])
def test_saved_tensors_in_memory_of_numpy_are_not_overwritten(as_tensor):
    leaves = [torch.randn(5, 2, 16, dtype=torch.float64, requires_grad=True) for _ in "qkv"]
    cu_seqlens = torch.tensor([0, 2, 5], dtype=torch.int32)
    with inputs_rebuilt(), saved_tensors_hooks(lambda x: x.detach().numpy().copy(), as_tensor):
        out = oracle.flash_attn_varlen_func(
            *leaves, cu_seqlens, cu_seqlens, 3, 3, causal=True, backend="pytorch"
        )
    first, second = (torch.autograd.grad(out.sum(), leaves, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


SCRIPT = """
import sys

def trace(frame, event, argument):
    frame.f_locals  # a copy that holds what the names of the frame do
    return trace

import torch
sys.settrace(trace)
from lctrain_kernels.in_place import is_unheld
sys.settrace(None)
tensors = [torch.zeros(4, 3)]
assert is_unheld(tensors, 0)
held = tensors[0], tensors[0].untyped_storage()
assert not is_unheld(tensors, 0)
"""


class Recorder(TorchDispatchMode):
    """Mode that keeps what every operation returns."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found.append(func(*args, **(kwargs or {})))
        return self.found[-1]


def test_a_dispatch_mode_that_keeps_results():
    with Recorder():
        assert not is_unheld([torch.zeros(4, 3)], 0)


def test_a_debugger_during_the_import_does_not_change_the_counts():
    subprocess.run([sys.executable, "-W", "ignore", "-c", SCRIPT], check=True)
