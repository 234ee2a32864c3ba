"""Dense attention of one document in plain PyTorch, the reference of the tests."""

import torch
from torch import Tensor

from lctrain_kernels.reference.philox import dropout_keep, keep_scale


def visible_mask(
    length_q: int,
    length_k: int,
    window_left: int,
    window_right: int,
    device: torch.device | str | None = None,
    rows: Tensor | None = None,
    columns: Tensor | None = None,
) -> Tensor:
    """Returns a mask [M, N] bool, True where query i sees key j.

    M is len(rows) if rows are given, else length_q; N is len(columns), else length_k. The mask is
    aligned at the bottom right, as in FlashAttention-2: the last query sees the last key.

    Args:
        length_q: Number of queries of the document.
        length_k: Number of keys of the document.
        window_left: Keys visible to the left of the aligned position; negative is unbounded.
        window_right: Keys visible to the right; negative is unbounded, 0 is causal.
        device: Device of the result if rows and columns are not given.
        rows: Query positions, [M] int64; all queries by default.
        columns: Key positions, [N] int64; all keys by default.
    """
    rows = torch.arange(length_q, device=device) if rows is None else rows
    columns = torch.arange(length_k, device=device) if columns is None else columns
    distance = columns[None, :] - (rows[:, None] + length_k - length_q)
    mask = torch.ones_like(distance, dtype=torch.bool)
    if window_left >= 0:
        mask &= distance >= -window_left
    if window_right >= 0:
        mask &= distance <= window_right
    return mask


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float | None = None,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    learnable_sink: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor = 0,
    document_id: int = 0,
    first_query: int = 0,
    first_head: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the attention of one document by one dense softmax; autograd gives all gradients.

    Products run in the dtype of q, the softmax in at least float32. So bf16 inputs give the result
    of plain PyTorch, and float64 inputs give the reference of the tests.

    Args:
        q: Queries [Lq, H, D].
        k: Keys [Lk, Hk, D]; query head h reads key/value head h // (H / Hk).
        v: Values [Lk, Hk, Dv].
        softmax_scale: Factor of q.k; D^-0.5 by default.
        window: (left, right) as in visible_mask; causal is (-1, 0).
        softcap: A softcap c > 0 replaces a logit x by c tanh(x / c); 0 turns it off.
        alibi_slopes: ALiBi slopes [H]; -slope * |i + Lk - Lq - j| is added to a logit.
        learnable_sink: Logits [H] that take part in the softmax of each head and have no value.
        dropout_p: Probability of dropping a weight after the softmax.
        dropout_seed: Seed of the dropout mask.
        document_id: Id of the document for the dropout RNG.
        first_query: Position within the document of the first row of queries, for the dropout mask.
        first_head: Index of the first query head for the dropout RNG.

    Returns:
        out [Lq, H, Dv] in q's dtype, lse [H, Lq], and the weights [H, Lq, Lk], which are negative
        where dropout dropped them.
    """
    length_q, heads, head_dim = q.shape
    length_k, heads_k, _ = k.shape
    state_dtype = torch.promote_types(q.dtype, torch.float32)
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    k = k.repeat_interleave(heads // heads_k, dim=1)
    v = v.repeat_interleave(heads // heads_k, dim=1)
    logits = torch.einsum("ihd,jhd->hij", q, k).to(state_dtype) * scale
    if softcap > 0:
        logits = softcap * torch.tanh(logits / softcap)
    rows = torch.arange(length_q, device=q.device)
    columns = torch.arange(length_k, device=q.device)
    if alibi_slopes is not None:
        distance = (rows[:, None] + length_k - length_q - columns[None, :]).abs()
        logits = logits - alibi_slopes.to(state_dtype)[:, None, None] * distance
    mask = visible_mask(length_q, length_k, *window, rows=rows, columns=columns)
    logits = logits.masked_fill(~mask, float("-inf"))
    if learnable_sink is not None:
        sink = learnable_sink.to(state_dtype)[:, None, None].expand(heads, length_q, 1)
        logits = torch.cat([logits, sink], dim=-1)
    if logits.shape[-1] == 0:
        lse = logits.new_full((heads, length_q), float("-inf"))
        return q.new_zeros(length_q, heads, v.shape[-1]), lse, logits
    blind = (logits == float("-inf")).all(-1, keepdim=True)
    lse = torch.logsumexp(logits.masked_fill(blind, 0.0), dim=-1)
    lse = lse.masked_fill(blind[..., 0], float("-inf"))
    weights = torch.softmax(logits.masked_fill(blind, 0.0), dim=-1).masked_fill(blind, 0.0)
    weights = weights[..., :length_k]
    signed = weights
    if dropout_p > 0:
        key_rows = rows + first_query
        head_index = torch.arange(heads, device=q.device) + first_head
        keep = dropout_keep(dropout_seed, document_id, head_index, key_rows, columns, dropout_p)
        signed = torch.where(keep, weights, -weights)
        weights = torch.where(keep, weights * keep_scale(dropout_p), 0.0)
    out = torch.einsum("hij,jhd->ihd", weights.to(v.dtype), v)
    return out, lse, signed
