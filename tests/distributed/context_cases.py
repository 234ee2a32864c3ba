"""Attention on a shared pack, computed by one rank or by a group of ranks."""

from functools import partial

import torch
import torch.distributed as dist

from lctrain.distributed.context import ContextShard
from lctrain.distributed.exchange import exchange_heads, exchange_keys
from lctrain.kernels import (
    diff_attn_varlen_func,
    dual_chunk_attn_varlen_func,
    flash_attn_varlen_func,
)

PACKS = ((700, 1, 300, 64, 130), (3,))  # the second one has tokens for one rank
HEADS, KEY_HEADS, DIM = 8, 8, 16
SOFTCAP, WINDOW = 5.0, 200
CASES = ("plain", "window", "softcap", "dual_chunk", "differential")
BY_KEYS = ("plain", "window", "softcap")  # the others take no separate boundaries of keys


def inputs(case, lengths):
    """Returns the whole tensors of a case, and the weights of the loss."""
    generator = torch.Generator().manual_seed(0)
    heads = [HEADS, KEY_HEADS, KEY_HEADS]
    if case == "differential":
        heads = [HEADS, HEADS, KEY_HEADS, KEY_HEADS, KEY_HEADS]
    tokens = sum(lengths)
    made = [torch.randn(tokens, h, DIM, generator=generator, dtype=torch.float64) for h in heads]
    return made, torch.randn(tokens, HEADS, DIM, generator=generator, dtype=torch.float64)


def attention(case, lengths):
    """Returns the attention of a case on tensors of whole documents."""
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    longest = max(lengths)
    if case == "dual_chunk":
        inv_freq = 10_000 ** -(torch.arange(0, DIM, 2) / DIM)
        options = {"inv_freq": inv_freq, "chunk_size": 128, "local_size": 32}
        return lambda q, k, v: dual_chunk_attn_varlen_func(q, k, v, ends, longest, **options)
    if case == "differential":
        lam = torch.tensor(0.3, dtype=torch.float64)
        return lambda *tensors: diff_attn_varlen_func(*tensors, lam, ends, longest)
    plain = by_keys(case)
    return lambda q, k, v: plain(q, k, v, ends, ends, longest, longest)


def by_keys(case):
    """Returns the attention of a case that takes boundaries of queries and keys."""
    options = {"window": {"window_size": (WINDOW, 0)}, "softcap": {"softcap": SOFTCAP}}
    return partial(flash_attn_varlen_func, causal=True, **options.get(case, {}))


def whole(case, lengths):
    """Returns output and gradients of one rank."""
    tensors, weights = inputs(case, lengths)
    tensors = [tensor.requires_grad_() for tensor in tensors]
    out = attention(case, lengths)(*tensors)
    (out * weights).sum().backward()
    return [out.detach(), *(tensor.grad for tensor in tensors)]


def shared(case, exchange, lengths):
    """Returns output and gradients, put together from all ranks of the default group."""
    size, rank = dist.get_world_size(), dist.get_rank()
    shard = ContextShard.of(lengths, size)
    own = torch.from_numpy(shard.indices(rank))
    tensors, weights = inputs(case, lengths)
    mine = [tensor[own].requires_grad_() for tensor in tensors]
    if exchange == "heads":
        out = exchange_heads(attention(case, lengths), mine, shard)
    else:
        out = exchange_keys(by_keys(case), *mine, shard)
    (out * weights[own]).sum().backward()
    results = []
    for value in (out.detach(), *(tensor.grad for tensor in mine)):
        full = value.new_zeros((sum(lengths), *value.shape[1:]))
        full[own] = value
        dist.all_reduce(full)
        results.append(full)
    return results


def all_shared():
    """Returns the results of every case, exchange and pack."""
    return {
        (case, exchange, lengths): shared(case, exchange, lengths)
        for lengths in PACKS
        for case in CASES
        for exchange in ("heads", "keys")
        if exchange == "heads" or case in BY_KEYS
    }
