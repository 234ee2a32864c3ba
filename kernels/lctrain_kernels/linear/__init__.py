"""Linear layers: additions inside matrix products, and bits that do not depend on the batch."""

from lctrain_kernels.linear.api import batch_invariant_linear, linear_add, merged_linear

__all__ = ["batch_invariant_linear", "linear_add", "merged_linear"]
