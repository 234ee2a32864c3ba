"""Generation on the weights that are being trained, for evaluation and rollouts."""

from lctrain.generation.generate import generate
from lctrain.generation.options import Completion, SamplingOptions

__all__ = ["Completion", "SamplingOptions", "generate"]
