"""Argument checks of flash_attn_varlen_func with block_table or seqused_k."""

from __future__ import annotations

import torch
from torch import Tensor

from lctrain_kernels.checks import check_floating, reads_values
from lctrain_kernels.decode.checks import check_int32, check_page, check_values
from lctrain_kernels.decode.structures import KVCache


def check_pages(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises unless k and v are [pages, page, Hk, D] with a last stride of 1."""
    check_floating("q", q)
    for name, pages in (("k", k), ("v", v)):
        check_floating(name, pages)
        if pages.dim() != 4:
            raise ValueError(
                f"{name} must be [pages, page, heads, head_dim] with a block_table, got "
                f"{tuple(pages.shape)}. Pass the whole pool of pages."
            )
        if pages.shape[-1] > 1 and pages.stride(-1) != 1:
            raise ValueError(
                f"{name} must have a last stride of 1, got strides {pages.stride()}. Lay the pool "
                "out as [pages, page, heads, D]."
            )
        check_page(name, pages.shape[1])


def check_used(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    block_table: Tensor | None,
    seqused_k: Tensor | None,
) -> None:
    """Raises unless numbers of queries, numbers of keys and pages of packed documents fit.

    Args:
        q: Packed queries [T, H, D].
        k: Keys [Tk, Hk, D], or [pages, page, Hk, D].
        cu_seqlens_q: Cumulative numbers of queries, [N + 1] int32.
        cu_seqlens_k: Cumulative numbers of keys, [N + 1] int32, or None.
        max_seqlen_q: Largest number of queries of a document.
        max_seqlen_k: Largest number of keys of a document.
        block_table: Pages of each document, [N, pages per document] int32, or None.
        seqused_k: Number of keys of each document that are used, [N] int32, or None.
    """
    documents, device = cu_seqlens_q.shape[0] - 1, cu_seqlens_q.device
    if cu_seqlens_k is None and (block_table is None or seqused_k is None):
        raise ValueError(
            "cu_seqlens_k must be given unless both block_table and seqused_k are, got None. Pass "
            "the cumulative numbers of keys."
        )
    if cu_seqlens_k is not None and cu_seqlens_k.shape != cu_seqlens_q.shape:
        raise ValueError(
            f"cu_seqlens_q and cu_seqlens_k must describe the same documents, got {documents} and "
            f"{cu_seqlens_k.shape[0] - 1}. Pass both of one batch."
        )
    for name, tensor, shape in (
        ("block_table", block_table, "[{}, pages per document]"),
        ("seqused_k", seqused_k, "[{}]"),
    ):
        if tensor is not None:
            check_int32(name, tensor, device)
            if tensor.dim() != shape.count(",") + 1 or tensor.shape[0] != documents:
                raise ValueError(
                    f"{name} must have shape {shape.format(documents)}, got {tuple(tensor.shape)}. "
                    "Pass one row per document."
                )
    total = q.shape[0]
    if total > max_seqlen_q * documents:
        raise ValueError(
            f"max_seqlen_q must be at least {-(-total // max(documents, 1))} for {total} queries "
            f"of {documents} documents, got {max_seqlen_q}. The kernels start no program for more."
        )
    if not reads_values(device):
        return
    most = None if cu_seqlens_k is None else cu_seqlens_k.diff()
    if block_table is not None:
        capacity = torch.full_like(cu_seqlens_q[1:], block_table.shape[1] * k.shape[1])
        if most is not None and seqused_k is None:
            seqused_k = most
        most = capacity if most is None else torch.minimum(most, capacity)
    used = most if seqused_k is None else seqused_k
    assert used is not None
    assert most is not None
    for document, (length, limit) in enumerate(zip(used.tolist(), most.tolist(), strict=True)):
        if not 0 <= length <= limit:
            raise ValueError(
                f"seqused_k[{document}] must be from 0 to {limit}, the keys that the document has, "
                f"got {length}. Pass the number of keys to use."
            )
    longest = (
        ("max_seqlen_q", max_seqlen_q, cu_seqlens_q.diff()),
        ("max_seqlen_k", max_seqlen_k, used),
    )
    for name, given, lengths in longest:
        if len(lengths) and given < int(lengths.max()):
            raise ValueError(
                f"{name} must be at least {int(lengths.max())}, the longest document's, got "
                f"{given}. The kernels start no program for more."
            )
    if block_table is not None:
        check_values(KVCache(k, k, used, block_table=block_table), 0, None)
