"""Lists the kernels of linear_cross_entropy that CI compiles ahead of time."""

from collections.abc import Iterator

import torch

from lctrain_kernels.cross_entropy.config import row_config
from lctrain_kernels.cross_entropy.rows import SCALE_BLOCK
from lctrain_kernels.cross_entropy.triton_kernels import row_pass_kernel, scale_kernel
from lctrain_kernels.tile.fused_variant import fused_variant
from lctrain_kernels.tile.variant import KernelVariant

PASSES = {"loss": (False, True), "statistics": (False, False), "gradient": (True, True)}
"""Pass -> reads_statistics, writes_gradient: the forward of a sum with its gradient, that of every
token's loss, and the backward of every token's loss."""
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_TYPES: dict[str, str | None] = {
    **dict.fromkeys(("statistics", "token_grad", "lse_grad"), "*fp32"),
    **dict.fromkeys(("softcap", "scale", "smoothing", "uniform", "z_loss"), "fp32"),
    "labels": "*i64",
}


def row_pass_variant(name: str, dtype: str = "bf16", *, everything: bool = False) -> KernelVariant:
    """Describes one compilation of row_pass_kernel.

    Args:
        name: Kind of pass over the logits, a key of PASSES.
        dtype: Triton's name of the logits' dtype, such as "bf16".
        everything: Whether to include bias, softcap and label smoothing. A pass that writes the
            gradient then also takes the gradient of the logsumexp.
    """
    reads_statistics, writes_gradient = PASSES[name]
    config = row_config(_DTYPES[dtype])
    absent = [] if everything else ["bias"]
    if not reads_statistics:
        absent.append("token_grad")
    if not (reads_statistics and everything):
        absent.append("lse_grad")
    constants = {
        "BLOCK": config.block,
        "STAGES": config.stages,
        "HAS_SOFTCAP": everything,
        "HAS_SMOOTHING": everything,
        "READS_STATISTICS": reads_statistics,
        "WRITES_GRADIENT": writes_gradient,
    }
    label = f"row_pass-{name}-all" if everything else f"row_pass-{name}"
    others = _TYPES | dict.fromkeys(absent)
    return fused_variant(
        label, row_pass_kernel, dtype, others, constants, config.num_warps, not everything
    )


def scale_variant(dtype: str = "bf16") -> KernelVariant:
    """Describes one compilation of scale_kernel, which converts float32 sums to `dtype`."""
    others = {"x_ptr": "*fp32", "factor_ptr": "*fp32"}
    return fused_variant("scale", scale_kernel, dtype, others, {"BLOCK": SCALE_BLOCK}, 8)


def kernel_variants() -> Iterator[KernelVariant]:
    """Yields the variants to compile: every pass in bf16 (plain and full), and one in float32."""
    for name in PASSES:
        yield row_pass_variant(name, everything=True)
        yield row_pass_variant(name)
    yield row_pass_variant("loss", "fp32")
    yield scale_variant()
