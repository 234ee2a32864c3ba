"""Lists the kernels of linear layers that CI compiles ahead of time."""

from collections.abc import Iterator

from lctrain_kernels.linear.launch_config import TABLES, LinearTile
from lctrain_kernels.linear.triton_kernels import batch_invariant_linear_kernel
from lctrain_kernels.tile.arguments import DOT_PRECISION
from lctrain_kernels.tile.variant import KernelVariant, describe_variant


def linear_variant(
    tile: LinearTile, dtype: str = "bf16", *, has_bias: bool = False, even: bool = True
) -> KernelVariant:
    """Describes one compilation of batch_invariant_linear_kernel.

    Args:
        tile: The tile.
        dtype: Triton's name of the tensors' dtype, such as "bf16".
        has_bias: Whether a bias is added.
        even: Whether the tile's block_k divides the width.
    """
    types = {
        **dict.fromkeys(("x_ptr", "weight_ptr", "out_ptr"), f"*{dtype}"),
        "bias_ptr": f"*{dtype}" if has_bias else None,
        **dict.fromkeys(("num_rows", "columns", "width", "stride_out"), "i32"),
    }
    constants = {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "GROUP": tile.group,
        "EVEN_K": even,
        "STAGES": tile.stages,
        "PRECISION": DOT_PRECISION,
    }
    options = {"num_warps": tile.num_warps, "enable_fp_fusion": True}
    name = f"batch_invariant_linear-{tile.block_m}x{tile.block_n}"
    name += ("-bias" if has_bias else "") + ("" if even else "-odd")
    return describe_variant(
        f"{name}-{dtype}", batch_invariant_linear_kernel, types, constants, options, spill_free=True
    )


def kernel_variants() -> Iterator[KernelVariant]:
    """Yields the variants to compile: the portable tile first, then every tile of the tuned GPU."""
    portable, tuned = TABLES["sm_80"], TABLES["sm_90"]
    yield linear_variant(portable.wide)
    for tile in (tuned.wide, tuned.narrow, tuned.few):
        assert tile is not None
        yield linear_variant(tile)
    yield linear_variant(tuned.wide, has_bias=True)
    yield linear_variant(tuned.wide, even=False)
    yield linear_variant(TABLES["float32"].wide, "fp32")
