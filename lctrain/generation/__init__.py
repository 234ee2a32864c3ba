"""Generation on the weights that are being trained, for evaluation and rollouts."""

from lctrain.generation.generate import generate
from lctrain.generation.options import Completion, SamplingOptions
from lctrain.generation.trainer_pass import completion_packs

__all__ = ["Completion", "SamplingOptions", "completion_packs", "generate"]
