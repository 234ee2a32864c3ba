"""Fuses the output projection of a language model with its cross-entropy loss."""

from lctrain_kernels.cross_entropy.api import linear_cross_entropy
from lctrain_kernels.cross_entropy.options import VocabularyShard

__all__ = ["VocabularyShard", "linear_cross_entropy"]
