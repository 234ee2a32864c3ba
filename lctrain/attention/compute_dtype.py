"""compute_dtype: the dtype in which attention computes, with and without autocast."""

from __future__ import annotations

import torch
from torch import Tensor

from lctrain_kernels.autocast import autocast_dtype


def compute_dtype(value: Tensor) -> torch.dtype:
    """Returns the dtype in which to attend: that of `value`, or autocast's for a float32 `value`.

    Under autocast, RoPE returns float32 queries and keys, while values already have autocast's
    dtype. A cache of transformers holds both in float32 then.

    Args:
        value: Values, of any shape.
    """
    dtype = autocast_dtype(value.device.type) if value.dtype == torch.float32 else None
    return dtype or value.dtype
