"""Lists the rotary kernels that CI compiles ahead of time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton

from lctrain_kernels.rotary.launch import (
    backward_config,
    forward_config,
    rotary_shape,
)
from lctrain_kernels.rotary.options import RotaryOptions
from lctrain_kernels.rotary.triton_kernels import RotaryShape, norm_rotary_bwd_kernel, rotary_kernel
from lctrain_kernels.tile.fused_variant import fused_variant
from lctrain_kernels.tile.variant import KernelVariant

_FLOATS = dict.fromkeys(("eps", "offset"), "fp32")


@dataclass(frozen=True)
class RotaryCase:
    """Sizes and features of the rotary embedding of a model.

    Attributes:
        name: Name of the variant in reports.
        q_heads: Number of query heads Hq.
        k_heads: Number of key heads Hk; 0 if a separate call rotates k.
        head_dim: Head dim D of queries and keys.
        rotary: Number of columns of a head that are rotated.
        has_norm: Whether RMSNorm normalises queries and keys before the rotation.
        inverse: Whether to rotate by the negative angle, as the backward does.
        published: Whether cos and sin have transformers' layout: one column per rotated column,
            one row per token, dtype of q. Otherwise they have FlashAttention's layout: one column
            per pair of columns, float32, rows chosen by position ids, interleaved pairs.
    """

    name: str
    q_heads: int
    k_heads: int
    head_dim: int
    rotary: int
    has_norm: bool = False
    inverse: bool = False
    published: bool = True

    def shape(self) -> RotaryShape:
        """Compile-time constants of the rotary kernels for this case."""
        columns = self.rotary if self.published else self.rotary // 2
        options = RotaryOptions(not self.published, self.published, 0.0, 0.0, "triton")
        return rotary_shape(torch.empty(1, columns, device="meta"), self.head_dim, options)

    def others(self) -> dict[str, str | None]:
        """Triton's names of the types of the arguments whose dtype differs from that of q."""
        if self.published:
            return {**_FLOATS, "positions": None}
        return {**_FLOATS, "positions": "*i64", "cos": "*fp32", "sin": "*fp32"}


CASES = (
    RotaryCase("llama", 32, 8, 64, 64),
    RotaryCase("llama_inverse", 32, 8, 64, 64, inverse=True),
    RotaryCase("llama_70b", 64, 8, 128, 128),
    RotaryCase("qwen3", 16, 8, 128, 128, has_norm=True),
    RotaryCase("partial", 12, 0, 96, 48, published=False),
    RotaryCase("partial_norm", 12, 4, 96, 48, has_norm=True, published=False),
)


def forward_variant(case: RotaryCase, dtype: str = "bf16") -> KernelVariant:
    """Describes one compilation of rotary_kernel."""
    shape = case.shape()
    block_q = triton.next_power_of_2(case.q_heads)
    numbers = block_q * shape.block_half
    config = forward_config(numbers, case.has_norm)
    others = case.others()
    if not case.has_norm:
        others |= dict.fromkeys(("q_weight", "k_weight"))
    if not case.k_heads:
        others |= dict.fromkeys(("k", "k_out", "k_weight"))
    k_heads = case.k_heads or 1
    constants: dict[str, object] = {
        "Q_HEADS": case.q_heads,
        "K_HEADS": k_heads,
        "BLOCK_Q": block_q,
        "BLOCK_K": triton.next_power_of_2(k_heads),
        "SHAPE": shape,
        "TOKENS": config.tokens(numbers),
        "INVERSE": case.inverse,
    }
    label = f"rotary-D{case.head_dim}-{case.name}"
    return fused_variant(label, rotary_kernel, dtype, others, constants, config.num_warps)


def backward_variant(case: RotaryCase, heads: int, dtype: str = "bf16") -> KernelVariant:
    """Describes one compilation of norm_rotary_bwd_kernel, for q or k with `heads` heads."""
    shape = case.shape()
    block = triton.next_power_of_2(heads)
    numbers = block * shape.block_half
    config = backward_config(numbers)
    others = case.others() | {"dweight": "*fp32"}
    constants: dict[str, object] = {
        "NUM_HEADS": heads,
        "HEADS": block,
        "SHAPE": shape,
        "TOKENS": config.tokens(numbers),
        "STAGES": config.stages,
    }
    label = f"norm_rotary_bwd-D{case.head_dim}-{case.name}-{heads}"
    return fused_variant(label, norm_rotary_bwd_kernel, dtype, others, constants, config.num_warps)


def kernel_variants() -> Iterator[KernelVariant]:
    """Yields the variants to compile: every tile in bf16, and Llama's rotation in float32."""
    for case in CASES:
        yield forward_variant(case)
        if case.has_norm:
            yield backward_variant(case, case.q_heads)
            yield backward_variant(case, case.k_heads)
    yield forward_variant(CASES[0], "fp32")
