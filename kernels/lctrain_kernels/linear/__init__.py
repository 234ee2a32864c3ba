"""Linear layers whose additions happen inside matrix products."""

from lctrain_kernels.linear.api import linear_add, merged_linear

__all__ = ["linear_add", "merged_linear"]
