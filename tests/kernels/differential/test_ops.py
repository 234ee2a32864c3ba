"""Tests the differential operators in torch: schemas, compilation and FLOP counts."""

import functools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from lctrain.kernels import diff_attn_varlen_func, make_schedule
from lctrain_kernels.reference.attention import visible_mask
from tests.kernels.differential.oracle import DifferentialCase, make_inputs
from tests.kernels.oracle import cumulative, equal_lengths

FORWARD = torch.ops.lctrain.differential_forward.default
BACKWARD = torch.ops.lctrain.differential_backward.default
V1 = DifferentialCase(((6, 6), (4, 9)), dtype=torch.float32, lam="scalar")
V2 = DifferentialCase(((6, 6), (4, 9)), dtype=torch.float32, value_dim=16, shared_k=True)
by_version = pytest.mark.parametrize("case", [V1, V2], ids=["v1", "v2"])


def leaves_of(case: DifferentialCase, *, requires_grad: bool = True):
    inputs = make_inputs(case)
    tensors = [inputs.q1, inputs.q2, inputs.k1, inputs.v, inputs.lam]
    if not case.shared_k:
        tensors.append(inputs.k2)
    return [x.detach().clone().requires_grad_(requires_grad) for x in tensors], inputs


def call(leaves, cu_q, cu_k, longest=9, **options):
    q1, q2, k1, v, lam, *k2 = leaves
    return diff_attn_varlen_func(
        q1,
        q2,
        k1,
        k2[0] if k2 else k1,
        v,
        lam,
        cu_q,
        longest,
        cu_seqlens_k=cu_k,
        max_seqlen_k=longest,
        **options,
    )


def forward_arguments(case, *, window=None, schedule=None, requires_grad=True) -> tuple:
    (q1, q2, k1, v, lam, *k2), inputs = leaves_of(case, requires_grad=requires_grad)
    lam = lam.detach().expand(q1.shape[:2]).contiguous().requires_grad_(requires_grad)
    return (
        q1,
        q2,
        k1,
        k2[0] if k2 else None,
        v,
        lam,
        inputs.cu_seqlens_q,
        inputs.cu_seqlens_k,
        None if schedule is None else schedule.q_tiles,
        None if schedule is None else schedule.k_tiles,
        None,
        torch.tensor([16, 0], dtype=torch.int32),
        6,
        0.25,
        3,
        -1,
        window,
        0.0,
        0.2,
        torch.tensor([5]),
        3,
        None,
        None,
        False,
        "pytorch",
    )


@by_version
@pytest.mark.parametrize("variant", ["schedule", "window-tensor"])
def test_opcheck_forward(case, variant):
    arguments = forward_arguments(
        case,
        schedule=make_schedule([6, 4], [6, 9]) if variant == "schedule" else None,
        window=torch.tensor([3, 1], dtype=torch.int32) if variant == "window-tensor" else None,
    )
    torch.library.opcheck(FORWARD, arguments)


@by_version
@pytest.mark.parametrize("with_dlse", [False, True], ids=["", "dlse"])
def test_opcheck_backward(case, with_dlse):
    arguments = forward_arguments(case, requires_grad=False)
    out, out1, out2, lse1, lse2 = FORWARD(*arguments)
    dlse = [torch.randn_like(lse1) if with_dlse else None for _ in range(2)]
    torch.library.opcheck(
        BACKWARD,
        (torch.randn_like(out), *dlse, *arguments, out1, out2, lse1, lse2),
        test_utils=("test_schema", "test_faketensor"),
    )


@by_version
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_as_one_graph(case, backend):
    """The compiled function gives the same bits in both passes, with and without dropout."""
    torch._dynamo.reset()

    def function(leaves, cu_q, cu_k):
        out, lse1, lse2 = call(leaves, cu_q, cu_k, dropout_p=0.2, dropout_seed=9, return_lse=True)
        return out.sin().sum() + (lse1 - lse2).square().sum()

    compiled = torch.compile(function, fullgraph=True, backend=backend)
    leaves, inputs = leaves_of(case)
    results = []
    for run in (function, compiled):
        loss = run(leaves, inputs.cu_seqlens_q, inputs.cu_seqlens_k)
        results.append((loss, *torch.autograd.grad(loss, leaves)))
    for expected, actual in zip(*results, strict=True):
        assert torch.equal(actual, expected)


def test_new_lengths_do_not_recompile():
    torch._dynamo.reset()
    compilations = []

    def counting(graph, example_inputs):
        compilations.append(graph)
        return graph

    @functools.partial(torch.compile, fullgraph=True, backend=counting, dynamic=True)
    def function(leaves, cu, longest):
        return call(leaves, cu, cu, longest)

    for lengths in ([5, 3], [4, 4], [9, 2, 6], [30, 2, 2, 7]):
        case = DifferentialCase(equal_lengths(*lengths), dtype=torch.float32)
        leaves, inputs = leaves_of(case)
        function(leaves, inputs.cu_seqlens_q, max(lengths))
    assert len(compilations) == 1


@by_version
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_fake_tensors_have_the_real_shapes(case, dtype):
    leaves, inputs = leaves_of(case)
    leaves = [x.detach().to(dtype).requires_grad_() for x in leaves]
    real = call(leaves, inputs.cu_seqlens_q, inputs.cu_seqlens_k, return_lse=True)
    real_grads = torch.autograd.grad(real[0].sum(), leaves)
    detached = [x.detach() for x in leaves]
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x).requires_grad_() for x in detached]
        boundaries = [mode.from_tensor(x) for x in (inputs.cu_seqlens_q, inputs.cu_seqlens_k)]
        fake = call(fakes, *boundaries, return_lse=True)
        fake_grads = torch.autograd.grad(fake[0].sum(), fakes)
    for expected, actual in zip((*real, *real_grads), (*fake, *fake_grads), strict=True):
        assert actual.shape == expected.shape
        assert actual.dtype == expected.dtype


@pytest.mark.parametrize(("case", "units"), [(V1, (6, 16)), (V2, (4, 12))], ids=["v1", "v2"])
def test_flops_are_units_of_visible_pairs(case, units):
    """A unit is 2 D operations per visible pair and head: 6 + 10 in version 1, 4 + 8 in 2."""
    leaves, inputs = leaves_of(case)
    pairs = int(visible_mask(6, 6, -1, 0).sum() + visible_mask(4, 9, -1, 0).sum())
    unit = pairs * case.heads * 2 * case.head_dim
    with FlopCounterMode(display=False) as counter:
        out = call(leaves, inputs.cu_seqlens_q, inputs.cu_seqlens_k)
        assert counter.get_total_flops() == units[0] * unit
        out.sum().backward()
    assert counter.get_total_flops() == units[1] * unit


def test_flops_of_fake_tensors_take_documents_as_equal():
    with FakeTensorMode() as mode, FlopCounterMode(display=False) as counter:
        q, k, v = (torch.empty(12, n, d) for n, d in ((4, 16), (2, 16), (2, 32)))
        cu = mode.from_tensor(cumulative([6, 6], "cpu"))
        diff_attn_varlen_func(q, q, k, k, v, torch.tensor(0.5), cu, 6)
    assert counter.get_total_flops() == 2 * 6 * 6 // 2 * 4 * 2 * (2 * 16 + 2 * 32)


@by_version
def test_checkpointing_draws_the_same_mask(case):
    leaves, inputs = leaves_of(case)

    def function(*leaves):
        return call(leaves, inputs.cu_seqlens_q, inputs.cu_seqlens_k, dropout_p=0.3)

    results = []
    for run in (function, functools.partial(checkpoint, function, use_reentrant=False)):
        torch.manual_seed(4)
        out = run(*leaves)
        results.append((out, *torch.autograd.grad(out.sum(), leaves)))
    for expected, actual in zip(*results, strict=True):
        assert torch.equal(actual, expected)
