"""Memory of a training step: which activations stay on the GPU, move to the host or are recomputed.

A memory policy makes this choice for every layer. A plan predicts the bytes of a step under a
policy.
"""

from lctrain.memory.layers import LayerCheckpoints, LayerPolicy
from lctrain.memory.plan import Plan, plan
from lctrain.memory.policy import use_policy
from lctrain.memory.reference import ReferenceModel

__all__ = ["LayerCheckpoints", "LayerPolicy", "Plan", "ReferenceModel", "plan", "use_policy"]
