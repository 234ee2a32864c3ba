"""The peers of `lctrain-bench decode`: one query per request over a dense or paged cache."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class DecodeInputs(NamedTuple):
    """Tensors of a case. All layouts of a cache are views of the same memory.

    Attributes:
        q: Queries [B, 1, H, D].
        k: Keys [copies, B, S, Hk, D].
        v: Values, in the shape of k.
        lengths: Keys of each request, [B] int32, all S.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    lengths: Tensor

    @property
    def keys(self) -> int:
        """Keys of each request."""
        return self.k.shape[2]

    def cache(self, copy: int, page: int) -> tuple[Tensor, Tensor]:
        """Returns keys and values of one copy, [B, S, Hk, D] or [pages, page, Hk, D].

        Args:
            copy: Index of the copy.
            page: Tokens of a page; 0 for a dense cache.
        """
        both = self.k[copy], self.v[copy]
        if page == 0:
            return both
        return tuple(x.view(-1, page, *x.shape[2:]) for x in both)  # type: ignore[return-value]

    def table(self, page: int) -> Tensor | None:
        """Returns the pages of each request, [B, S / page] int32; a request's own, in random order.

        Args:
            page: Tokens of a page; None is returned for 0.
        """
        if page == 0:
            return None
        requests, width = self.k.shape[1], self.keys // page
        order = torch.rand(requests, width, device=self.k.device).argsort(1)
        first = torch.arange(requests, device=self.k.device)[:, None] * width
        return (order + first).to(torch.int32)


def sdpa(inputs: DecodeInputs, page: int) -> list[Callable[[], Tensor]]:
    """Returns calls of PyTorch's attention on a dense cache, one per copy."""
    _dense_only(page)

    def call(k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (inputs.q, k, v))
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)

    return [partial(call, *inputs.cache(copy, 0)) for copy in range(len(inputs.k))]


def transformers_sdpa(inputs: DecodeInputs, page: int) -> list[Callable[[], Tensor]]:
    """Returns calls that repeat keys and values for the groups, as transformers' SDPA may do."""
    _dense_only(page)
    group = inputs.q.shape[2] // inputs.k.shape[3]

    def call(k: Tensor, v: Tensor) -> Tensor:
        q = inputs.q.transpose(1, 2)
        k, v = (x.transpose(1, 2).repeat_interleave(group, 1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    return [partial(call, *inputs.cache(copy, 0)) for copy in range(len(inputs.k))]


def flashinfer(inputs: DecodeInputs, page: int) -> list[Callable[[], Tensor]]:
    """Returns calls of FlashInfer's paged decode; a dense cache has pages of all its keys."""
    import flashinfer

    table = inputs.table(page or inputs.keys)
    assert table is not None
    requests, width = table.shape
    device = inputs.q.device
    calls: list[Callable[[], Tensor]] = []
    for copy in range(len(inputs.k)):
        workspace = torch.empty(128 * 2**20, dtype=torch.uint8, device=device)
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            workspace, "NHD", use_tensor_cores=True
        )
        wrapper.plan(
            torch.arange(requests + 1, dtype=torch.int32, device=device) * width,
            table.flatten(),
            torch.full_like(inputs.lengths, page or inputs.keys),
            inputs.q.shape[2],
            inputs.k.shape[3],
            inputs.q.shape[3],
            page or inputs.keys,
            q_data_type=inputs.q.dtype,
            kv_data_type=inputs.q.dtype,
        )
        cache = inputs.cache(copy, page or inputs.keys)
        calls.append(partial(_squeezed, wrapper.run, inputs.q[:, 0], cache))
    return calls


def _squeezed(run: Any, q: Tensor, cache: tuple[Tensor, Tensor]) -> Tensor:
    return run(q, cache)[:, None]


def flash_attention_4(inputs: DecodeInputs, page: int) -> list[Callable[[], Tensor]]:
    """Returns calls of FlashAttention-4 (CuTe DSL)."""
    from flash_attn.cute import flash_attn_varlen_func

    requests, table = inputs.q.shape[0], inputs.table(page)
    cu = torch.arange(requests + 1, dtype=torch.int32, device=inputs.q.device)

    def call(k: Tensor, v: Tensor) -> Tensor:
        out = flash_attn_varlen_func(
            inputs.q[:, 0],
            k,
            v,
            cu_seqlens_q=cu,
            seqused_k=inputs.lengths,
            page_table=table,
            max_seqlen_q=1,
            max_seqlen_k=inputs.keys,
            causal=True,
        )
        return (out[0] if isinstance(out, tuple) else out)[:, None]

    return [partial(call, *inputs.cache(copy, page)) for copy in range(len(inputs.k))]


def _dense_only(page: int) -> None:
    if page:
        raise NotImplementedError("has no paged caches")


PEERS: dict[str, Callable[[DecodeInputs, int], list[Callable[[], Tensor]]]] = {
    "sdpa": sdpa,
    "sdpa_repeated": transformers_sdpa,
    "flashinfer": flashinfer,
    "fa4": flash_attention_4,
}
