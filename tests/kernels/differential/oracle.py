"""Computes a call of diff_attn_varlen_func, and its reference in dense PyTorch, by document.

The module is like tests/kernels/oracle.py. The compared gradient of lambda is per token and head. A
scalar lambda, or one per head, has the sum of these as its gradient, which test_differential.py
checks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lctrain.kernels import diff_attn_varlen_func
from lctrain_kernels.differential.reference import dense_differential
from tests.kernels.kept_results import keep_results
from tests.kernels.oracle import DROPOUT_SEED, cumulative
from tests.numerics import assert_error_at_most_twice


@dataclass(frozen=True)
class DifferentialCase:
    """A call of differential attention on packed documents.

    Attributes:
        documents: (queries, keys) of each document.
        heads: Pairs of branches, H.
        heads_k: Key/value heads, Hk.
        head_dim: Head dim of queries and keys, D.
        value_dim: Head dim of values, Dv.
        shared_k: Whether both branches use one k.
        lam: Shape of lambda: "scalar", "heads" ([H]) or "tokens" ([T, H]).
        dtype: Dtype of q, k and v.
        causal: Whether attention is causal.
        window: (left, right), as in the public function.
        window_on_device: Whether the window is passed as a tensor of two integers.
        dropout_p: Dropout probability; the seed is DROPOUT_SEED.
        magnitude: Standard deviation of q and k; logits grow with its square.
        views: Memory layout of q1, q2, k1 and k2: "" separate tensors, "adjacent" x[:, 0::2] and
            x[:, 1::2] of one tensor, "halves" x[:, :H] and x[:, H:].
        dout_order: Memory layout of the gradient of out: a permutation of "thd".
    """

    documents: tuple[tuple[int, int], ...]
    heads: int = 4
    heads_k: int = 2
    head_dim: int = 16
    value_dim: int = 32
    shared_k: bool = False
    lam: str = "tokens"
    dtype: torch.dtype = torch.float16
    causal: bool = True
    window: tuple[int, int] = (-1, -1)
    window_on_device: bool = False
    dropout_p: float = 0.0
    magnitude: float = 1.0
    views: str = ""
    dout_order: str = "thd"


@dataclass(frozen=True)
class DifferentialInputs:
    """Tensors of a case: q1, q2 [T, H, D]; k1, k2 [Tk, Hk, D]; v [Tk, Hk, Dv]; dout [T, H, Dv]."""

    q1: Tensor
    q2: Tensor
    k1: Tensor
    k2: Tensor
    v: Tensor
    lam: Tensor
    dout: Tensor
    dlse1: Tensor
    dlse2: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor


@dataclass(frozen=True)
class DifferentialResult:
    """Results of a call: outputs, lse and gradients; dk2 is None if k is shared, dlam is [T, H]."""

    out: Tensor
    lse1: Tensor
    lse2: Tensor
    dq1: Tensor
    dq2: Tensor
    dk1: Tensor
    dk2: Tensor | None
    dv: Tensor
    dlam: Tensor

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Yields (name, tensor) of the tensors that are not None."""
        for field in fields(self):
            tensor = getattr(self, field.name)
            if tensor is not None:
                yield field.name, tensor

    def document(self, inputs: DifferentialInputs, index: int) -> "DifferentialResult":
        """Returns the rows of one document."""
        queries = slice(*inputs.cu_seqlens_q[index : index + 2].tolist())
        keys = slice(*inputs.cu_seqlens_k[index : index + 2].tolist())
        return DifferentialResult(
            self.out[queries],
            self.lse1[:, queries],
            self.lse2[:, queries],
            self.dq1[queries],
            self.dq2[queries],
            self.dk1[keys],
            None if self.dk2 is None else self.dk2[keys],
            self.dv[keys],
            self.dlam[queries],
        )


def make_inputs(
    case: DifferentialCase, device: torch.device | str = "cpu", seed: int = 0
) -> DifferentialInputs:
    """Draws the tensors of a case; a seed gives the same numbers on every device."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def branches(tokens: int, heads: int) -> tuple[Tensor, Tensor]:
        both = (normal(tokens, 2 * heads, case.head_dim) * case.magnitude).to(device, case.dtype)
        if case.views == "adjacent":
            return both[:, 0::2], both[:, 1::2]
        first, second = both[:, :heads], both[:, heads:]
        return (first, second) if case.views else (first.contiguous(), second.contiguous())

    total_q = sum(queries for queries, _ in case.documents)
    total_k = sum(keys for _, keys in case.documents)
    q1, q2 = branches(total_q, case.heads)
    k1, k2 = branches(total_k, case.heads_k)
    sizes = {"t": total_q, "h": case.heads, "d": case.value_dim}
    stored = normal(*(sizes[axis] for axis in case.dout_order)).to(device, case.dtype)
    shapes = {"scalar": (), "heads": (case.heads,), "tokens": (total_q, case.heads)}
    return DifferentialInputs(
        q1=q1,
        q2=q2,
        k1=k1,
        k2=k1 if case.shared_k else k2,
        v=normal(total_k, case.heads_k, case.value_dim).to(device, case.dtype),
        lam=normal(*shapes[case.lam]).to(device),
        dout=stored.permute(*(case.dout_order.index(axis) for axis in "thd")),
        dlse1=normal(case.heads, total_q).to(device),
        dlse2=normal(case.heads, total_q).to(device),
        cu_seqlens_q=cumulative([queries for queries, _ in case.documents], device),
        cu_seqlens_k=cumulative([keys for _, keys in case.documents], device),
    )


def attention(
    case: DifferentialCase, inputs: DifferentialInputs, **options: object
) -> DifferentialResult:
    """Runs diff_attn_varlen_func forward and backward; `options` override the call's arguments."""
    q1, q2, k1, v, lam = (
        x.detach().requires_grad_() for x in (inputs.q1, inputs.q2, inputs.k1, inputs.v, inputs.lam)
    )
    k2 = k1 if case.shared_k else inputs.k2.detach().requires_grad_()
    every_lam = lam.expand(q1.shape[:2])
    window = case.window
    if case.window_on_device:
        window = torch.tensor(window, dtype=torch.int32, device=q1.device)
    arguments = {
        "dropout_p": case.dropout_p,
        "causal": case.causal,
        "window_size": window,
        "dropout_seed": DROPOUT_SEED if case.dropout_p else None,
    } | options
    outputs = diff_attn_varlen_func(
        q1,
        q2,
        k1,
        k2,
        v,
        every_lam,
        inputs.cu_seqlens_q,
        max((queries for queries, _ in case.documents), default=0),
        cu_seqlens_k=inputs.cu_seqlens_k,
        max_seqlen_k=max((keys for _, keys in case.documents), default=0),
        return_lse=True,
        **arguments,
    )
    leaves = [q1, q2, k1, v, every_lam, *([] if case.shared_k else [k2])]
    cotangents = [inputs.dout, *(x.to(outputs[1].dtype) for x in (inputs.dlse1, inputs.dlse2))]
    dq1, dq2, dk1, dv, dlam, *dk2 = torch.autograd.grad(outputs, leaves, cotangents)
    out, lse1, lse2 = (x.detach() for x in outputs)
    return DifferentialResult(out, lse1, lse2, dq1, dq2, dk1, dk2[0] if dk2 else None, dv, dlam)


@keep_results
def dense(
    case: DifferentialCase,
    inputs: DifferentialInputs,
    dtype: torch.dtype,
    *,
    sample: Sequence[int] | None = None,
) -> DifferentialResult:
    """Computes the call in dense PyTorch, document by document, with products in `dtype`.

    Args:
        case: The call.
        inputs: Its tensors, which are cast to `dtype`.
        dtype: float64 for the reference; the case's dtype for plain PyTorch.
        sample: Documents to compute; the rows of all other documents stay zero.
    """
    state = torch.promote_types(dtype, torch.float32)
    every_lam = inputs.lam.expand(inputs.q1.shape[:2])
    out = torch.zeros_like(inputs.dout, dtype=dtype)
    lse1, lse2 = (torch.zeros_like(inputs.dlse1, dtype=state) for _ in range(2))
    dq1, dq2, dk1, dk2, dv = (
        torch.zeros_like(x, dtype=dtype)
        for x in (inputs.q1, inputs.q2, inputs.k1, inputs.k2, inputs.v)
    )
    dlam = torch.zeros_like(every_lam, dtype=state)
    begin_q, begin_k = inputs.cu_seqlens_q.tolist(), inputs.cu_seqlens_k.tolist()
    for index in range(len(case.documents)) if sample is None else sample:
        rows = slice(begin_q[index], begin_q[index + 1])
        keys = slice(begin_k[index], begin_k[index + 1])
        q1, q2, k1, k2, v = (
            x.detach().to(dtype).requires_grad_()
            for x in (
                inputs.q1[rows],
                inputs.q2[rows],
                inputs.k1[keys],
                inputs.k2[keys],
                inputs.v[keys],
            )
        )
        lam = every_lam[rows].detach().to(state).requires_grad_()
        outputs = dense_differential(
            q1,
            q2,
            k1,
            k1 if case.shared_k else k2,
            v,
            lam,
            window=(case.window[0], 0 if case.causal else case.window[1]),
            dropout_p=case.dropout_p,
            dropout_seed=DROPOUT_SEED,
            document_id=index,
        )
        cotangents = (
            inputs.dout[rows].to(dtype),
            inputs.dlse1[:, rows].to(state),
            inputs.dlse2[:, rows].to(state),
        )
        for result, cotangent in zip(outputs, cotangents, strict=True):
            if result.requires_grad:  # without a key it is a constant
                result.backward(cotangent, retain_graph=True)
        out[rows], lse1[:, rows], lse2[:, rows] = (x.detach() for x in outputs)
        for total, leaf in (
            (dq1[rows], q1),
            (dq2[rows], q2),
            (dk1[keys], k1),
            (dk2[keys], k2),
            (dv[keys], v),
            (dlam[rows], lam),
        ):
            if leaf.grad is not None:
                total += leaf.grad
    return DifferentialResult(
        out, lse1, lse2, dq1, dq2, dk1, None if case.shared_k else dk2, dv, dlam
    )


def assert_matches_oracle(
    actual: DifferentialResult,
    case: DifferentialCase,
    inputs: DifferentialInputs,
    *,
    sample: Sequence[int] | None = None,
) -> None:
    """Asserts that each output and gradient has at most twice plain PyTorch's error.

    Args:
        actual: Result of `attention`.
        case: The call.
        inputs: The call's inputs.
        sample: Documents to compare; default all.
    """
    plain = dense(case, inputs, case.dtype, sample=sample)
    exact = dense(case, inputs, torch.float64, sample=sample)
    documents = [None] if sample is None else sample
    for index in documents:
        parts = actual, plain, exact
        if index is not None:
            parts = tuple(part.document(inputs, index) for part in parts)
        expected, precise = dict(parts[1].items()), dict(parts[2].items())
        for name, tensor in parts[0].items():
            assert_error_at_most_twice(tensor, expected[name], precise[name], name)
