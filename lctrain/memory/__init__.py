"""Memory of a training step: policies of what is kept, offloaded or recomputed, and their plan."""

from lctrain.memory.layers import LayerCheckpoints, LayerPolicy
from lctrain.memory.plan import Plan, plan
from lctrain.memory.policy import use_policy

__all__ = ["LayerCheckpoints", "LayerPolicy", "Plan", "plan", "use_policy"]
