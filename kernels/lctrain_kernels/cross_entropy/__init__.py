"""Linear projection and cross-entropy in one operation."""

from lctrain_kernels.cross_entropy.api import linear_cross_entropy
from lctrain_kernels.cross_entropy.options import VocabularyShard

__all__ = ["VocabularyShard", "linear_cross_entropy"]
