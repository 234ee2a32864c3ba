"""Trains with the published formulation of dual chunk attention, whose gradient is not exact."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from lctrain import kernels

# Arguments of dropout, of speed, and of keys with documents of their own.
_WITHOUT_EFFECT = ("dropout_seed", "document_ids", "schedule", "max_seqlen_k")


@contextmanager
def published_gradient() -> Iterator[None]:
    """Makes `attention=dual_chunk` compute the published formulation inside the context.

    Its output is that of lctrain's attention, but its gradient is not: see
    `lctrain_kernels.bench.published_dual_chunk`. An option that the formulation does not support
    raises a ValueError.
    """
    exact = kernels.dual_chunk_attn_varlen_func
    kernels.dual_chunk_attn_varlen_func = _published
    try:
        yield
    finally:
        kernels.dual_chunk_attn_varlen_func = exact


def _published(
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
    cu_seqlens_k: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Replaces the public function; ignores arguments that cannot change the result here."""
    from lctrain_kernels.bench.published_dual_chunk import published_dual_chunk_attn

    same = cu_seqlens_k is None or cu_seqlens_k is cu_seqlens or cu_seqlens_k.equal(cu_seqlens)
    wanted = {
        "dropout_p": bool(options.pop("dropout_p", 0.0)),
        "logit_scale": options.pop("logit_scale", None) is not None,
        "return_lse": options.pop("return_lse", False),
        "backend": options.pop("backend", "auto") != "auto",
        "cu_seqlens_k": not same,
    }
    for name in _WITHOUT_EFFECT:
        options.pop(name, None)
    found = [*(name for name, is_wanted in wanted.items() if is_wanted), *options]
    if found:
        raise ValueError(
            f"{found[0]} must be left out for the published gradient, which does not have it. "
            "Train with the exact one, attention=dual_chunk."
        )
    return published_dual_chunk_attn(
        q,
        k,
        v,
        cu_seqlens,
        max_seqlen,
        inv_freq=inv_freq,
        chunk_size=chunk_size,
        local_size=local_size,
        softmax_scale=softmax_scale,
    )
