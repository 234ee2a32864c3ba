"""Memory of a training step: policies of what is kept, offloaded or recomputed."""

from lctrain.memory.layers import LayerCheckpoints, LayerPolicy
from lctrain.memory.policy import use_policy

__all__ = ["LayerCheckpoints", "LayerPolicy", "use_policy"]
