"""Linear layers whose additions (of gradients, of the residual) happen inside matrix products."""

from lctrain_kernels.linear.api import linear_add, merged_linear

__all__ = ["linear_add", "merged_linear"]
