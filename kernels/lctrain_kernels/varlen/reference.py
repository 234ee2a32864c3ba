"""Attention over packed documents in plain PyTorch, used on CPUs.

backend="pytorch" also selects it on other devices; reading cu_seqlens then synchronises. It
computes one document at a time, in chunks of queries. So memory is linear in the length of a
document, and documents cannot affect each other. The backward recomputes the weights, as the
kernels do. Arithmetic is in float32, or in float64 for float64 inputs; callers turn autocast off.

`Operands` computes the logits. `attend` and `attend_backward` compute the softmax and its gradient
from logits. Dual chunk and differential attention call them with other logits.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lctrain_kernels.reference.attention import visible_mask
from lctrain_kernels.reference.philox import dropout_keep, keep_scale

_CHUNK_ELEMENTS = 1 << 22  # logits held at once, over all heads
_ROW_GROUP = 16  # chunks start at a multiple of the dropout mask's row groups


@dataclass(frozen=True)
class VarlenOptions:
    """Options of the PyTorch path of an attention.

    Attributes:
        softmax_scale: Factor of q.k.
        window_left: Visible keys before a query's own position; negative is unbounded.
        window_right: Visible keys after a query's own position; negative is unbounded.
        softcap: A softcap c > 0 replaces a logit x by c tanh(x / c); 0 turns it off.
        dropout_p: Probability of dropping an attention weight.
        first_head: Index of the first query head for the dropout RNG.
    """

    softmax_scale: float
    window_left: int = -1
    window_right: int = -1
    softcap: float = 0.0
    dropout_p: float = 0.0
    first_head: int = 0


@dataclass(frozen=True)
class Chunk:
    """M consecutive queries of one document, and the N keys that at least one of them sees.

    Attributes:
        document: Index of the document in the pack.
        rows: Positions of the queries in the document, [M] int64.
        columns: Positions of the keys in the document, [N] int64.
        query: Slice of the pack's queries.
        key: Slice of the pack's keys.
        length_q: Number of queries of the document.
        length_k: Number of keys of the document.
    """

    document: int
    rows: Tensor  # [M] int64, positions in the document
    columns: Tensor  # [N] int64
    query: slice  # of the pack
    key: slice
    length_q: int
    length_k: int


def _visit(
    cu_q: list[int], cu_k: list[int], operands: "Operands", device: torch.device
) -> Iterator[Chunk]:
    """Yields the chunks of every document: consecutive queries, with the keys that they see.

    Args:
        cu_q: Cumulative query lengths, N + 1 numbers.
        cu_k: Cumulative key lengths, N + 1 numbers.
        operands: Inputs of the attention, which decide the length of a chunk.
        device: Device of the chunks' tensors.
    """
    options = operands.options
    for document in range(len(cu_q) - 1):
        length_q = cu_q[document + 1] - cu_q[document]
        length_k = cu_k[document + 1] - cu_k[document]
        for start, stop in operands.runs(length_q, length_k):
            low, high = 0, length_k
            if options.window_left >= 0:
                low = min(length_k, max(0, start + length_k - length_q - options.window_left))
            if options.window_right >= 0:
                high = stop + length_k - length_q + options.window_right
                high = max(low, min(length_k, high))
            yield Chunk(
                document,
                torch.arange(start, stop, device=device),
                torch.arange(low, high, device=device),
                slice(cu_q[document] + start, cu_q[document] + stop),
                slice(cu_k[document] + low, cu_k[document] + high),
                length_q,
                length_k,
            )


class Operands:
    """Inputs of the attention of a pack; computes logits and gradients chunk by chunk.

    q [H, T, D], k [Hk, Tk, D] and v [Hk, Tk, Dv] are stored in the dtype of the arithmetic.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        options: VarlenOptions,
        alibi_slopes: Tensor | None = None,
        dropout_seed: Tensor | None = None,
        document_ids: Tensor | None = None,
        query_offsets: Tensor | None = None,
    ) -> None:
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        self.heads, self.heads_k = q.shape[1], k.shape[1]
        self.group = self.heads // self.heads_k
        self.q, self.k, self.v = (x.to(self.dtype).transpose(0, 1) for x in (q, k, v))
        self.options, self.alibi_slopes = options, alibi_slopes
        self.dropout_seed, self.document_ids = dropout_seed, document_ids
        self.query_offsets = query_offsets

    def runs(self, length_q: int, length_k: int) -> Iterator[tuple[int, int]]:
        """Yields the (start, stop) of consecutive queries that form one chunk.

        A chunk has at most about 4 million logits over all heads, which bounds the memory.

        Args:
            length_q: Number of queries of the document.
            length_k: Number of keys of the document.
        """
        step = max(1, _CHUNK_ELEMENTS // max(1, self.heads * length_k) // _ROW_GROUP) * _ROW_GROUP
        for start in range(0, length_q, step):
            yield start, min(start + step, length_q)

    def grouped(self, x: Tensor, chunk: Chunk) -> Tensor:
        """Returns the rows of x [H, T, D] of a chunk's M queries, as [Hk, group * M, D].

        A group is the query heads of one key/value head, so one batched product serves them all.
        """
        rows = x[:, chunk.query]
        return rows.reshape(self.heads_k, -1, rows.shape[-1])

    def logits(self, chunk: Chunk) -> tuple[Tensor, Tensor | None]:
        """Returns the masked logits [H, M, N] of a chunk of M queries and N keys.

        The second result is d(logit) / d(logit before the softcap); None without a softcap.
        """
        options = self.options
        scores = torch.matmul(self.grouped(self.q, chunk), self.k[:, chunk.key].transpose(1, 2))
        scores = scores.view(self.heads, len(chunk.rows), -1) * options.softmax_scale
        slope = None
        if options.softcap > 0:
            bounded = torch.tanh(scores / options.softcap)
            scores, slope = options.softcap * bounded, 1 - bounded * bounded
        if self.alibi_slopes is not None:
            slopes = self.alibi_slopes
            slopes = slopes[chunk.document] if slopes.dim() == 2 else slopes
            offset = chunk.length_k - chunk.length_q
            distance = (chunk.rows[:, None] + offset - chunk.columns[None, :]).abs()
            scores = scores - slopes.to(self.dtype)[:, None, None] * distance
        mask = visible_mask(
            chunk.length_q,
            chunk.length_k,
            options.window_left,
            options.window_right,
            rows=chunk.rows,
            columns=chunk.columns,
        )
        return scores.masked_fill(~mask, float("-inf")), slope

    def add_gradients(self, chunk: Chunk, ds: Tensor, dq: Tensor, dk: Tensor) -> None:
        """Adds a chunk's gradients to dk [Hk, Tk, D], and writes them to dq [H, T, D].

        Args:
            chunk: Queries and keys of the gradients.
            ds: Gradient of the chunk's logits before the softcap, [H, M, N].
            dq: Gradient of the queries, written for the chunk's queries.
            dk: Gradient of the keys, added to for the chunk's keys.
        """
        ds = (ds * self.options.softmax_scale).view(self.heads_k, -1, ds.shape[-1])
        rows = torch.matmul(ds, self.k[:, chunk.key])
        dq[:, chunk.query] = rows.view(self.heads, len(chunk.rows), -1)
        dk[:, chunk.key] += torch.matmul(ds.transpose(1, 2), self.grouped(self.q, chunk))

    def dropout(self, chunk: Chunk) -> Tensor | None:
        """Returns the dropout factor of each weight [H, M, N]: 0 or 1 / keep probability.

        Returns None without dropout.
        """
        if self.options.dropout_p == 0:
            return None
        assert self.dropout_seed is not None
        ids = self.document_ids
        document_id = chunk.document if ids is None else int(ids[chunk.document])
        offsets = self.query_offsets
        first_query = 0 if offsets is None else int(offsets[chunk.document])
        keep = dropout_keep(
            self.dropout_seed,
            document_id,
            torch.arange(self.heads, device=chunk.rows.device) + self.options.first_head,
            chunk.rows + first_query,
            chunk.columns,
            self.options.dropout_p,
        )
        return keep.to(self.dtype) * keep_scale(self.options.dropout_p)


def varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    options: VarlenOptions,
    *,
    alibi_slopes: Tensor | None = None,
    learnable_sink: Tensor | None = None,
    dropout_seed: Tensor | None = None,
    document_ids: Tensor | None = None,
    query_offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes the forward of attention over packed documents.

    Args:
        q: Packed queries [T, H, D], any floating dtype.
        k: Packed keys [Tk, Hk, D].
        v: Packed values [Tk, Hk, Dv].
        cu_seqlens_q: Cumulative query lengths, [N + 1] int32.
        cu_seqlens_k: Cumulative key lengths, [N + 1] int32.
        options: Scale, window, softcap and dropout.
        alibi_slopes: ALiBi slopes, [H] or [N, H].
        learnable_sink: Logit of the attention sink of each head, [H], or None.
        dropout_seed: Seed of the dropout mask, one int64 element; required with dropout.
        document_ids: Ids of the documents for the dropout RNG, [N] int32. By default, a document's
            index in the pack.
        query_offsets: Position within its document of the first query that is passed, [N] int32,
            for the dropout mask; 0 by default.

    Returns:
        out [T, H, Dv] in q's dtype, lse [H, T] float32 (float64 for float64 inputs), natural
        logarithm.
    """
    operands = Operands(q, k, v, options, alibi_slopes, dropout_seed, document_ids, query_offsets)
    return attend(operands, cu_seqlens_q, cu_seqlens_k, q.dtype, learnable_sink)


def varlen_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    options: VarlenOptions,
    *,
    alibi_slopes: Tensor | None = None,
    dropout_seed: Tensor | None = None,
    document_ids: Tensor | None = None,
    query_offsets: Tensor | None = None,
    into: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes the backward of varlen_forward.

    dout [T, H, Dv] and dlse [H, T] (or None) are the gradients of the results, and lse [H, T] is
    the forward's result. `into` are the tensors to which dq, dk and dv are written, which may be q,
    k and v; None makes new ones. The other arguments are those of varlen_forward.

    Returns:
        dq [T, H, D], dk [Tk, Hk, D], dv [Tk, Hk, Dv] in the inputs' dtype, and delta [H, T], which
        is rowsum(dout * out) - dlse.
    """
    operands = Operands(q, k, v, options, alibi_slopes, dropout_seed, document_ids, query_offsets)
    return attend_backward(operands, dout, dlse, lse, cu_seqlens_q, cu_seqlens_k, q.dtype, into)


def attend(
    x: Operands,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    dtype: torch.dtype,
    learnable_sink: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes the softmax over the logits of `x`, and its product with the values.

    Args:
        x: Inputs of the attention, whose `logits` method defines the attention.
        cu_seqlens_q: Cumulative query lengths, [N + 1] int32.
        cu_seqlens_k: Cumulative key lengths, [N + 1] int32.
        dtype: Dtype of out.
        learnable_sink: Logit of the attention sink of each head, [H], or None.

    Returns:
        out [T, H, Dv] in `dtype`, and lse [H, T] in the dtype of the arithmetic.
    """
    tokens, device = x.q.shape[1], x.q.device
    out = torch.zeros((tokens, x.heads, x.v.shape[-1]), dtype=dtype, device=device)
    lse = torch.full((x.heads, tokens), float("-inf"), dtype=x.dtype, device=device)
    for chunk in _visit(cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), x, device):
        logits, _ = x.logits(chunk)
        if learnable_sink is not None:
            sink = learnable_sink.to(x.dtype)[:, None, None].expand(-1, len(chunk.rows), 1)
            logits_and_sink = torch.cat([logits, sink], dim=-1)
        else:
            logits_and_sink = logits
        if logits_and_sink.shape[-1] == 0:
            continue
        chunk_lse = torch.logsumexp(logits_and_sink, dim=-1)
        lse[:, chunk.query] = chunk_lse
        if logits.shape[-1] == 0:
            continue
        weights = _weights(logits, chunk_lse)
        multiplier = x.dropout(chunk)
        if multiplier is not None:
            weights = weights * multiplier
        rows = torch.matmul(weights.view(x.heads_k, -1, weights.shape[-1]), x.v[:, chunk.key]).view(
            x.heads, len(chunk.rows), -1
        )
        out[chunk.query] = rows.transpose(0, 1).to(dtype)
    return out, lse


def attend_backward(
    x: Operands,
    dout: Tensor,
    dlse: Tensor | None,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    dtype: torch.dtype,
    into: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes the backward of `attend`.

    Args:
        x: Inputs of the attention.
        dout: Gradient of out, [T, H, Dv].
        dlse: Gradient of lse, [H, T], or None.
        lse: Log-sum-exp of the forward, [H, T].
        cu_seqlens_q: Cumulative query lengths, [N + 1] int32.
        cu_seqlens_k: Cumulative key lengths, [N + 1] int32.
        dtype: Dtype of dq, dk and dv.
        into: Tensors to which dq, dk and dv are written, which may be the operands; None makes new
            ones.

    Returns:
        dq [T, H, D], dk [Tk, Hk, D] and dv [Tk, Hk, Dv] in `dtype`, and delta [H, T] in the dtype
        of lse.
    """
    grad_out = dout.to(x.dtype).transpose(0, 1)
    delta = torch.zeros_like(lse) if dlse is None else -dlse
    dq, dk, dv = torch.zeros_like(x.q), torch.zeros_like(x.k), torch.zeros_like(x.v)
    for chunk in _visit(cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), x, x.q.device):
        if len(chunk.columns) == 0:
            continue
        logits, slope = x.logits(chunk)
        p = _weights(logits, lse[:, chunk.query])
        multiplier = x.dropout(chunk)
        dropped = p if multiplier is None else p * multiplier
        do = x.grouped(grad_out, chunk)
        dv[:, chunk.key] += torch.matmul(
            dropped.view(x.heads_k, -1, p.shape[-1]).transpose(1, 2), do
        )
        dp = torch.matmul(do, x.v[:, chunk.key].transpose(1, 2)).view_as(p)
        if multiplier is not None:
            dp = dp * multiplier
        # rowsum(dout * out) is computed from the weights, which is exact if one weight is 1.
        delta[:, chunk.query] += (p * dp).sum(-1)
        ds = p * (dp - delta[:, chunk.query, None])
        x.add_gradients(chunk, ds if slope is None else ds * slope, dq, dk)
    rows = [grad.transpose(0, 1) for grad in (dq, dk, dv)]
    if into is None:
        into = [grad.to(dtype).contiguous() for grad in rows]
    else:
        for target, grad in zip(into, rows, strict=True):
            target.copy_(grad)
    dq, dk, dv = into
    return dq, dk, dv, delta


def _weights(logits: Tensor, lse: Tensor) -> Tensor:
    """Returns the weights exp(logits - lse) [H, M, N]; 0 for queries that see no key (lse = -inf).

    They are computed as softmax(logits) times exp(logsumexp(logits) - lse), because the rounding
    of a large lse would be an error of every weight. The second factor is 1 without a sink.

    Args:
        logits: Masked logits, [H, M, N].
        lse: Log-sum-exp of each row, [H, M].
    """
    own = torch.logsumexp(logits, dim=-1)
    blind = own == float("-inf")
    share = torch.exp(own - lse.masked_fill(blind, 0.0))
    return torch.softmax(logits.masked_fill(blind[..., None], 0.0), dim=-1) * share[..., None]
