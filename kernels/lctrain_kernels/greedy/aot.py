"""Lists the kernel of the most probable token for ahead-of-time compilation."""

from collections.abc import Iterator

from lctrain_kernels.greedy.launch import BLOCK, NUM_WARPS
from lctrain_kernels.greedy.triton_kernels import most_probable_kernel
from lctrain_kernels.tile.variant import KernelVariant, describe_variant


def most_probable_variant(dtype: str = "bf16") -> KernelVariant:
    """Describes one compilation of most_probable_kernel.

    Args:
        dtype: Triton's name of the logits' dtype, such as "bf16".
    """
    types = {
        "logits_ptr": f"*{dtype}",
        "tokens_ptr": "*i64",
        "log_probs_ptr": "*fp32",
        **dict.fromkeys(("stride", "num_words"), "i32"),
    }
    options = {"num_warps": NUM_WARPS, "enable_fp_fusion": True}
    return describe_variant(
        f"most_probable-{dtype}",
        most_probable_kernel,
        types,
        {"BLOCK": BLOCK},
        options,
        spill_free=True,
        multiplies=False,
    )


def kernel_variants() -> Iterator[KernelVariant]:
    """Yields the variants to compile: logits in half precision, and in float32."""
    yield most_probable_variant()
    yield most_probable_variant("fp32")
