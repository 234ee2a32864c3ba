"""Compares varlen attention with float64 on tiny packs: every feature and all gradients.

Without a GPU the Triton kernels run under the interpreter, with tiles small enough for documents to
span several. The PyTorch path runs the same cases. test_varlen_gpu.py has the cases for a GPU.
"""

import dataclasses

import pytest
import torch

from lctrain.kernels import flash_attn_func, flash_attn_varlen_func
from tests.kernels.cases import GPU_PLAIN, TINY_CASES
from tests.kernels.oracle import (
    DROPOUT_SEED,
    Case,
    assert_matches_oracle,
    attention,
    dense,
    equal_lengths,
    make_inputs,
)
from tests.numerics import assert_equal_in_float64

pytestmark = pytest.mark.usefixtures("nan_filled_memory")
needs_interpreter = pytest.mark.skipif(
    torch.cuda.is_available(), reason="kernels run on the GPU here: test_varlen_gpu.py"
)

BASE = GPU_PLAIN if torch.cuda.is_available() else Case((), causal=True)  # compiled once
by_case = pytest.mark.parametrize("case", TINY_CASES.values(), ids=TINY_CASES.keys())


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


@pytest.mark.parametrize("name", ["causal", "window", "everything"])
def test_pytorch_path_in_float32(name):
    case = dataclasses.replace(TINY_CASES[name], dtype=torch.float32)
    inputs = make_inputs(case)
    found = attention(case, inputs, backend="pytorch")
    assert_matches_oracle(found, case, inputs, together=True)


@pytest.mark.parametrize("backend", [pytest.param("triton", marks=needs_interpreter), "pytorch"])
def test_logits_up_to_ten_thousand(backend):
    """In half precision only: in float32, rounding lse (|lse| eps) limits the backward."""
    case = Case(equal_lengths(34, 10), magnitude=40.0, causal=True)
    inputs = make_inputs(case)
    logits = torch.einsum("ihd,jhd->hij", inputs.q.float(), inputs.k.float().repeat(1, 2, 1)) / 4
    assert 5e3 < logits.abs().max() < 2e4
    assert_matches_oracle(attention(case, inputs, backend=backend), case, inputs)


def backends(device: torch.device) -> list[str]:
    """Returns the backends that support float16 tensors on this device."""
    return ["triton"] if device.type == "cuda" else ["triton", "pytorch"]


def test_blind_rows_are_zero_with_zero_gradients(device):
    case = dataclasses.replace(BASE, documents=((40, 6), (9, 0)))
    inputs = make_inputs(case, device)
    for backend in backends(device):
        result = attention(case, inputs, backend=backend)
        blind = torch.zeros(49, dtype=torch.bool, device=device)
        blind[:34] = blind[40:] = True
        assert (result.out[blind] == 0).all()
        assert (result.lse[:, blind] == -torch.inf).all()
        assert (result.dq[blind] == 0).all()
        for name, tensor in result.items():
            assert not tensor.isnan().any(), name
        assert result.lse[:, ~blind].isfinite().all()


def test_packs_without_tokens(device):
    for documents in ((), ((0, 0), (0, 0))):
        case = dataclasses.replace(BASE, documents=documents, sink=True)
        inputs = make_inputs(case, device)
        for backend in backends(device):
            result = attention(case, inputs, backend=backend)
            assert result.out.shape == inputs.q.shape
            assert result.lse.shape == (4, 0)
            assert result.dk.shape == inputs.k.shape
            assert (result.dsink == 0).all()


def test_queries_without_keys_and_keys_without_queries(device):
    for documents in (((5, 0),), ((0, 5),)):
        case = dataclasses.replace(BASE, documents=documents)
        inputs = make_inputs(case, device)
        for backend in backends(device):
            result = attention(case, inputs, backend=backend)
            assert (result.out == 0).all()
            assert (result.lse == -torch.inf).all()
            for grad in (result.dq, result.dk, result.dv):
                assert (grad == 0).all()


def test_more_documents_than_a_tile_has_rows(device):
    """Each document has one token, so out is its value."""
    case = dataclasses.replace(BASE, documents=equal_lengths(*[1] * 40), heads=2, heads_k=1)
    inputs = make_inputs(case, device)
    for backend in backends(device):
        result = attention(case, inputs, backend=backend)
        assert torch.equal(result.out, inputs.v.expand(-1, 2, -1))
        assert_matches_oracle(result, case, inputs)


def test_softmax_scale_is_the_factor_of_the_logits(device):
    """Doubling the scale equals doubling the query exactly."""
    case = dataclasses.replace(BASE, documents=equal_lengths(20))
    inputs = make_inputs(case, device)
    longer = dataclasses.replace(inputs, q=inputs.q * 2)
    for backend in backends(device):
        scaled = attention(case, inputs, softmax_scale=2 * case.head_dim**-0.5, backend=backend)
        expected = attention(case, longer, backend=backend)
        assert torch.equal(scaled.out, expected.out)
        assert torch.equal(scaled.lse, expected.lse)
        assert torch.equal(scaled.dk, expected.dk)
        assert torch.equal(scaled.dq, expected.dq * 2)


def test_strided_views_are_used_without_a_copy(device):
    case = dataclasses.replace(BASE, documents=equal_lengths(9), fused_qkv=True)
    inputs = make_inputs(case, device)
    q, k, v = (x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    saved = []

    def pack(tensor):
        saved.append((tensor.data_ptr(), tensor.stride()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        flash_attn_varlen_func(q, k, v, inputs.cu_seqlens_q, inputs.cu_seqlens_k, 9, 9, causal=True)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        assert not tensor.is_contiguous()
        assert (tensor.data_ptr(), tensor.stride()) in saved, f"{name} was copied"


def test_a_last_stride_other_than_one_is_accepted(device):
    case = dataclasses.replace(BASE, documents=equal_lengths(12, 7))
    inputs = make_inputs(case, device)
    columns_first = {
        name: getattr(inputs, name).permute(2, 0, 1).contiguous().permute(1, 2, 0)
        for name in ("q", "k", "v")
    }
    assert columns_first["q"].stride(2) != 1
    for backend in backends(device):
        expected = attention(case, inputs, backend=backend)
        actual = attention(case, dataclasses.replace(inputs, **columns_first), backend=backend)
        for name, tensor in expected.items():
            assert torch.equal(getattr(actual, name), tensor), name


@pytest.mark.parametrize("alibi", ["heads", "documents"])
def test_small_tensors_of_any_stride_are_read_right(device, alibi):
    """The small tensors are slices of tensors with other numbers in between."""
    case = dataclasses.replace(
        BASE,
        documents=((20, 20), (9, 17), (5, 5)),
        causal=False,
        alibi=alibi,
        sink=True,
        dropout_p=0.2,
    )
    inputs = make_inputs(case, device)
    identities = torch.tensor([7, 9, 11], dtype=torch.int32, device=device)
    window = torch.tensor([6, 0], dtype=torch.int32, device=device)

    def sliced(x):
        return torch.stack([x, x + 1], -1)[..., 0]

    strided_inputs = dataclasses.replace(
        inputs,
        slopes=sliced(inputs.slopes),
        sink=sliced(inputs.sink),
        cu_seqlens_q=sliced(inputs.cu_seqlens_q),
        cu_seqlens_k=sliced(inputs.cu_seqlens_k),
    )
    strided_options = {"document_ids": sliced(identities), "window_size": sliced(window)}
    options = {"document_ids": identities, "window_size": window}
    for backend in backends(device):
        expected = attention(case, inputs, backend=backend, **options)
        actual = dict(attention(case, strided_inputs, backend=backend, **strided_options).items())
        for name, tensor in expected.items():
            assert torch.equal(actual[name], tensor), name


def test_flash_attn_func_is_varlen_on_rows():
    """Rows [B, S, H, D] of equal lengths, with fewer queries than keys, slopes, sinks, dropout."""
    case = Case(((6, 9),) * 3, causal=True, dropout_p=0.2, alibi="documents", sink=True)
    inputs = make_inputs(case)
    expected = attention(case, inputs)
    q = inputs.q.unflatten(0, (3, 6)).requires_grad_()
    k, v = (x.unflatten(0, (3, 9)).requires_grad_() for x in (inputs.k, inputs.v))
    out, lse = flash_attn_func(
        q,
        k,
        v,
        0.2,
        causal=True,
        alibi_slopes=inputs.slopes,
        learnable_sink=inputs.sink,
        dropout_seed=DROPOUT_SEED,
        return_lse=True,
    )
    dlse = inputs.dlse.unflatten(1, (3, 6)).transpose(0, 1)
    grads = torch.autograd.grad([out, lse], [q, k, v], [inputs.dout.view_as(out), dlse])
    assert torch.equal(out.flatten(0, 1), expected.out)
    assert torch.equal(lse.transpose(0, 1).flatten(1), expected.lse)
    for grad, name in zip(grads, ("dq", "dk", "dv"), strict=True):
        assert torch.equal(grad.flatten(0, 1), getattr(expected, name)), name


def test_returns_follow_the_flags(device):
    inputs = make_inputs(dataclasses.replace(BASE, documents=equal_lengths(4, 3)), device)
    call = (inputs.q, inputs.k, inputs.v, inputs.cu_seqlens_q, inputs.cu_seqlens_k, 4, 4)
    out = flash_attn_varlen_func(*call, causal=True)
    assert isinstance(out, torch.Tensor)
    pair = flash_attn_varlen_func(*call, causal=True, return_lse=True)
    assert torch.equal(pair[0], out)
    assert pair[1].dtype == torch.float32
    assert len(flash_attn_varlen_func(*call, causal=True, return_attn_probs=True)) == 3
    rows = flash_attn_func(inputs.q[None], inputs.k[None], inputs.v[None], causal=True)
    assert rows.shape == (1, *inputs.q.shape)
