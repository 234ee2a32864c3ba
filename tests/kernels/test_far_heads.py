"""Tests tensors whose heads lie more than 2^31 elements apart, as in [heads, tokens, head dim].

The memory between the heads is reserved and never touched, so a test needs a few megabytes.
"""

import pytest
import torch

from lctrain.kernels import (
    diff_attn_varlen_func,
    dual_chunk_attn_varlen_func,
    flash_attn_varlen_func,
    qk_norm_rotary,
    rotate_qk,
)
from lctrain_kernels.tile.arguments import token_head_strides
from tests.kernels.oracle import Case, cumulative, frequencies
from tests.numerics import assert_equal_sums

TOKENS, HEADS, HEAD_DIM = 24, 3, 16
FAR = 2**30 + 16  # elements: the third head begins beyond 2^31


@pytest.fixture
def far_apart():
    """Returns a function that copies a tensor [T, H, D] to memory in which its heads lie apart."""
    memory = torch.empty((HEADS - 1) * FAR + 64 * TOKENS * HEAD_DIM, dtype=torch.float16)
    used = 0

    def copy(x: torch.Tensor) -> torch.Tensor:
        nonlocal used
        far = torch.empty(0, dtype=x.dtype)  # a view would share the memory's version counter
        far.set_(memory.untyped_storage(), used, x.shape, (x.shape[2], FAR, 1))
        used += x.shape[0] * x.shape[2]
        assert used <= 64 * TOKENS * HEAD_DIM
        return far.copy_(x)

    return copy


def random_heads(count: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(TOKENS, HEADS, HEAD_DIM, dtype=torch.float16) for _ in range(count)]


def varlen(q, k, v):
    cu = cumulative([TOKENS], q.device)
    return flash_attn_varlen_func(q, k, v, cu, cu, TOKENS, TOKENS, causal=True, backend="triton")


def dual_chunk(q, k, v):
    return dual_chunk_attn_varlen_func(
        q,
        k,
        v,
        cumulative([TOKENS], q.device),
        TOKENS,
        inv_freq=frequencies(Case((), head_dim=HEAD_DIM), q.device),
        chunk_size=8,
        local_size=2,
        backend="triton",
    )


def differential(q, k, v):
    cu = cumulative([TOKENS], q.device)
    lam = torch.full((HEADS,), 0.4)
    return diff_attn_varlen_func(q, k, k, q, v, lam, cu, TOKENS, backend="triton")


@pytest.mark.parametrize("attention", [varlen, dual_chunk, differential])
def test_attention(attention, far_apart):
    """Forward and gradients have the bits of contiguous tensors; dout is far apart as well."""
    *qkv, dout = random_heads(4)
    results = []
    for move in (torch.clone, far_apart):
        leaves = [move(x).requires_grad_() for x in qkv]
        out = attention(*leaves)
        results.append((out, *torch.autograd.grad(out, leaves, move(dout))))
    for near, far in zip(*results, strict=True):
        assert torch.equal(near, far)


@pytest.mark.parametrize("norm", [False, True])
def test_rotary(norm, far_apart):
    q, k, dout = random_heads(3)
    cos, sin = torch.randn(2, 1, TOKENS, HEAD_DIM, dtype=torch.float16).unbind()
    weight = torch.ones(HEAD_DIM, dtype=torch.float16)
    results = []
    for move in (torch.clone, far_apart):
        leaves = [move(x)[None].requires_grad_() for x in (q, k)]
        if norm:
            outs = qk_norm_rotary(*leaves, weight, weight, cos, sin, eps=1e-6, backend="triton")
        else:
            outs = rotate_qk(*leaves, cos, sin, backend="triton")
        grads = torch.autograd.grad(outs, leaves, [move(dout)[None]] * 2)
        results.append((*outs, *grads))
    for near, far in zip(*results, strict=True):
        assert torch.equal(near, far)


def test_preparation_of_the_hopper_backward(far_apart):
    """delta is rowsum(out * dout)."""
    from lctrain_kernels.varlen.hopper import varlen_prepare_kernel

    out, dout = random_heads(2)
    expected = (out.float() * dout.float()).sum(2).t()
    lse = torch.zeros(HEADS, TOKENS)
    for move in (torch.clone, far_apart):
        delta, lse2 = torch.empty_like(lse), torch.empty_like(lse)
        far_out, far_dout = move(out), move(dout)
        varlen_prepare_kernel[(1, HEADS)](
            far_out,
            far_dout,
            lse,
            None,
            None,
            delta,
            lse2,
            None,
            *token_head_strides(far_out, far_dout),
            TOKENS,
            1.0,
            HEADS=HEADS,
            HEAD_DIM=HEAD_DIM,
            BLOCK_D=HEAD_DIM,
            ROWS=32,
        )
        assert_equal_sums(delta, expected, HEAD_DIM)


def test_preparation_of_the_differential_hopper_backward(far_apart):
    """dlam is -rowsum(out2 * dout)."""
    from lctrain_kernels.differential.hopper import differential_prepare_kernel
    from lctrain_kernels.differential.hopper_structures import PreparePointers, PrepareStrides

    out1, out2, dout = random_heads(3)
    expected = -(out2.float() * dout.float()).sum(2).t()
    lam, lse = torch.full((TOKENS, HEADS), 0.4), torch.zeros(HEADS, TOKENS)
    for move in (torch.clone, far_apart):
        dlam, stats = torch.empty_like(lse), torch.empty(4, HEADS, TOKENS)
        dq1, dq2 = torch.empty(2, TOKENS, HEADS, HEAD_DIM).unbind()
        outs = move(out1), move(out2), move(dout)
        differential_prepare_kernel[(1, HEADS)](
            PreparePointers(*outs, lam, lse, lse, None, None, dq1, dq2, dlam, stats),
            PrepareStrides(*token_head_strides(*outs[1:])),
            *lam.stride(),
            TOKENS,
            HEADS=HEADS,
            HEAD_DIM=HEAD_DIM,
            BLOCK_D=HEAD_DIM,
            VALUE_DIM=HEAD_DIM,
            BLOCK_DV=HEAD_DIM,
            ROWS=32,
        )
        assert_equal_sums(dlam, expected, HEAD_DIM)
