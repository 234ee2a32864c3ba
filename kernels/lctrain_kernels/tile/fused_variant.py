"""Describes one compilation of a fused element-wise kernel for the ahead-of-time checks.

CI compiles these variants without a GPU.
"""

from collections.abc import Mapping
from typing import Any

import triton

from lctrain_kernels.tile.variant import KernelVariant, describe_variant


def fused_variant(
    label: str,
    kernel: triton.JITFunction,
    dtype: str,
    others: Mapping[str, str | None],
    constants: Mapping[str, object],
    num_warps: int,
    spill_free: bool = True,
) -> KernelVariant:
    """Describes one compilation of a kernel that has no matrix product.

    Args:
        label: Name in reports and tests; the dtype is appended.
        kernel: Kernel to compile.
        dtype: Triton's name of the dtype of all pointers that are not in `others`.
        others: Name of an argument, or of a field of a named tuple -> its type; None if it is not
            passed. Arguments that are neither in `others` nor pointers are i32.
        constants: Values of the constexprs.
        num_warps: Warps per program.
        spill_free: Whether the kernel must compile without register spills on the tuned GPU.
    """

    def kind(name: str, is_pointer: bool) -> str | None:
        return others.get(name, f"*{dtype}" if is_pointer else "i32")

    types: dict[str, Any] = {}
    for name in kernel.arg_names:
        fields = getattr(kernel.fn.__annotations__.get(name), "_fields", None)
        if fields is None:
            types[name] = kind(name, name.endswith("_ptr"))
        else:
            group = kernel.fn.__annotations__[name]
            types[name] = group._make(kind(field, name.endswith("pointers")) for field in fields)
    options = {"num_warps": num_warps, "enable_fp_fusion": True}
    return describe_variant(
        f"{label}-{dtype}", kernel, types, constants, options, spill_free, multiplies=False
    )
