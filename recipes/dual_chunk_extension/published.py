"""Trains with the published gradient of dual chunk attention, for comparison."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from lctrain import kernels


@contextmanager
def published_gradient() -> Iterator[None]:
    """Replaces the kernel under `attention=dual_chunk` by the published formulation.

    Its output is the same, its gradient is not: see `lctrain.kernels.bench.published_dual_chunk`.
    """
    exact = kernels.dual_chunk_attn_varlen_func
    kernels.dual_chunk_attn_varlen_func = _published
    try:
        yield
    finally:
        kernels.dual_chunk_attn_varlen_func = exact


def _published(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, **options: Any
) -> Tensor:
    from lctrain.kernels.bench.published_dual_chunk import published_dual_chunk_attn

    assert not options.get("dropout_p"), "the published formulation has no dropout"
    assert options.get("logit_scale") is None, "nor a factor of the logits"
    names = ("inv_freq", "chunk_size", "local_size", "softmax_scale")
    return published_dual_chunk_attn(
        q, k, v, cu_seqlens, max_seqlen, **{name: options[name] for name in names}
    )
