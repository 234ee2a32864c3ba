"""Dual chunk attention as published: three attentions per chunk, merged by their log-sum-exps.

ChunkLlama (arXiv 2402.17463) and later systems call FlashAttention three times for a query: for the
keys of its own chunk, of the chunk before and of all earlier chunks. Weights from the log-sum-exps
merge the three results. The output is that of one softmax. The gradient is not exact, because the
weights are detached; FlashAttention has no gradient for its log-sum-exp.

The benchmark times this formulation, and a recipe trains with it to show the difference. The tests
do not use it as a reference.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor

from lctrain_kernels import flash_attn_varlen_func
from lctrain_kernels.dual_chunk.reference import DualChunkGeometry, rotate

# (q, k, v, cu_seqlens_q, cu_seqlens_k, longest_q, longest_k, causal, scale) -> out, lse [H, T]
Attend = Callable[..., tuple[Tensor, Tensor]]


def attend_with_lctrain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    longest_q: int,
    longest_k: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Computes one of the three attentions with lctrain's kernels.

    Args:
        q: Packed queries [T, H, D].
        k: Packed keys [Tk, Hk, D].
        v: Packed values [Tk, Hk, D].
        cu_q: Cumulative query lengths, [N + 1] int32.
        cu_k: Cumulative key lengths, [N + 1] int32.
        longest_q: Longest query length.
        longest_k: Longest key length.
        causal: Whether the attention is causal.
        scale: Factor of q.k.

    Returns:
        out [T, H, D] and lse [H, T] float32.
    """
    result = flash_attn_varlen_func(
        q,
        k,
        v,
        cu_q,
        cu_k,
        longest_q,
        longest_k,
        softmax_scale=scale,
        causal=causal,
        return_lse=True,
    )
    return result[0], result[1]


def attend_with_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    longest_q: int,
    longest_k: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Computes one of the three attentions with the FlashAttention-2 that PyTorch contains.

    Arguments and results are those of attend_with_lctrain.
    """
    result = torch.ops.aten._flash_attention_forward(
        q, k, v, cu_q, cu_k, longest_q, longest_k, 0.0, causal, False, scale=scale
    )
    return result[0], result[1]


def attend_with_flash_attention_4(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    longest_q: int,
    longest_k: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Computes one of the three attentions with FlashAttention-4 (CuTe DSL).

    Arguments and results are those of attend_with_lctrain.
    """
    from flash_attn.cute import flash_attn_varlen_func as flash_attention

    result = flash_attention(
        q,
        k,
        v,
        cu_seqlens_q=cu_q,
        cu_seqlens_k=cu_k,
        max_seqlen_q=longest_q,
        max_seqlen_k=longest_k,
        softmax_scale=scale,
        causal=causal,
        return_lse=True,
    )
    return result[0], result[1]


def published_dual_chunk_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    inv_freq: Tensor,
    chunk_size: int,
    local_size: int,
    softmax_scale: float | None = None,
    attend: Attend = attend_with_lctrain,
    call_per_chunk: bool = False,
) -> Tensor:
    """Computes the published dual chunk attention over packed documents.

    The function reads the lengths of the documents, so it synchronises with a GPU.

    Args:
        q: Packed queries [T, H, D], rotated at r(position) as in dual_chunk_attn_varlen_func.
        k: Packed keys [T, Hk, D], rotated at r(position).
        v: Packed values [T, Hk, D].
        cu_seqlens: Cumulative document lengths, [N + 1] int32.
        max_seqlen: Longest document; not used, part of dual_chunk_attn_varlen_func's signature.
        inv_freq: RoPE frequencies [D/2] float32, in radians per position.
        chunk_size: Largest relative position S.
        local_size: Distance L up to which positions stay exact across a chunk boundary.
        softmax_scale: Factor of q.k; D^-0.5 by default.
        attend: Function that computes one of the three attentions.
        call_per_chunk: Whether to call it three times per chunk, as published. Otherwise it is
            called three times in total, with copies of keys that several chunks share.

    Returns:
        out [T, H, D], with the inexact gradients of the published code.
    """
    geometry = DualChunkGeometry(chunk_size, local_size)
    scale = q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale
    if q.shape[0] == 0:
        return q + (k.sum() + v.sum())  # without tokens; of all three, for autograd
    bounds = cu_seqlens.tolist()
    if call_per_chunk:
        return _per_chunk(q, k, v, bounds, geometry, inv_freq, attend, scale)
    chunks = list(_chunks(bounds, geometry.length))
    place = torch.cat([torch.arange(end - own, device=q.device) for _, _, own, end in chunks])
    outs, lses = [], []
    for way in range(3):
        rows, keys, lengths_q, lengths_k = [], [], [], []
        for begin, before, own, end in chunks:
            first, last = ((own, end), (before, own), (begin, before))[way]
            if first < last:
                rows.append(torch.arange(own, end, device=q.device))
                keys.append(torch.arange(first, last, device=q.device))
                lengths_q.append(end - own)
                lengths_k.append(last - first)
        if not rows:
            continue
        row, key = torch.cat(rows), torch.cat(keys)
        out, lse = attend(
            _turned(q[row], place[row], way, geometry, inv_freq),
            k[key],
            v[key],
            _cumulative(lengths_q, q.device),
            _cumulative(lengths_k, q.device),
            max(lengths_q),
            max(lengths_k),
            way == 0,
            scale,
        )
        outs.append(torch.zeros_like(q).index_copy(0, row, out))
        blind = lse.new_full((q.shape[1], q.shape[0]), float("-inf"))
        lses.append(blind.index_copy(1, row, lse.detach()))
    return _merge(outs, lses)


def _per_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: list[int],
    geometry: DualChunkGeometry,
    inv_freq: Tensor,
    attend: Attend,
    scale: float,
) -> Tensor:
    merged = []
    place = torch.arange(geometry.length, device=q.device)
    for begin, before, own, end in _chunks(bounds, geometry.length):
        outs, lses = [], []
        for way, (first, last) in enumerate(((own, end), (before, own), (begin, before))):
            if first < last:
                out, lse = attend(
                    _turned(q[own:end], place[: end - own], way, geometry, inv_freq),
                    k[first:last],
                    v[first:last],
                    _cumulative([end - own], q.device),
                    _cumulative([last - first], q.device),
                    end - own,
                    last - first,
                    way == 0,
                    scale,
                )
                outs.append(out)
                lses.append(lse.detach())
        merged.append(_merge(outs, lses))
    return torch.cat(merged)


def _chunks(bounds: list[int], length: int) -> Iterator[tuple[int, int, int, int]]:
    """Yields, for every chunk, four token indices in the pack.

    They are the first token of the document, of the chunk before and of the chunk, and the index
    after the chunk's last token.

    Args:
        bounds: Cumulative document lengths.
        length: Number of tokens of a chunk.
    """
    for begin, stop in pairwise(bounds):
        for own in range(begin, stop, length):
            yield begin, max(begin, own - length), own, min(own + length, stop)


def _turned(
    q: Tensor, place: Tensor, way: int, geometry: DualChunkGeometry, inv_freq: Tensor
) -> Tensor:
    """Returns queries [M, H, D] rotated by RoPE for one of the three ranges of keys.

    Args:
        q: Queries [M, H, D], rotated at their position in their chunk.
        place: Position of each query in its chunk, [M].
        way: Range of keys: 0 for the query's own chunk, 1 for the chunk before, 2 for all earlier
            ones.
        geometry: Sizes of the chunks.
        inv_freq: RoPE frequencies [D/2] float32, in radians per position.
    """
    if way == 0:
        return q
    far = geometry.inter_position - place
    near = torch.full_like(place, geometry.length)
    delta = torch.where(place < geometry.succ_length, near, far) if way == 1 else far
    state = torch.promote_types(q.dtype, torch.float32)
    turned = rotate(q.transpose(0, 1).to(state), delta, inv_freq)
    return turned.transpose(0, 1).to(q.dtype)


def _merge(outs: list[Tensor], lses: list[Tensor]) -> Tensor:
    """Merges three outputs [T, H, D] by weights from their log-sum-exps [H, T], as published.

    The weights are detached, so they get no gradient.
    """
    if len(outs) == 1:
        return outs[0]
    shares = torch.softmax(torch.stack(lses), dim=0).to(outs[0].dtype)  # [ways, H, T]
    total = outs[0] * shares[0].T[..., None]
    for share, out in zip(shares[1:], outs[1:], strict=True):
        total = total + out * share.T[..., None]
    return total


def _cumulative(lengths: list[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
