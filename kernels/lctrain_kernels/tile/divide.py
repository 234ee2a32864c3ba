"""Divides on the device, with correct rounding for float32 data."""

import triton
import triton.language as tl


@triton.jit
def divide(x, y, dtype: tl.constexpr):
    """Returns x / y of float32 values.

    If the data's dtype is float32, the quotient is correctly rounded (IEEE 754), as in PyTorch.
    Otherwise Triton's faster division is used, which may be off by two units in the last place of
    float32. Rounding to half precision hides that error.
    """
    if dtype == tl.float32:
        return tl.div_rn(x, y)
    else:
        return x / y
