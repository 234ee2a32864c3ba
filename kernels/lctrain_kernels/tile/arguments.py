"""Converts arguments of the public functions to arguments of the kernels."""

import triton
from torch import Tensor

from lctrain_kernels.options import AttentionOptions
from lctrain_kernels.tile.mask import UNBOUNDED

# Lengths, counts and windows change from batch to batch: specialising on them would recompile.
RUNTIME_INTEGERS = [
    "num_tiles",
    "total_q",
    "window_left",
    "window_right",
    "threshold",
    "stride_alibi",
    "chunk_length",
    "succ_length",
    "inter_position",
]

# float32 products are exact; half-precision inputs have one precision, whatever it is called
# (gfx950 does not know "tf32", also where it would not matter).
DOT_PRECISION = "ieee"


def token_head_strides(*tensors: Tensor | None) -> tuple[int, ...]:
    """Returns the strides of tokens and heads of tensors [T, H, D]; 0 and 0 for None."""
    return tuple(
        stride
        for tensor in tensors
        for stride in ((0, 0) if tensor is None else tensor.stride()[:2])
    )


def padded_head_dim(head_dim: int) -> int:
    """Returns the power of two that holds the head dim; matrix instructions need at least 16."""
    return max(16, triton.next_power_of_2(head_dim))


def window_arguments(options: AttentionOptions) -> tuple[Tensor | None, int, int, bool, bool]:
    """Returns (device window, left, right, has_left, has_right)."""
    if options.window is not None:
        return options.window, -1, -1, True, True
    left, right = (min(side, UNBOUNDED) for side in (options.window_left, options.window_right))
    return None, left, right, left >= 0, right >= 0


def dropout_arguments(dropout_p: float) -> tuple[int, float]:
    """Returns (threshold of 65,536, 1 / keep probability that is applied); reference/philox.py."""
    threshold = min(round(dropout_p * 65536), 65535)
    return threshold, 65536 / (65536 - threshold)


def alibi_strides(alibi_slopes: Tensor | None) -> int:
    """Distance between the slopes of two documents."""
    return alibi_slopes.stride(0) if alibi_slopes is not None and alibi_slopes.dim() == 2 else 0
