"""Cases of flash_attn_with_kvcache, their inputs, and plain PyTorch that computes them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lctrain.kernels import flash_attn_with_kvcache
from tests.numerics import assert_error_at_most_twice


@dataclass(frozen=True)
class KVCase:
    """One call: sizes of requests and heads, layout of the cache, and options."""

    lengths: tuple[int, ...] = (77, 0, 1, 140)
    seqlen_q: int = 1
    new: int = 0
    heads: int = 4
    heads_k: int = 2
    head_dim: int = 32
    capacity: int = 160
    page: int = 0
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    alibi: str | None = None
    sink: bool = False
    rotary: int = 0
    interleaved: bool = True
    leftpad: bool = False
    batch_index: bool = False
    num_splits: int = 0
    split: str = "fixed"
    by_int: bool = False

    @property
    def local(self) -> bool:
        return self.causal or self.window != (-1, -1)


@dataclass
class KVInputs:
    """Tensors of a call. `keys` and `values` [B, capacity, Hk, D] are what the cache holds."""

    q: Tensor
    keys: Tensor
    values: Tensor
    k_cache: Tensor
    v_cache: Tensor
    k: Tensor | None
    v: Tensor | None
    options: dict

    def call(self, **changes) -> tuple[Tensor, Tensor]:
        arguments = {"k": self.k, "v": self.v, **self.options, "return_softmax_lse": True}
        return flash_attn_with_kvcache(
            self.q, self.k_cache, self.v_cache, **{**arguments, **changes}
        )

    def places(self, request: int, index: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (page or row, slot) of tokens of a request in the cache."""
        table = self.options.get("block_table")
        if table is not None:
            page = self.k_cache.shape[1]
            return table[request, index // page].long(), index % page
        rows = self.options.get("cache_batch_idx")
        row = request if rows is None else int(rows[request])
        return torch.full_like(index, row), index


def make_kv(case: KVCase, device, dtype=torch.float16, seed: int = 0) -> KVInputs:
    """Draws the tensors of a case. All of the cache that no request holds is NaN."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    requests = len(case.lengths)
    shape = (requests, case.capacity, case.heads_k, case.head_dim)
    keys, values = draw(*shape), draw(*shape)
    lengths = torch.tensor(case.lengths, dtype=torch.int32)
    pads = torch.zeros_like(lengths)
    options: dict = {
        "causal": case.causal,
        "window_size": case.window,
        "softcap": case.softcap,
        "num_splits": case.num_splits,
        "split": case.split,
        "cache_seqlens": case.lengths[0] if case.by_int else lengths.to(device),
    }
    if case.leftpad:
        pads = (lengths // 3).to(torch.int32)
        options["cache_leftpad"] = pads.to(device)
    if case.alibi is not None:
        slopes = (case.heads,) if case.alibi == "heads" else (requests, case.heads)
        options["alibi_slopes"] = draw(*slopes).float().abs()
    if case.sink:
        options["learnable_sink"] = draw(case.heads)
    if case.rotary:
        angles = torch.rand(case.capacity + 40, case.rotary // 2, generator=generator) * 6.3
        options["rotary_cos"] = angles.cos().to(device, dtype)
        options["rotary_sin"] = angles.sin().to(device, dtype)
        options["rotary_interleaved"] = case.interleaved
    if case.page:
        width = -(-case.capacity // case.page)
        pages = torch.randperm(requests * width + 3, generator=generator)[: requests * width]
        options["block_table"] = pages.view(requests, width).to(device, torch.int32)
        cache = (requests * width + 3, case.page, *shape[2:])
    else:
        cache = (requests + 2, *shape[1:])
        if case.batch_index:
            rows = torch.randperm(requests + 2, generator=generator)[:requests]
            options["cache_batch_idx"] = rows.to(device, torch.int32)
    k_cache, v_cache = (
        torch.full(cache, float("nan"), device=device, dtype=dtype) for _ in range(2)
    )
    k = v = None
    if case.new:
        k, v = (draw(requests, case.new, *shape[2:]) for _ in range(2))
    q = draw(requests, case.seqlen_q, case.heads, case.head_dim)
    inputs = KVInputs(q, keys, values, k_cache, v_cache, k, v, options)
    for request, (pad, length) in enumerate(zip(pads.tolist(), case.lengths, strict=True)):
        index = torch.arange(pad, length, device=device)
        page, slot = inputs.places(request, index)
        k_cache[page, slot] = keys[request, index]
        v_cache[page, slot] = values[request, index]
    return inputs


def plain_rotation(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotates x [S, heads, D] by tables [S, R / 2], in the dtype of x."""
    rotary = 2 * cos.shape[1]
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    pairs = x[..., :rotary].unflatten(-1, (-1, 2) if interleaved else (2, -1))
    low, high = pairs.unbind(-1 if interleaved else -2)
    both = (low * cos - high * sin, low * sin + high * cos)
    turned = torch.stack(both, -1 if interleaved else -2).flatten(-2)
    return torch.cat((turned, x[..., rotary:]), -1)


def plain_kvcache(case: KVCase, inputs: KVInputs, dtype: torch.dtype):
    """Computes a call in plain PyTorch, in `dtype`.

    Returns:
        out [B, Sq, H, D], lse [B, H, Sq], and a list of the (rotated) new keys of each request.
    """
    options = inputs.options
    wide = torch.promote_types(dtype, torch.float32)
    outs, lses, news = [], [], []
    for request, stored in enumerate(case.lengths):
        pad = stored // 3 if case.leftpad else 0
        q = inputs.q[request].to(dtype)
        k, v = inputs.keys[request, pad:stored].to(dtype), inputs.values[request, pad:stored]
        v = v.to(dtype)
        steps = torch.arange(case.seqlen_q, device=q.device)
        if inputs.k is not None:
            new = inputs.k[request].to(dtype)
            if case.rotary:
                tables = (options["rotary_cos"], options["rotary_sin"])
                at = stored + torch.arange(case.new, device=q.device)
                new = plain_rotation(new, *(t[at] for t in tables), case.interleaved)
                at = stored + (steps if case.local else steps * 0)
                q = plain_rotation(q, *(t[at] for t in tables), case.interleaved)
            news.append(new)
            k, v = torch.cat((k, new)), torch.cat((v, inputs.v[request].to(dtype)))
        group = case.heads // case.heads_k
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        x = torch.einsum("ihd,jhd->hij", q, k).to(wide) / math.sqrt(case.head_dim)
        if case.softcap:
            x = case.softcap * torch.tanh(x / case.softcap)
        distance = (steps + len(k) - case.seqlen_q)[:, None] - torch.arange(len(k), device=q.device)
        if case.alibi is not None:
            slopes = options["alibi_slopes"].to(wide)
            slopes = slopes[request] if slopes.dim() == 2 else slopes
            x = x - slopes[:, None, None] * distance.abs()
        left, right = case.window[0], 0 if case.causal else case.window[1]
        hidden = torch.zeros_like(distance, dtype=torch.bool)
        if left >= 0:
            hidden |= distance > left
        if right >= 0:
            hidden |= distance < -right
        x = x.masked_fill(hidden, float("-inf"))
        if case.sink:
            sink = options["learnable_sink"].to(wide)[:, None, None]
            x = torch.cat((x, sink.expand(-1, case.seqlen_q, 1)), -1)
        lse = torch.logsumexp(x, -1)
        weights = torch.exp(x - lse.masked_fill(lse == float("-inf"), 0.0)[..., None])
        outs.append(torch.einsum("hij,jhd->ihd", weights[..., : len(k)].to(dtype), v))
        lses.append(lse)
    return torch.stack(outs), torch.stack(lses), news


def assert_matches_plain(case: KVCase, inputs: KVInputs, **changes) -> None:
    """Calls the function, and compares out, lse and the whole cache with plain PyTorch."""
    before = inputs.k_cache.clone(), inputs.v_cache.clone()
    out, lse = inputs.call(**changes)
    plain = plain_kvcache(case, inputs, inputs.q.dtype)
    exact = plain_kvcache(case, inputs, torch.float64)
    assert_error_at_most_twice(out, plain[0], exact[0], "out")
    assert torch.equal(lse == float("-inf"), exact[1] == float("-inf"))
    seen = exact[1] > float("-inf")
    assert_error_at_most_twice(lse[seen], plain[1][seen], exact[1][seen], "lse")
    expected_k, expected_v = before
    for request, stored in enumerate(case.lengths if case.new else ()):
        index = torch.arange(stored, stored + case.new, device=out.device)
        page, slot = inputs.places(request, index)
        written = inputs.k_cache[page, slot]
        assert_error_at_most_twice(written, plain[2][request], exact[2][request], "new keys")
        expected_k[page, slot], expected_v[page, slot] = written, inputs.v[request]
    assert torch.equal(inputs.k_cache.nan_to_num(7.0), expected_k.nan_to_num(7.0))
    assert torch.equal(inputs.v_cache.nan_to_num(7.0), expected_v.nan_to_num(7.0))
