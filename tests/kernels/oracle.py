"""Computes a call of flash_attn_varlen_func, and its reference in dense PyTorch, by document.

A test describes a call as a `Case`, makes its `Inputs`, and runs `attention` on any backend.
`assert_matches_oracle` then requires at most twice plain PyTorch's error against float64.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lctrain.kernels import dual_chunk_attn_varlen_func, flash_attn_varlen_func
from lctrain_kernels.dual_chunk.reference import dense_dual_chunk_attention
from lctrain_kernels.reference.attention import dense_attention
from tests.kernels.kept_results import keep_results
from tests.numerics import (
    assert_equal_in_float64,
    assert_error_at_most_twice,
    assert_errors_at_most_twice,
    assert_sum_error_at_most_twice,
)

DROPOUT_SEED = -0x1234_5678_9ABC_DEF0  # negative, and both halves of the key in use


@dataclass(frozen=True)
class Case:
    """A call of an attention on packed documents; by default full, without further features.

    Attributes:
        documents: (queries, keys) of each document.
        heads: Query heads, H.
        heads_k: Key/value heads, Hk.
        head_dim: Head dim, D.
        dtype: Dtype of q, k and v.
        causal: Whether attention is causal.
        window: (left, right), as in the public function.
        window_on_device: Whether the window is passed as a tensor of two integers.
        softcap: Softcap of the logits; 0 turns it off.
        alibi: ALiBi slopes: "heads" for [H], "documents" for [N, H].
        sink: Whether to pass a learnable sink.
        dropout_p: Dropout probability; the seed is DROPOUT_SEED.
        magnitude: Standard deviation of q and k; logits grow with its square.
        fused_qkv: Whether q, k and v are strided views of one tensor.
        dout_order: Memory layout of the gradient of out: a permutation of "thd".
        chunks: (chunk_size, local_size) for dual chunk attention, which is causal and supports only
            dropout and logit_scale; None for flash_attn_varlen_func.
        logit_scale: Whether to pass a factor per document; dual chunk attention only.
    """

    documents: tuple[tuple[int, int], ...]
    heads: int = 4
    heads_k: int = 2
    head_dim: int = 16
    dtype: torch.dtype = torch.float16
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    window_on_device: bool = False
    softcap: float = 0.0
    alibi: str = ""
    sink: bool = False
    dropout_p: float = 0.0
    magnitude: float = 1.0
    fused_qkv: bool = False
    dout_order: str = "thd"
    chunks: tuple[int, int] | None = None
    logit_scale: bool = False


def equal_lengths(*lengths: int) -> tuple[tuple[int, int], ...]:
    """Returns (queries, keys) of documents with as many queries as keys."""
    return tuple((length, length) for length in lengths)


@dataclass(frozen=True)
class Inputs:
    """Tensors of a case: q, dout [T, H, D]; k, v [Tk, Hk, D]; dlse [H, T]."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    dlse: Tensor
    slopes: Tensor | None
    sink: Tensor | None
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    logit_scale: Tensor | None = None


@dataclass(frozen=True)
class Result:
    """Results of a call: out, lse and all gradients; dsink is None without a sink."""

    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor
    dsink: Tensor | None

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Yields (name, tensor) of the tensors that are not None."""
        for field in fields(self):
            tensor = getattr(self, field.name)
            if tensor is not None:
                yield field.name, tensor

    def document(self, inputs: Inputs, index: int) -> "Result":
        """Returns the rows of one document, without dsink, which is a sum over all documents."""
        queries = slice(*inputs.cu_seqlens_q[index : index + 2].tolist())
        keys = slice(*inputs.cu_seqlens_k[index : index + 2].tolist())
        return Result(
            self.out[queries],
            self.lse[:, queries],
            self.dq[queries],
            self.dk[keys],
            self.dv[keys],
            None,
        )


def cumulative(lengths: Sequence[int], device: torch.device | str) -> Tensor:
    """Returns the cumulative lengths [N + 1] int32 on `device`."""
    lengths = torch.tensor([0, *lengths], dtype=torch.int64)
    return lengths.cumsum(0).to(torch.int32).to(device)


def make_inputs(case: Case, device: torch.device | str = "cpu", seed: int = 0) -> Inputs:
    """Draws the tensors of a case; a seed gives the same numbers on every device."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    total_q = sum(queries for queries, _ in case.documents)
    total_k = sum(keys for _, keys in case.documents)
    heads, heads_k, head_dim = case.heads, case.heads_k, case.head_dim
    if case.fused_qkv:
        fused = normal(total_q, heads + 2 * heads_k, head_dim).to(device, case.dtype)
        q, k, v = fused.split([heads, heads_k, heads_k], dim=1)
    else:
        q = (normal(total_q, heads, head_dim) * case.magnitude).to(device, case.dtype)
        k = (normal(total_k, heads_k, head_dim) * case.magnitude).to(device, case.dtype)
        v = normal(total_k, heads_k, head_dim).to(device, case.dtype)
    sizes = {"t": total_q, "h": heads, "d": head_dim}
    stored = normal(*(sizes[axis] for axis in case.dout_order)).to(device, case.dtype)
    dout = stored.permute(*(case.dout_order.index(axis) for axis in "thd"))
    slopes = None
    if case.alibi:
        shape = (heads,) if case.alibi == "heads" else (len(case.documents), heads)
        slopes = (torch.rand(*shape, generator=generator) * 0.5).to(device)
    return Inputs(
        q=q,
        k=k,
        v=v,
        dout=dout,
        dlse=normal(heads, total_q).to(device),
        slopes=slopes,
        sink=normal(heads).to(device) if case.sink else None,
        cu_seqlens_q=cumulative([queries for queries, _ in case.documents], device),
        cu_seqlens_k=cumulative([keys for _, keys in case.documents], device),
        logit_scale=0.8 + torch.rand(len(case.documents), generator=generator).to(device)
        if case.logit_scale
        else None,
    )


def frequencies(case: Case, device: torch.device | str) -> Tensor:
    """Returns the inverse frequencies of RoPE with base 10,000, [D/2] float32."""
    columns = torch.arange(0, case.head_dim, 2, dtype=torch.float64)
    return (10_000 ** -(columns / case.head_dim)).float().to(device)


def attention(case: Case, inputs: Inputs, **options: object) -> Result:
    """Runs a case's attention forward and backward; `options` override the call's arguments."""
    q, k, v = (x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    sink = None if inputs.sink is None else inputs.sink.detach().requires_grad_()
    dlse = inputs.dlse
    if case.chunks is not None:
        out, lse = _dual_chunk(case, inputs, (q, k, v), options)
        grads = torch.autograd.grad([out, lse], [q, k, v], [inputs.dout, dlse.to(lse.dtype)])
        return Result(out.detach(), lse.detach(), *grads, None)
    window = case.window
    if case.window_on_device:
        window = torch.tensor(window, dtype=torch.int32, device=q.device)
    arguments = {
        "dropout_p": case.dropout_p,
        "causal": case.causal,
        "window_size": window,
        "softcap": case.softcap,
        "alibi_slopes": inputs.slopes,
        "learnable_sink": sink,
        "dropout_seed": DROPOUT_SEED if case.dropout_p else None,
    } | options
    out, lse = flash_attn_varlen_func(
        q,
        k,
        v,
        inputs.cu_seqlens_q,
        inputs.cu_seqlens_k,
        max((queries for queries, _ in case.documents), default=0),
        max((keys for _, keys in case.documents), default=0),
        return_lse=True,
        **arguments,
    )
    leaves = [q, k, v] if sink is None else [q, k, v, sink]
    dq, dk, dv, *dsink = torch.autograd.grad([out, lse], leaves, [inputs.dout, dlse.to(lse.dtype)])
    return Result(out.detach(), lse.detach(), dq, dk, dv, dsink[0] if dsink else None)


def _dual_chunk(
    case: Case, inputs: Inputs, leaves: tuple[Tensor, ...], options: dict[str, object]
) -> tuple[Tensor, Tensor]:
    same = inputs.cu_seqlens_q.tolist() == inputs.cu_seqlens_k.tolist()
    arguments = {
        "inv_freq": frequencies(case, inputs.q.device),
        "chunk_size": case.chunks[0],
        "local_size": case.chunks[1],
        "logit_scale": inputs.logit_scale,
        "dropout_p": case.dropout_p,
        "dropout_seed": DROPOUT_SEED if case.dropout_p else None,
        "cu_seqlens_k": None if same else inputs.cu_seqlens_k,
        "max_seqlen_k": max((keys for _, keys in case.documents), default=0),
    } | options
    return dual_chunk_attn_varlen_func(
        *leaves,
        inputs.cu_seqlens_q,
        max((queries for queries, _ in case.documents), default=0),
        return_lse=True,
        **arguments,
    )


@keep_results
def dense(
    case: Case,
    inputs: Inputs,
    dtype: torch.dtype,
    *,
    chunk: int | None = None,
    sample: Sequence[int] | None = None,
) -> Result:
    """Computes the call in dense PyTorch, document by document, with products in `dtype`.

    Args:
        case: The call.
        inputs: Its tensors, which are cast to `dtype`.
        dtype: float64 for the reference; the case's dtype for plain PyTorch.
        sample: Documents to compute; the rows of all other documents stay zero.
        chunk: Queries per chunk, for documents whose logits exceed memory. Needs a causal case
            without dropout: each chunk is then computed as a document, aligned at the bottom right.
    """
    state = torch.promote_types(dtype, torch.float32)
    # With chunks, the gradients of keys are sums: in the state's precision.
    kept = dtype if chunk is None else state
    out = torch.zeros_like(inputs.q, dtype=dtype)
    lse = torch.zeros_like(inputs.dlse, dtype=state)
    dq, dk, dv = (torch.zeros_like(x, dtype=kept) for x in (inputs.q, inputs.k, inputs.v))
    dsink = None if inputs.sink is None else torch.zeros_like(inputs.sink, dtype=state)
    begin_q, begin_k = inputs.cu_seqlens_q.tolist(), inputs.cu_seqlens_k.tolist()
    for index in range(len(case.documents)) if sample is None else sample:
        length_q, length_k = case.documents[index]
        slopes = inputs.slopes
        if slopes is not None and slopes.dim() == 2:
            slopes = slopes[index]
        step = length_q if chunk is None else chunk
        for start in range(0, length_q, max(1, step)):
            stop = min(length_q, start + step)
            rows = slice(begin_q[index] + start, begin_q[index] + stop)
            seen = length_k if chunk is None else max(0, length_k - length_q + stop)
            keys = slice(begin_k[index], begin_k[index] + seen)
            q, k, v = (
                x.detach().to(dtype).requires_grad_()
                for x in (inputs.q[rows], inputs.k[keys], inputs.v[keys])
            )
            sink = None if inputs.sink is None else inputs.sink.detach().to(state).requires_grad_()
            dropout = {
                "dropout_p": case.dropout_p,
                "dropout_seed": DROPOUT_SEED,
                "document_id": index,
            }
            if case.chunks is not None:
                factor = inputs.logit_scale
                results = dense_dual_chunk_attention(
                    q,
                    k,
                    v,
                    inv_freq=frequencies(case, q.device),
                    chunk_size=case.chunks[0],
                    local_size=case.chunks[1],
                    logit_scale=1.0 if factor is None else float(factor[index]),
                    **dropout,
                )
            else:
                results = dense_attention(
                    q,
                    k,
                    v,
                    window=(case.window[0], 0 if case.causal else case.window[1]),
                    softcap=case.softcap,
                    alibi_slopes=slopes,
                    learnable_sink=sink,
                    **dropout,
                )[:2]
            out[rows], lse[:, rows] = (x.detach() for x in results)
            cotangents = (inputs.dout[rows].to(dtype), inputs.dlse[:, rows].to(state))
            for result, cotangent in zip(results, cotangents, strict=True):
                if result.requires_grad:  # without a key or a sink it is a constant
                    result.backward(cotangent, retain_graph=True)
            for total, leaf in ((dq[rows], q), (dk[keys], k), (dv[keys], v), (dsink, sink)):
                if leaf is not None and leaf.grad is not None:
                    total += leaf.grad
    return Result(out, lse, dq, dk, dv, dsink)


def assert_matches_oracle(
    actual: Result,
    case: Case,
    inputs: Inputs,
    *,
    chunk: int | None = None,
    sample: Sequence[int] | None = None,
    together: bool = False,
) -> None:
    """Asserts that each output and gradient has at most twice plain PyTorch's error.

    Args:
        actual: Result of `attention`.
        case: The call.
        inputs: The call's inputs.
        chunk: See `dense`.
        sample: Documents to compare, without dsink; default all.
        together: Whether tensors are judged together, and dsink as a sum. This is for PyTorch paths
            in float32: both sides add in an order that depends on the CPU, so the error of one
            small tensor is partly luck.
    """
    plain = dense(case, inputs, inputs.q.dtype, chunk=chunk, sample=sample)
    exact = dense(case, inputs, torch.float64, chunk=chunk, sample=sample)
    if sample is not None:
        actual, plain, exact = (_gather(x, inputs, sample) for x in (actual, plain, exact))
    expected, precise = dict(plain.items()), dict(exact.items())
    if together:
        dsink = precise.pop("dsink", None)
        assert_errors_at_most_twice(dict(actual.items()), expected, precise)
        if dsink is not None:
            terms, exact_terms = _dsink_terms(plain, inputs), _dsink_terms(exact, inputs)
            assert_equal_in_float64(exact_terms.sum(1), dsink.double(), "dsink")
            for head, found in enumerate(actual.dsink):
                assert_sum_error_at_most_twice(found, terms[head], exact_terms[head], "dsink")
        return
    for name, tensor in actual.items():
        assert_error_at_most_twice(tensor, expected[name], precise[name], name)


def _dsink_terms(result: Result, inputs: Inputs) -> Tensor:
    """Returns each query's term of the sum dsink, [H, T]: p_sink (dlse - out . dout)."""
    dtype = result.lse.dtype
    weights = (inputs.sink.to(dtype)[:, None] - result.lse).exp()
    delta = (result.out.to(dtype) * inputs.dout.to(dtype)).sum(-1).T
    return weights * (inputs.dlse.to(dtype) - delta)


def _gather(result: Result, inputs: Inputs, sample: Sequence[int]) -> Result:
    """Returns a Result with the rows of some documents only, one document after the other."""
    parts = [result.document(inputs, index) for index in sample]
    return Result(
        torch.cat([part.out for part in parts]),
        torch.cat([part.lse for part in parts], dim=1),
        torch.cat([part.dq for part in parts]),
        torch.cat([part.dk for part in parts]),
        torch.cat([part.dv for part in parts]),
        None,
    )
