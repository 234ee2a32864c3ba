"""Dual chunk attention in plain PyTorch: the reference of the tests, and the CPU path.

The method is that of ChunkLlama, "Training-Free Long-Context Scaling of Large Language Models"
(arXiv 2402.17463), with one softmax instead of three merged ones, so that gradients are exact. With
S = chunk_size, L = local_size, c = S - L and r(x) = x mod c, the relative position of query i and
key j <= i is

    same chunk of c tokens     r(i) - r(j)
    the chunk before           min(r(i) + c, S) - r(j)
    any chunk before that      min(2c - 1, S) - r(j)

q and k are passed rotated at r(position), in Llama's half-split layout (columns d and d + D/2 are a
pair). For keys of earlier chunks the query is rotated further, by the difference of the positions.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lctrain_kernels.reference.philox import dropout_keep, keep_scale
from lctrain_kernels.varlen.reference import (
    Chunk,
    Operands,
    VarlenOptions,
    attend,
    attend_backward,
)


@dataclass(frozen=True)
class DualChunkGeometry:
    """Sizes of the chunks of dual chunk attention, and the query positions that follow from them.

    Attributes:
        chunk_size: Largest relative position S.
        local_size: Distance L, 0 <= L < S, up to which positions stay exact across a boundary.
    """

    chunk_size: int
    local_size: int

    @property
    def length(self) -> int:
        """Number of tokens c of a chunk."""
        return self.chunk_size - self.local_size

    @property
    def succ_length(self) -> int:
        """Number of a chunk's first queries that have SUCC keys: the keys of the chunk before.

        For these keys, RoPE sees such a query at position r(i) + c. Later queries of the chunk are
        at `inter_position` for the keys of all earlier chunks.
        """
        return min(self.local_size, self.length)

    @property
    def inter_position(self) -> int:
        """Position at which RoPE sees every query for its INTER keys, min(2c - 1, S)."""
        return min(2 * self.length - 1, self.chunk_size)


def rotate(x: Tensor, delta: Tensor, inv_freq: Tensor) -> Tensor:
    """Applies RoPE to x [..., M, D] by the angles delta [M] * inv_freq [D/2], in x's dtype.

    delta is in positions, inv_freq in radians per position. Columns d and d + D/2 are a pair.
    """
    angles = delta.to(x.dtype)[:, None] * inv_freq.to(x.dtype)
    cos, sin = angles.cos(), angles.sin()
    low, high = x.chunk(2, dim=-1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)


def dense_dual_chunk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    inv_freq: Tensor,
    chunk_size: int,
    local_size: int,
    logit_scale: float = 1.0,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor = 0,
    document_id: int = 0,
    first_query: int = 0,
    first_head: int = 0,
) -> tuple[Tensor, Tensor]:
    """Computes dual chunk attention of one document by one dense softmax; gradients by autograd.

    Products run in the dtype of q, rotations and the softmax in at least float32. So bf16 inputs
    give the result of plain PyTorch, and float64 inputs give the reference of the tests.

    Args:
        q: Queries [Lq, H, D], rotated at r(position); query i has position i + Lk - Lq.
        k: Keys [Lk, Hk, D], rotated at r(position); query head h reads head h // (H / Hk).
        v: Values [Lk, Hk, D].
        inv_freq: RoPE frequencies [D/2], in radians per position.
        chunk_size: Largest relative position S.
        local_size: Distance L up to which positions stay exact across a chunk boundary.
        logit_scale: Factor of every logit.
        softmax_scale: Factor of q.k; D^-0.5 by default.
        dropout_p: Probability of dropping a weight after the softmax.
        dropout_seed: Seed of the dropout mask.
        document_id: Id of the document for the dropout RNG.
        first_query: Position within the document of the first row of queries, for the dropout mask.
        first_head: Index of the first query head for the dropout RNG.

    Returns:
        out [Lq, H, D] in q's dtype and lse [H, Lq].
    """
    length_q, heads, head_dim = q.shape
    length_k, heads_k, _ = k.shape
    geometry = DualChunkGeometry(chunk_size, local_size)
    state = torch.promote_types(q.dtype, torch.float32)
    scale = (head_dim**-0.5 if softmax_scale is None else softmax_scale) * logit_scale
    rows = torch.arange(length_q, device=q.device)
    columns = torch.arange(length_k, device=q.device)
    position = rows + length_k - length_q
    place = position % geometry.length
    deltas = (
        torch.zeros_like(place),
        torch.where(place < geometry.succ_length, geometry.length, geometry.inter_position - place),
        geometry.inter_position - place,
    )
    k = k.repeat_interleave(heads // heads_k, dim=1)
    v = v.repeat_interleave(heads // heads_k, dim=1)
    heads_first = q.transpose(0, 1).to(state)
    variants = [
        torch.einsum("hid,jhd->hij", rotate(heads_first, delta, inv_freq).to(q.dtype), k)
        for delta in deltas
    ]
    distance = (position // geometry.length)[:, None] - (columns // geometry.length)[None, :]
    logits = torch.where(distance == 1, variants[1], variants[2])
    logits = torch.where(distance == 0, variants[0], logits).to(state) * scale
    hidden = columns[None, :] > position[:, None]
    logits = logits.masked_fill(hidden, float("-inf"))
    if length_k == 0:
        lse = logits.new_full((heads, length_q), float("-inf"))
        return q.new_zeros(length_q, heads, v.shape[-1]), lse
    blind = hidden.all(-1)[None, :, None]
    lse = torch.logsumexp(logits.masked_fill(blind, 0.0), dim=-1)
    lse = lse.masked_fill(blind[..., 0], float("-inf"))
    weights = torch.softmax(logits.masked_fill(blind, 0.0), dim=-1).masked_fill(blind, 0.0)
    if dropout_p > 0:
        key_rows = rows + first_query
        head_index = torch.arange(heads, device=q.device) + first_head
        keep = dropout_keep(dropout_seed, document_id, head_index, key_rows, columns, dropout_p)
        weights = torch.where(keep, weights * keep_scale(dropout_p), 0.0)
    return torch.einsum("hij,jhd->ihd", weights.to(v.dtype), v), lse


class DualChunkOperands(Operands):
    """Inputs of dual chunk attention of a pack; computes logits and gradients chunk by chunk.

    The class is used like varlen.reference.Operands. Queries of one Chunk are in one chunk of the
    attention, too, and have up to three ranges of keys, each with a rotation of its own.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        options: VarlenOptions,
        geometry: DualChunkGeometry,
        inv_freq: Tensor,
        logit_scale: Tensor | None,
        dropout_seed: Tensor | None,
        document_ids: Tensor | None,
        query_offsets: Tensor | None,
    ) -> None:
        super().__init__(q, k, v, options, None, dropout_seed, document_ids, query_offsets)
        self.geometry = geometry
        self.inv_freq = inv_freq.to(self.dtype)
        self.logit_scale = logit_scale

    def runs(self, length_q: int, length_k: int) -> Iterator[tuple[int, int]]:
        """Yields the (start, stop) of queries that are computed together, all in one chunk."""
        shift = length_k - length_q
        for start, stop in super().runs(length_q, length_k):
            while start < stop:
                chunk = max(0, start + shift) // self.geometry.length
                end = min(stop, (chunk + 1) * self.geometry.length - shift)
                yield start, end
                start = end

    def logits(self, chunk: Chunk) -> tuple[Tensor, None]:
        """Returns the masked logits [H, M, N] of a chunk of M queries and N keys, and None.

        None stands for the derivative of a softcap, which this attention does not have.
        """
        parts = [
            torch.matmul(self._rotated(chunk, delta), self.k[:, keys].transpose(1, 2))
            for keys, delta in self._ranges(chunk)
        ]
        rows = len(chunk.rows)
        scores = torch.cat([part.view(self.heads, rows, part.shape[-1]) for part in parts], dim=-1)
        position = chunk.rows + chunk.length_k - chunk.length_q
        hidden = chunk.columns[None, :] > position[:, None]
        return (scores * self._scale(chunk)).masked_fill(hidden, float("-inf")), None

    def add_gradients(self, chunk: Chunk, ds: Tensor, dq: Tensor, dk: Tensor) -> None:
        """Adds a chunk's gradients to dq [H, T, D] and dk [Hk, Tk, D].

        ds [H, M, N] is the gradient of the chunk's logits.
        """
        ranges = list(self._ranges(chunk))
        ds = ds * self._scale(chunk)
        parts = ds.split([keys.stop - keys.start for keys, _ in ranges], dim=-1)
        for part, (keys, delta) in zip(parts, ranges, strict=True):
            part = part.reshape(self.heads_k, -1, part.shape[-1])
            rows = torch.matmul(part, self.k[:, keys]).view(self.heads, len(delta), -1)
            dq[:, chunk.query] += rotate(rows, -delta, self.inv_freq)
            dk[:, keys] += torch.matmul(part.transpose(1, 2), self._rotated(chunk, delta))

    def _rotated(self, chunk: Chunk, delta: Tensor) -> Tensor:
        """Returns the chunk's M queries rotated by delta [M] positions, as [Hk, group * M, D]."""
        rows = rotate(self.q[:, chunk.query], delta, self.inv_freq)
        return rows.reshape(self.heads_k, -1, rows.shape[-1])

    def _scale(self, chunk: Chunk) -> Tensor | float:
        scale = self.options.softmax_scale
        if self.logit_scale is None:
            return scale
        return scale * self.logit_scale[chunk.document].to(self.dtype)

    def _ranges(self, chunk: Chunk) -> Iterator[tuple[slice, Tensor]]:
        """Yields, for each range of keys, its slice of the keys and the rotation of the queries.

        The rotation is [M], in positions. The ranges are INTER (the chunks before the preceding
        one), SUCC (the preceding chunk) and INTRA (the queries' own chunk).
        """
        c, far = self.geometry.length, self.geometry.inter_position
        position = chunk.rows + chunk.length_k - chunk.length_q
        index = max(0, int(position[0])) // c
        place = position - index * c
        own, preceding = index * c, max(0, index - 1) * c
        succ = torch.where(place < self.geometry.succ_length, c, far - place)
        begin, stop = chunk.key.start, chunk.key.stop
        if preceding > 0:
            yield slice(begin, begin + preceding), far - place
        if own > preceding:
            yield slice(begin + preceding, begin + own), succ
        yield slice(begin + own, stop), torch.zeros_like(place)


def dual_chunk_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    options: VarlenOptions,
    geometry: DualChunkGeometry,
    *,
    inv_freq: Tensor,
    logit_scale: Tensor | None = None,
    dropout_seed: Tensor | None = None,
    document_ids: Tensor | None = None,
    query_offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes the forward of dual chunk attention over packed documents.

    Args:
        q: Packed queries [T, H, D], rotated by RoPE at r(position), any floating dtype.
        k: Packed keys [Tk, Hk, D], rotated by RoPE at r(position).
        v: Packed values [Tk, Hk, D].
        cu_seqlens_q: Cumulative query lengths, [N + 1] int32.
        cu_seqlens_k: Cumulative key lengths, [N + 1] int32.
        options: Scale and dropout; window_right must be 0.
        geometry: Sizes of the chunks.
        inv_freq: RoPE frequencies [D/2], in radians per position.
        logit_scale: Factor of the logits of each document, [N].
        dropout_seed: Seed of the dropout mask, one int64 element; required with dropout.
        document_ids: Ids of the documents for the dropout RNG, [N] int32. By default, a document's
            index in the pack.
        query_offsets: Position within its document of the first query that is passed, [N] int32,
            for the dropout mask; 0 by default.

    Returns:
        out [T, H, D] in q's dtype, lse [H, T] float32 (float64 for float64 inputs), natural
        logarithm.
    """
    operands = DualChunkOperands(
        *(q, k, v, options, geometry, inv_freq, logit_scale),
        *(dropout_seed, document_ids, query_offsets),
    )
    return attend(operands, cu_seqlens_q, cu_seqlens_k, q.dtype)


def dual_chunk_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    options: VarlenOptions,
    geometry: DualChunkGeometry,
    *,
    inv_freq: Tensor,
    logit_scale: Tensor | None = None,
    dropout_seed: Tensor | None = None,
    document_ids: Tensor | None = None,
    query_offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the backward of dual_chunk_forward.

    dout [T, H, D] and dlse [H, T] (or None) are the gradients of the results, and lse [H, T] is the
    forward's result. The other arguments are those of dual_chunk_forward.

    Returns:
        dq [T, H, D], dk and dv [Tk, Hk, D] in the inputs' dtype.
    """
    operands = DualChunkOperands(
        *(q, k, v, options, geometry, inv_freq, logit_scale),
        *(dropout_seed, document_ids, query_offsets),
    )
    return attend_backward(operands, dout, dlse, lse, cu_seqlens_q, cu_seqlens_k, q.dtype)[:3]
