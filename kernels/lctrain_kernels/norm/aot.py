"""Lists the norm kernels that CI compiles ahead of time, one variant per tile configuration."""

from collections.abc import Iterator

import triton

from lctrain_kernels.norm.config import BACKWARD, FORWARD, norm_config
from lctrain_kernels.norm.launch import SUM_BLOCK, SUM_PARTS
from lctrain_kernels.norm.triton_kernels import column_sum_kernel, norm_bwd_kernel, norm_fwd_kernel
from lctrain_kernels.tile.fused_variant import fused_variant
from lctrain_kernels.tile.variant import KernelVariant

NORMS = {2048: "add_rms", 128: "rms", 768: "layer", 4096: "rms", 8192: "add_gemma"}
"""Hidden size -> norm, one per tile of the tables; larger tiles take "add_rms"."""
SPILL_FREE_COLUMNS = 8192
_FLOATS = dict.fromkeys(("eps", "offset"), "fp32")


def forward_variant(columns: int, norm: str, dtype: str = "bf16") -> KernelVariant:
    """Describes one compilation of norm_fwd_kernel.

    Args:
        columns: Hidden size.
        norm: "rms", "gemma" (RMSNorm that multiplies by the weight in float32) or "layer"
            (LayerNorm with a bias). The prefix "add_" adds a residual before the norm.
        dtype: Triton's name of the tensors' dtype, such as "bf16".
    """
    block = triton.next_power_of_2(columns)
    config = norm_config(FORWARD, block)
    others: dict[str, str | None] = {**_FLOATS, "mean_ptr": "*fp32", "rstd_ptr": "*fp32"}
    if not norm.startswith("add_"):
        others["residual_ptr"] = None
    if not norm.endswith("layer"):
        others["bias_ptr"] = None
    constants = {
        "COLUMNS": columns,
        "BLOCK": block,
        "ROWS": config.rows,
        "CENTERED": norm.endswith("layer"),
        "FLOAT32_PRODUCT": norm.endswith(("layer", "gemma")),
    }
    label = f"norm_fwd-H{columns}-{norm}"
    return fused_variant(label, norm_fwd_kernel, dtype, others, constants, config.num_warps)


def backward_variant(columns: int, norm: str, dtype: str = "bf16") -> KernelVariant:
    """Describes one compilation of norm_bwd_kernel; the arguments are those of forward_variant."""
    block = triton.next_power_of_2(columns)
    config = norm_config(BACKWARD, block)
    others: dict[str, str | None] = dict.fromkeys(
        ("mean_ptr", "rstd_ptr", "dweight_ptr", "dbias_ptr"), "*fp32"
    )
    others |= _FLOATS
    if not norm.startswith("add_"):
        others["dsum_ptr"] = None
    if not norm.endswith("layer"):
        others["dbias_ptr"] = None
    constants = {
        "COLUMNS": columns,
        "BLOCK": block,
        "ROWS": config.rows,
        "STAGES": config.stages,
        "CENTERED": norm.endswith("layer"),
    }
    label = f"norm_bwd-H{columns}-{norm}"
    # Longer rows spill: one row of x, dy, dsum, the weight and its gradient are in registers.
    spill_free = block <= SPILL_FREE_COLUMNS
    return fused_variant(
        label, norm_bwd_kernel, dtype, others, constants, config.num_warps, spill_free
    )


def column_sum_variant(columns: int, groups: int = 1, dtype: str = "bf16") -> KernelVariant:
    """Describes one compilation of column_sum_kernel, which adds partial gradients of parameters.

    Args:
        columns: Number of columns to add, the hidden size.
        groups: Number of parameters, 1 or 2.
        dtype: Triton's name of the parameters' dtype, such as "bf16".
    """
    constants = {"COLUMNS": columns, "BLOCK": SUM_BLOCK, "PARTS": SUM_PARTS}
    others: dict[str, str | None] = {"parts_ptr": "*fp32"}
    if groups == 1:
        others["second_ptr"] = None
    label = f"column_sum-H{columns}-groups{groups}"
    return fused_variant(label, column_sum_kernel, dtype, others, constants, 4)


def cases() -> tuple[tuple[int, str], ...]:
    """Returns pairs (hidden size, kind of norm), one for each tile configuration of the tables."""
    larger = {size: "add_rms" for size in FORWARD if size > max(NORMS)}
    return tuple((NORMS | larger).items())


def kernel_variants() -> Iterator[KernelVariant]:
    """Yields a variant of each tile configuration in bf16, and one in float32."""
    for columns, norm in cases():
        yield forward_variant(columns, norm)
        yield backward_variant(columns, norm)
    yield forward_variant(1024, "add_rms", "fp32")
    yield backward_variant(1024, "add_rms", "fp32")
    yield column_sum_variant(2048)
    yield column_sum_variant(2048, groups=2)
