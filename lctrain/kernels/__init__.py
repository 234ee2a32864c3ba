"""The public functions of the kernels, which live in the package `lctrain_kernels`.

    from lctrain.kernels import flash_attn_varlen_func

Names load on first use.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lctrain_kernels import (
        TileSchedule,
        diff_attn_varlen_func,
        dual_chunk_attn_varlen_func,
        flash_attn_func,
        flash_attn_varlen_func,
        linear_cross_entropy,
        make_schedule,
        merge_attn_states,
        pad_input,
        select_backend,
        unpad_input,
    )

__all__ = [
    "TileSchedule",
    "diff_attn_varlen_func",
    "dual_chunk_attn_varlen_func",
    "flash_attn_func",
    "flash_attn_varlen_func",
    "linear_cross_entropy",
    "make_schedule",
    "merge_attn_states",
    "pad_input",
    "select_backend",
    "unpad_input",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'lctrain.kernels' has no attribute {name!r}")
    import lctrain_kernels

    return getattr(lctrain_kernels, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
