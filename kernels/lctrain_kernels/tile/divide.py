"""Division in Triton kernels, correctly rounded for float32 data."""

import triton
import triton.language as tl


@triton.jit
def divide(x, y, dtype: tl.constexpr):
    """Returns x / y of two float32 tensors.

    Args:
        x: Dividends, float32.
        y: Divisors, float32, broadcastable to x.
        dtype: Dtype of the data in memory. For tl.float32, the quotient is correctly rounded (IEEE
            754), as in PyTorch. Otherwise Triton's faster division is used, which may be off by two
            units in the last place of float32; rounding to half precision hides that error.
    """
    if dtype == tl.float32:
        return tl.div_rn(x, y)
    else:
        return x / y
