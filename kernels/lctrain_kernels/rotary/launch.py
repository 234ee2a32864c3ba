"""Launches the Triton kernels of rotary embeddings."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lctrain_kernels.launch import cdiv, launch, next_power_of_2
from lctrain_kernels.multiprocessors import multiprocessors
from lctrain_kernels.norm.launch import column_sum
from lctrain_kernels.rotary.options import RotaryOptions
from lctrain_kernels.rotary.triton_kernels import (
    BackwardPointers,
    BackwardStrides,
    RotaryPointers,
    RotaryShape,
    RotaryStrides,
    norm_rotary_bwd_kernel,
    rotary_kernel,
)
from lctrain_kernels.tile.arguments import token_head_strides


@dataclass(frozen=True)
class RotaryConfig:
    """Tile configuration of a rotary kernel. bench/NOTES.md has the measurements behind it.

    Attributes:
        size: Number of column pairs in a tile, over all its heads and tokens.
        num_warps: Warps per program.
        stages: Triton's num_stages of the backward's loop, the depth of its load pipeline.
        programs: Number of programs per multiprocessor in the backward.
    """

    size: int
    num_warps: int
    stages: int = 1
    programs: int = 1

    def tokens(self, numbers: int) -> int:
        """Returns the tokens per tile, for `numbers` column pairs per token over all heads."""
        return max(self.size // numbers, 1)


def forward_config(numbers: int, has_norm: bool) -> RotaryConfig:
    """Returns the forward's tile sizes for `numbers` rotated pairs per token, over all heads."""
    if has_norm:
        return RotaryConfig(1024, 4)
    return RotaryConfig(2048, 8 if numbers < 2048 else 4)


def backward_config(numbers: int) -> RotaryConfig:
    """Returns the tile sizes of norm_rotary_bwd_kernel for `numbers` column pairs per token."""
    return RotaryConfig(2048, 8, 3, 2) if numbers >= 1024 else RotaryConfig(512, 4, 3, 4)


def rotate(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    options: RotaryOptions,
    *,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Rotates q [T, Hq, D] and k [T, Hk, D]; applies RMSNorm before if norm weights are given.

    Args:
        q: Queries, any strides of tokens and heads, column stride 1.
        k: Keys, any strides of tokens and heads, column stride 1; or None.
        cos: Cosines [rows, R or R / 2].
        sin: Sines, in the shape of cos.
        positions: Row of cos and sin for each token, [T], integers. None takes the token's index
            modulo the number of rows.
        q_weight: Weight of the queries' norm, [D], or None.
        k_weight: Weight of the keys' norm, [D], or None.
        options: Layout of pairs and table, and epsilon of the norm.
        inverse: Whether to rotate by the negative angle, as the backward does.

    Returns:
        The rotated q and k, contiguous. If k is None, its result is an empty tensor.
    """
    tokens, q_heads, head_dim = q.shape
    k_heads = 1 if k is None else k.shape[1]
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_out = torch.empty(0 if k is None else k.shape, dtype=q.dtype, device=q.device)
    shape = rotary_shape(cos, head_dim, options)
    block_q, block_k = next_power_of_2(q_heads), next_power_of_2(k_heads)
    numbers = block_q * shape.block_half
    config = forward_config(numbers, q_weight is not None)
    size = config.tokens(numbers)
    if tokens:
        launch(rotary_kernel, (cdiv(tokens, size),))(
            RotaryPointers(
                q,
                k,
                q_out,
                None if k is None else k_out,
                q_weight,
                k_weight,
                cos,
                sin,
                positions,
            ),
            tokens,
            cos.shape[0],
            RotaryStrides(*token_head_strides(q, k), *cos.stride()[:1]),
            options.eps,
            options.weight_offset,
            Q_HEADS=q_heads,
            K_HEADS=k_heads,
            BLOCK_Q=block_q,
            BLOCK_K=block_k,
            TOKENS=size,
            SHAPE=shape,
            INVERSE=inverse,
            num_warps=config.num_warps,
            enable_fp_fusion=True,
        )
    return q_out, k_out


def norm_rotary_bwd(
    dout: Tensor,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    weight: Tensor,
    options: RotaryOptions,
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of x [T, H, D] and weight [D], for RMSNorm followed by the rotation.

    Args:
        dout: Gradient of the rotated x, [T, H, D].
        x: Queries or keys before the norm, [T, H, D].
        cos: Cosines [rows, R or R / 2].
        sin: Sines, in the shape of cos.
        positions: Row of cos and sin for each token, [T], or None; see rotate.
        weight: Weight of the norm, [D].
        options: Layout of pairs and table, and epsilon of the norm.
    """
    tokens, heads, head_dim = x.shape
    shape = rotary_shape(cos, head_dim, options)
    block = next_power_of_2(heads)
    numbers = block * shape.block_half
    config = backward_config(numbers)
    size = config.tokens(numbers)
    programs = config.programs * multiprocessors(x.device)
    programs = max(min(cdiv(tokens, size), programs), 1)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    parts = torch.empty(programs, head_dim, dtype=torch.float32, device=x.device)
    launch(norm_rotary_bwd_kernel, (programs,))(
        BackwardPointers(dout, x, dx, weight, parts, cos, sin, positions),
        tokens,
        cos.shape[0],
        BackwardStrides(*token_head_strides(dout, x), *cos.stride()[:1]),
        options.eps,
        options.weight_offset,
        NUM_HEADS=heads,
        HEADS=block,
        TOKENS=size,
        STAGES=config.stages,
        SHAPE=shape,
        num_warps=config.num_warps,
        enable_fp_fusion=True,
    )
    return dx, column_sum(parts, weight.dtype)


def rotary_shape(cos: Tensor, head_dim: int, options: RotaryOptions) -> RotaryShape:
    """Returns the compile-time constants of the rotary kernels.

    Args:
        cos: Cosines [rows, R or R / 2], for R rotated columns.
        head_dim: Head dim D.
        options: Layout of pairs and table.
    """
    rotary = options.rotary_columns(cos)
    rest = head_dim - rotary
    return RotaryShape(
        head_dim=head_dim,
        half=rotary // 2,
        block_half=next_power_of_2(rotary // 2),
        block_rest=next_power_of_2(rest) if rest else 0,
        full_table=options.full_table,
        interleaved=options.interleaved,
    )
