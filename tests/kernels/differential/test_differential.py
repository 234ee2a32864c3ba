"""Compares differential attention with float64 on tiny packs: every feature and all gradients.

Without a GPU the Triton kernels run under the interpreter, with tiles small enough for documents to
span several. test_differential_gpu.py has the cases for a GPU.
"""

import dataclasses

import pytest
import torch

from lctrain.kernels import diff_attn_varlen_func, flash_attn_varlen_func
from lctrain_kernels.bench.accuracy import error_ratio
from tests.kernels.differential.cases import TINY_CASES, V1, V2
from tests.kernels.differential.oracle import (
    DifferentialCase,
    assert_matches_oracle,
    attention,
    dense,
    make_inputs,
)
from tests.kernels.oracle import DROPOUT_SEED, equal_lengths
from tests.numerics import (
    assert_equal_in_float64,
    assert_error_at_most_twice,
    assert_sum_error_at_most_twice,
)

pytestmark = pytest.mark.usefixtures("nan_filled_memory")
HAS_GPU = torch.cuda.is_available()
needs_interpreter = pytest.mark.skipif(
    HAS_GPU, reason="kernels run on the GPU here: test_differential_gpu.py"
)
by_case = pytest.mark.parametrize("case", TINY_CASES.values(), ids=TINY_CASES.keys())
# Compiled once on a GPU, where other tests use these combinations too.
BASES = {
    "v1": V1 if HAS_GPU else DifferentialCase((), heads=2, lam="scalar", views="halves"),
    "v2": V2 if HAS_GPU else DifferentialCase((), value_dim=16, shared_k=True, views="adjacent"),
}
by_version = pytest.mark.parametrize("base", BASES.values(), ids=BASES.keys())


def backends(device: torch.device) -> list[str]:
    """Returns the backends that support float16 tensors on this device."""
    return ["triton"] if device.type == "cuda" else ["triton", "pytorch"]


@needs_interpreter
@by_case
def test_triton_matches_float64(case):
    inputs = make_inputs(case)
    assert_matches_oracle(attention(case, inputs, backend="triton"), case, inputs)


@by_case
def test_pytorch_path_matches_float64(case):
    case = dataclasses.replace(case, dtype=torch.bfloat16)
    inputs = make_inputs(case)
    assert_matches_oracle(attention(case, inputs, backend="auto"), case, inputs)


@by_case
def test_pytorch_path_is_the_definition(case):
    """In float64 the PyTorch path and the oracle agree to rounding."""
    case = dataclasses.replace(case, dtype=torch.float64)
    inputs = make_inputs(case)
    expected = dict(dense(case, inputs, torch.float64).items())
    for name, tensor in attention(case, inputs, backend="pytorch").items():
        assert_equal_in_float64(tensor, expected[name].to(tensor.dtype), name, tensor.dtype)


@pytest.mark.parametrize("name", ["v1", "full", "dropout-v2-window_on_device"])
def test_pytorch_path_in_float32(name):
    case = dataclasses.replace(TINY_CASES[name], dtype=torch.float32)
    inputs = make_inputs(case)
    assert_matches_oracle(attention(case, inputs, backend="auto"), case, inputs)


@needs_interpreter
def test_triton_in_float32():
    """Compares norms, because single entries carry the rounding of a float32 lse."""
    case = dataclasses.replace(TINY_CASES["full"], dtype=torch.float32)
    inputs = make_inputs(case)
    plain = dict(dense(case, inputs, torch.float32).items())
    exact = dict(dense(case, inputs, torch.float64).items())
    for name, tensor in attention(case, inputs, backend="triton").items():
        assert error_ratio(tensor, plain[name], exact[name]).norm <= 2, name


@pytest.mark.parametrize("backend", [pytest.param("triton", marks=needs_interpreter), "pytorch"])
def test_logits_up_to_ten_thousand(backend):
    case = DifferentialCase(equal_lengths(34, 10), magnitude=40.0)
    inputs = make_inputs(case)
    assert_matches_oracle(attention(case, inputs, backend=backend), case, inputs)


@by_version
def test_lambda_zero_is_plain_attention(base, device):
    """out, lse1 and the first branch's gradients equal those of flash_attn_varlen_func."""
    case = dataclasses.replace(base, documents=equal_lengths(40, 9), shared_k=False, views="")
    inputs = make_inputs(case, device)
    inputs = dataclasses.replace(inputs, lam=torch.zeros_like(inputs.lam))
    result = attention(case, inputs, backend="pytorch" if device.type == "cpu" else "triton")
    q, k, v = (x.detach().requires_grad_() for x in (inputs.q1, inputs.k1, inputs.v))
    halves = v.split(case.head_dim, 2)
    cu = inputs.cu_seqlens_q
    outputs = [
        flash_attn_varlen_func(q, k, half, cu, cu, 40, 40, causal=True, return_lse=True)
        for half in halves
    ]
    dlse = inputs.dlse1 / len(halves)
    out = torch.cat([out for out, _ in outputs], dim=2)
    cotangents = [inputs.dout, *[dlse] * len(halves)]
    expected = torch.autograd.grad([out, *(lse for _, lse in outputs)], (q, k, v), cotangents)
    exact = dense(case, inputs, torch.float64)
    plain = (out, outputs[0][1], *expected)
    for name, tensor in zip(("out", "lse1", "dq1", "dk1", "dv"), plain, strict=True):
        assert_error_at_most_twice(getattr(result, name), tensor, getattr(exact, name), name)


@by_version
def test_equal_branches_with_lambda_one_cancel(base, device):
    """out is 0; each gradient except lambda's is 0 or the negative of the other branch's."""
    case = dataclasses.replace(base, documents=equal_lengths(33, 18), views="")
    inputs = make_inputs(case, device)
    inputs = dataclasses.replace(
        inputs,
        q2=inputs.q1,
        k2=inputs.k1,
        lam=torch.ones_like(inputs.lam),
        dlse1=torch.zeros_like(inputs.dlse1),
        dlse2=torch.zeros_like(inputs.dlse2),
    )
    plain, exact = (dense(case, inputs, dtype) for dtype in (inputs.q1.dtype, torch.float64))
    assert_equal_in_float64(exact.dq1, -exact.dq2)
    for backend in backends(device):
        result = attention(case, inputs, backend=backend)
        assert (result.out == 0).all()
        assert torch.equal(result.lse1, result.lse2)
        assert (result.dv == 0).all()
        assert_error_at_most_twice(result.dq1, plain.dq1, exact.dq1, "dq1")
        assert_error_at_most_twice(result.dq2, plain.dq2, exact.dq2, "dq2")
        assert (result.dlam != 0).any()


@by_version
def test_blind_rows_are_zero_with_zero_gradients(base, device):
    case = dataclasses.replace(base, documents=((40, 6), (9, 0), (0, 5)))
    inputs = make_inputs(case, device)
    for backend in backends(device):
        result = attention(case, inputs, backend=backend)
        blind = torch.zeros(49, dtype=torch.bool, device=device)
        blind[:34] = blind[40:] = True
        for name in ("out", "dq1", "dq2", "dlam"):
            assert (getattr(result, name)[blind] == 0).all(), name
        for lse in (result.lse1, result.lse2):
            assert (lse[:, blind] == -torch.inf).all()
            assert lse[:, ~blind].isfinite().all()
        for name, tensor in result.items():
            assert not tensor.isnan().any(), name
        assert (result.dk1[6:] == 0).all()
        assert (result.dv[6:] == 0).all()


@by_version
def test_packs_without_queries_or_without_documents(base, device):
    for documents in ((), ((0, 0),), ((0, 5),)):
        case = dataclasses.replace(base, documents=documents)
        inputs = make_inputs(case, device)
        for backend in backends(device):
            result = attention(case, inputs, backend=backend)
            assert result.out.shape == (0, case.heads, case.value_dim)
            assert result.lse1.shape == (case.heads, 0)
            assert (result.dk1 == 0).all()
            assert (result.dv == 0).all()


def lam_gradient(case, inputs, lam, backend):
    lam = lam.detach().requires_grad_()
    out = diff_attn_varlen_func(
        inputs.q1,
        inputs.q2,
        inputs.k1,
        inputs.k2,
        inputs.v,
        lam,
        inputs.cu_seqlens_q,
        40,
        backend=backend,
    )
    return out.detach(), *torch.autograd.grad(out, lam, inputs.dout)


@by_version
def test_one_lambda_is_that_lambda_everywhere(base, device):
    """lambda as a scalar, [H] or [T, H] gives the same output; gradients are summed."""
    case = dataclasses.replace(base, documents=equal_lengths(21, 40))
    inputs = make_inputs(case, device)
    heads = torch.linspace(0.1, 0.8, case.heads, device=device)
    for backend in backends(device):
        for lam in (heads, heads[0]):
            every = lam.expand(61, case.heads).contiguous()
            out, dlam = lam_gradient(case, inputs, lam, backend)
            expected, by_token = lam_gradient(case, inputs, every, backend)
            assert torch.equal(out, expected)
            assert dlam.shape == lam.shape
            served = by_token.unbind(1) if lam.dim() else [by_token]
            for total, terms in zip(dlam.reshape(-1), served, strict=True):
                assert_sum_error_at_most_twice(total, terms, terms)  # roundings of the additions


def test_lambda_may_be_half_precision(device):
    case = dataclasses.replace(BASES["v2"], documents=equal_lengths(20))
    inputs = make_inputs(case, device)
    lam = torch.sigmoid(inputs.lam).to(inputs.q1.dtype)
    for backend in backends(device):
        out, dlam = lam_gradient(case, inputs, lam, backend)
        expected, exact = lam_gradient(case, inputs, lam.float(), backend)
        assert torch.equal(out, expected)
        assert torch.equal(dlam, exact.to(lam.dtype))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3], ids=["plain", "dropout"])
def test_it_is_two_heads_of_plain_attention(dropout_p):
    """Branch b of head h equals query head 2 h + b of plain attention, dropout mask included."""
    case = DifferentialCase(
        equal_lengths(20, 13), value_dim=16, shared_k=True, dtype=torch.float64, views="adjacent"
    )
    inputs = make_inputs(case)
    result = attention(case, inputs, dropout_p=dropout_p, dropout_seed=DROPOUT_SEED)
    q = torch.stack((inputs.q1, inputs.q2), dim=2).flatten(1, 2)
    both = flash_attn_varlen_func(
        q,
        inputs.k1,
        inputs.v,
        inputs.cu_seqlens_q,
        inputs.cu_seqlens_k,
        20,
        20,
        dropout_p,
        causal=True,
        dropout_seed=DROPOUT_SEED,
    )
    expected = both[:, 0::2] - inputs.lam[..., None] * both[:, 1::2]
    assert_equal_in_float64(result.out, expected)


@by_version
def test_strided_views_are_used_without_a_copy(base, device):
    case = dataclasses.replace(base, documents=equal_lengths(9))
    inputs = make_inputs(case, device)
    names = ("q1", "q2", "k1", "v")
    leaves = {name: getattr(inputs, name).detach().requires_grad_() for name in names}
    saved = []

    def pack(tensor):
        saved.append((tensor.data_ptr(), tensor.stride()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        diff_attn_varlen_func(
            leaves["q1"],
            leaves["q2"],
            leaves["k1"],
            leaves["k1"] if case.shared_k else inputs.k2,
            leaves["v"],
            inputs.lam,
            inputs.cu_seqlens_q,
            9,
        )
    assert not leaves["q1"].is_contiguous()
    for name, tensor in leaves.items():
        assert (tensor.data_ptr(), tensor.stride()) in saved, f"{name} was copied"
    if not case.shared_k:
        assert (inputs.k2.data_ptr(), inputs.k2.stride()) in saved, "k2 was copied"


def test_a_shared_k_gets_the_gradients_of_both_branches(device):
    case = dataclasses.replace(BASES["v2"], documents=equal_lengths(30, 7))
    inputs = make_inputs(case, device)
    apart = dataclasses.replace(case, shared_k=False)
    for backend in backends(device):
        shared = attention(case, inputs, backend=backend)
        both = attention(apart, inputs, backend=backend)
        total = both.dk1.float() + both.dk2.float()
        exact = dense(case, inputs, torch.float64)
        assert_error_at_most_twice(shared.out, both.out, exact.out)
        assert_error_at_most_twice(shared.dk1, total, exact.dk1)


def test_returns_follow_the_flag(device):
    inputs = make_inputs(dataclasses.replace(BASES["v1"], documents=equal_lengths(4, 3)), device)
    call = (inputs.q1, inputs.q2, inputs.k1, inputs.k2, inputs.v, inputs.lam)
    out = diff_attn_varlen_func(*call, inputs.cu_seqlens_q, 4)
    assert isinstance(out, torch.Tensor)
    triple = diff_attn_varlen_func(*call, inputs.cu_seqlens_q, 4, return_lse=True)
    assert torch.equal(triple[0], out)
    assert triple[1].shape == triple[2].shape == (inputs.q1.shape[1], 7)
    assert triple[1].dtype == torch.float32
