"""Lists the kernels that choose a token for ahead-of-time compilation."""

from collections.abc import Iterator
from typing import Any

from lctrain_kernels.sampling.launch import BLOCK, NUM_WARPS, STAGES
from lctrain_kernels.sampling.triton_kernels import draw_kernel, most_probable_kernel
from lctrain_kernels.tile.variant import KernelVariant, describe_variant


def most_probable_variant(dtype: str = "bf16") -> KernelVariant:
    """Describes one compilation of most_probable_kernel.

    Args:
        dtype: Triton's name of the logits' dtype, such as "bf16".
    """
    return _variant(f"most_probable-{dtype}", most_probable_kernel, dtype, {})


def draw_variant(dtype: str = "bf16", *, has_top_p: bool = True) -> KernelVariant:
    """Describes one compilation of draw_kernel.

    Args:
        dtype: Triton's name of the logits' dtype, such as "bf16".
        has_top_p: Whether words are left out.
    """
    name = f"draw{'-top_p' if has_top_p else ''}-{dtype}"
    return _variant(name, draw_kernel, dtype, {"HAS_TOP_P": has_top_p})


def _variant(name: str, kernel: Any, dtype: str, constants: dict[str, object]) -> KernelVariant:
    types = {
        "logits_ptr": f"*{dtype}",
        "tokens_ptr": "*i64",
        **dict.fromkeys(("keys_ptr", "numbers_ptr"), "*i32"),
        "log_probs_ptr": "*fp32",
        **dict.fromkeys(("stride", "num_words"), "i32"),
        **dict.fromkeys(("scale", "top_p"), "fp32"),
    }
    options = {"num_warps": NUM_WARPS, "enable_fp_fusion": True}
    constants = {"BLOCK": BLOCK, "STAGES": STAGES, **constants}
    return describe_variant(
        name, kernel, types, constants, options, spill_free=dtype != "fp32", multiplies=False
    )


def kernel_variants() -> Iterator[KernelVariant]:
    """Yields the variants to compile: logits in half precision, and in float32."""
    yield most_probable_variant()
    yield most_probable_variant("fp32")
    yield draw_variant()
    yield draw_variant(has_top_p=False)
    yield draw_variant("fp32")
