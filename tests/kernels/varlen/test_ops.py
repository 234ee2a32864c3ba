"""Tests the varlen operators in torch: schemas, compilation, checkpointing, FLOP counts."""

import functools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import FlopCounterMode

from lctrain.kernels import flash_attn_varlen_func, make_schedule
from lctrain_kernels.operators import visible_pairs
from lctrain_kernels.reference.attention import dense_attention, visible_mask
from tests.kernels.oracle import Case, cumulative, equal_lengths, make_inputs
from tests.numerics import assert_equal_in_float64

CASE = Case(((6, 6), (4, 9)), dtype=torch.float32, dropout_p=0.2, alibi="heads", sink=True)
FORWARD = torch.ops.lctrain.varlen_forward.default
BACKWARD = torch.ops.lctrain.varlen_backward.default


def operands(case: Case, *, requires_grad: bool = True):
    """Returns q, k, v and sink as leaves, and cu_seqlens of queries and keys."""
    inputs = make_inputs(case)
    leaves = [inputs.q, inputs.k, inputs.v, torch.randn(case.heads)]
    leaves = [x.detach().requires_grad_(requires_grad) for x in leaves]
    return leaves, inputs


def forward_arguments(case: Case, *, window=None, schedule=None, requires_grad=True) -> tuple:
    (q, k, v, sink), inputs = operands(case, requires_grad=requires_grad)
    return (
        q,
        k,
        v,
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
        2.0,
        case.dropout_p,
        torch.tensor([5]),
        3,
        inputs.slopes,
        sink,
        True,
        "pytorch",
    )


@pytest.mark.parametrize("variant", ["plain", "schedule", "window-tensor"])
def test_opcheck_forward(variant):
    """Checks schema, autograd registration and fake implementation, also under AOT dispatch."""
    arguments = forward_arguments(
        CASE,
        schedule=make_schedule([6, 4], [6, 9]) if variant == "schedule" else None,
        window=torch.tensor([3, 1], dtype=torch.int32) if variant == "window-tensor" else None,
    )
    torch.library.opcheck(FORWARD, arguments)


@pytest.mark.parametrize("with_dlse", [False, True], ids=["", "dlse"])
def test_opcheck_backward(with_dlse):
    arguments = forward_arguments(CASE, requires_grad=False)
    out, lse = FORWARD(*arguments)
    dlse = torch.randn_like(lse) if with_dlse else None
    torch.library.opcheck(
        BACKWARD,
        (torch.randn_like(out), dlse, *arguments, out, lse),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_opcheck_backward_into():
    arguments = forward_arguments(CASE, requires_grad=False)
    out, lse = FORWARD(*arguments)
    into = [torch.empty_like(x) for x in arguments[:3]]
    torch.library.opcheck(
        torch.ops.lctrain.varlen_backward_into.default,
        (torch.randn_like(out), None, *arguments, out, lse, *into),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_as_one_graph(backend):
    """The compiled function gives the same bits in both passes, with and without dropout."""
    torch._dynamo.reset()

    def function(q, k, v, sink, cu_q, cu_k, slopes, max_q, max_k):
        out, lse = flash_attn_varlen_func(
            q * 2,
            k,
            v,
            cu_q,
            cu_k,
            max_q,
            max_k,
            0.2,
            causal=True,
            softcap=3.0,
            alibi_slopes=slopes,
            learnable_sink=sink,
            dropout_seed=9,
            return_lse=True,
        )
        return out.sin().sum() + lse.square().sum()

    compiled = torch.compile(function, fullgraph=True, backend=backend)
    for documents in (CASE.documents, ((3, 8), (9, 9), (2, 5))):
        (q, k, v, sink), inputs = operands(
            Case(documents, dtype=torch.float32, alibi="heads", head_dim=20)
        )
        rest = (inputs.cu_seqlens_q, inputs.cu_seqlens_k, inputs.slopes, 9, 9)
        results = []
        for call in (function, compiled):
            loss = call(q, k, v, sink, *rest)
            results.append((loss, *torch.autograd.grad(loss, (q, k, v, sink))))
        for expected, actual in zip(*results, strict=True):
            assert torch.equal(actual, expected)


def test_new_lengths_do_not_recompile():
    """Other numbers of documents and tokens do not recompile either, once they are dynamic."""
    torch._dynamo.reset()
    compilations = []

    def counting(graph, example_inputs):
        compilations.append(graph)
        return graph

    @functools.partial(torch.compile, fullgraph=True, backend=counting, dynamic=True)
    def function(q, k, v, cu_q, cu_k, max_q, max_k):
        return flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k, causal=True)

    for lengths in ([5, 3], [4, 4], [9, 2, 6], [30, 2, 2, 7]):
        _, inputs = operands(Case(equal_lengths(*lengths), dtype=torch.float32))
        longest = max(lengths)
        function(
            inputs.q,
            inputs.k,
            inputs.v,
            inputs.cu_seqlens_q,
            inputs.cu_seqlens_k,
            longest,
            longest,
        )
    assert len(compilations) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_fake_tensors_have_the_real_shapes(dtype):
    real_q = torch.randn(7, 4, 20, dtype=dtype)
    real_kv = torch.randn(7, 2, 20, dtype=dtype)
    cu = cumulative([4, 3], "cpu")
    out, lse = flash_attn_varlen_func(real_q, real_kv, real_kv, cu, cu, 4, 4, return_lse=True)
    with FakeTensorMode() as mode:
        q, kv, fake_cu = (mode.from_tensor(x) for x in (real_q, real_kv, cu))
        q.requires_grad_()
        fake_out, fake_lse = flash_attn_varlen_func(
            q, kv, kv, fake_cu, fake_cu, 4, 4, return_lse=True
        )
        (grad,) = torch.autograd.grad(fake_out.sum(), q)
    for fake, real in ((fake_out, out), (fake_lse, lse), (grad, real_q)):
        assert fake.shape == real.shape
        assert fake.dtype == real.dtype


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (3, 0), (2, 5), (0, -1)])
def test_visible_pairs_by_counting(window):
    lengths = [(5, 5), (0, 4), (9, 3), (2, 12), (6, 0)]
    counted = sum(int(visible_mask(q, k, *window).sum()) for q, k in lengths)
    cu_q = cumulative([q for q, _ in lengths], "cpu")
    cu_k = cumulative([k for _, k in lengths], "cpu")
    assert visible_pairs(cu_q, cu_k, *window) == counted


@pytest.mark.parametrize("on_device", [False, True], ids=["ints", "tensor"])
def test_flops_are_those_of_the_visible_pairs(on_device):
    """The forward has 2 products, the backward 5, each with 2 H D operations per visible pair."""
    (q, k, v, _), inputs = operands(Case(((6, 6), (4, 9)), dtype=torch.float32))
    window = torch.tensor([3, 0], dtype=torch.int32) if on_device else (3, 0)
    pairs = int(visible_mask(6, 6, 3, 0).sum() + visible_mask(4, 9, 3, 0).sum())
    unit = pairs * 4 * 2 * 16
    with FlopCounterMode(display=False) as counter:
        out = flash_attn_varlen_func(
            q, k, v, inputs.cu_seqlens_q, inputs.cu_seqlens_k, 6, 9, window_size=window
        )
        assert counter.get_total_flops() == 2 * unit
        out.sum().backward()
    assert counter.get_total_flops() == 7 * unit


def test_flops_of_fake_tensors_take_documents_as_equal():
    with FakeTensorMode() as mode, FlopCounterMode(display=False) as counter:
        q, k = torch.empty(12, 4, 16), torch.empty(12, 2, 16)
        cu = mode.from_tensor(cumulative([6, 6], "cpu"))
        flash_attn_varlen_func(q, k, k, cu, cu, 6, 6)
    assert counter.get_total_flops() == 2 * (2 * 6 * 6) * 4 * 2 * 16


@pytest.mark.parametrize("policy", [CheckpointPolicy.MUST_SAVE, CheckpointPolicy.MUST_RECOMPUTE])
def test_selective_checkpointing_can_name_the_operator(policy):
    """Gradients keep every bit, also where dropout masks are drawn again."""
    (q, k, v, sink), inputs = operands(CASE)
    calls = []

    def function(q, k, v, sink):
        return flash_attn_varlen_func(
            q.sin(),
            k,
            v,
            inputs.cu_seqlens_q,
            inputs.cu_seqlens_k,
            6,
            9,
            0.3,
            learnable_sink=sink,
        ).cos()

    def choose(context, operator, *args, **kwargs):
        if operator == FORWARD:
            calls.append(operator)
            return policy
        return CheckpointPolicy.PREFER_RECOMPUTE

    results = []
    for selective in (True, False):
        torch.manual_seed(4)
        if selective:
            contexts = functools.partial(create_selective_checkpoint_contexts, choose)
            out = checkpoint(function, q, k, v, sink, use_reentrant=False, context_fn=contexts)
        else:
            out = function(q, k, v, sink)
        results.append((out, *torch.autograd.grad(out.sum(), (q, k, v, sink))))
    assert calls, "the policy was not asked about the operator"
    for expected, actual in zip(*results, strict=True):
        assert torch.equal(actual, expected)


def test_selective_checkpointing_counts_flops_once_if_saved():
    (q, k, v, _), inputs = operands(Case(equal_lengths(8), dtype=torch.float32))
    counts = {}
    for policy in (CheckpointPolicy.MUST_SAVE, CheckpointPolicy.MUST_RECOMPUTE):
        contexts = functools.partial(
            create_selective_checkpoint_contexts,
            lambda context, operator, *args, policy=policy, **kwargs: policy,
        )
        with FlopCounterMode(display=False) as counter:
            checkpoint(
                lambda *x: flash_attn_varlen_func(
                    *x, inputs.cu_seqlens_q, inputs.cu_seqlens_k, 8, 8
                ),
                q,
                k,
                v,
                use_reentrant=False,
                context_fn=contexts,
            ).sum().backward()
        counts[policy] = counter.get_total_flops()
    unit = 8 * 8 * 4 * 2 * 16
    assert counts[CheckpointPolicy.MUST_SAVE] == 7 * unit
    assert counts[CheckpointPolicy.MUST_RECOMPUTE] == 9 * unit


def test_returned_probabilities_carry_the_mask_in_their_sign(device):
    """Returns [N, H, max_q, max_k]; |p| is the weight before dropout, p < 0 where dropped."""
    documents = ((5, 8), (0, 3), (6, 2))
    inputs = make_inputs(Case(documents, dtype=torch.float64), device)
    out, lse, weights = flash_attn_varlen_func(
        inputs.q,
        inputs.k,
        inputs.v,
        inputs.cu_seqlens_q,
        inputs.cu_seqlens_k,
        6,
        8,
        0.4,
        causal=True,
        dropout_seed=3,
        return_attn_probs=True,
        backend="pytorch",
    )
    assert out.shape == inputs.q.shape
    assert lse.shape == (4, 11)
    assert weights.shape == (3, 4, 6, 8)
    assert (weights < 0).any()
    begin_q, begin_k = inputs.cu_seqlens_q.tolist(), inputs.cu_seqlens_k.tolist()
    for index, (length_q, length_k) in enumerate(documents):
        own = weights[index]
        assert (own[:, length_q:] == 0).all()
        assert (own[:, :, length_k:] == 0).all()
        own = own[:, :length_q, :length_k]
        rows = slice(begin_q[index], begin_q[index + 1])
        keys = slice(begin_k[index], begin_k[index + 1])
        *_, plain = dense_attention(inputs.q[rows], inputs.k[keys], inputs.v[keys], window=(-1, 0))
        assert_equal_in_float64(own.abs(), plain)
        kept = own.clamp(min=0) * (65536 / (65536 - round(0.4 * 65536)))
        values = inputs.v[keys].repeat_interleave(2, dim=1)
        assert_equal_in_float64(out[rows], torch.einsum("hij,jhd->ihd", kept, values))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_returned_probabilities_are_computed_in_at_least_float32(dtype, device):
    """The weights equal the dense softmax of float32 or float64, rounded to the inputs' dtype."""
    inputs = make_inputs(Case(((5, 8),), dtype=dtype), device)
    arguments = (inputs.cu_seqlens_q, inputs.cu_seqlens_k, 5, 8)
    *_, weights = flash_attn_varlen_func(
        inputs.q, inputs.k, inputs.v, *arguments, return_attn_probs=True, backend="pytorch"
    )
    precise = torch.promote_types(dtype, torch.float32)
    *_, expected = dense_attention(*(x.to(precise) for x in (inputs.q, inputs.k, inputs.v)))
    assert weights.dtype == dtype
    assert torch.equal(weights[0], expected.to(dtype))
