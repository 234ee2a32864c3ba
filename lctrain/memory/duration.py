"""Counts the operations of a training step under a memory policy, and estimates its time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from lctrain.memory.layers import REBUILT, RECOMPUTE, LayerPolicy
from lctrain.memory.profile import Profile

_BACKWARD_PRODUCTS = 2.5  # products of attention's backward for each product of its forward


@dataclass(frozen=True)
class Speed:
    """Speeds of a GPU in bfloat16, in operations a second.

    Attributes:
        attention_forward: Causal attention, forward.
        attention_backward: Causal attention, backward.
        products: Matrix products of the layers, with the element-wise operations beside them.
        head: Products of the output projection in the loss.
    """

    attention_forward: float
    attention_backward: float
    products: float
    head: float


# Name of a GPU and head dim -> its speeds. Attention of one document of 524,288 tokens; products
# from a step of 32,768 tokens of the 8B shape (results/memory/20261130-nvidia-h200.json).
SPEEDS = {("NVIDIA H200", 128): Speed(672e12, 530e12, 586e12, 650e12)}


def repeated(measured: Profile, policies: Sequence[LayerPolicy]) -> tuple[float, float]:
    """Returns the operations that the backward computes again: (attention, matrix products).

    Args:
        measured: Operations of a step, from `profile`.
        policies: LayerPolicy of every layer; empty if no layer is checkpointed.
    """
    attention = sum(policy.attention in (RECOMPUTE, REBUILT) for policy in policies)
    rebuilt = [
        before for before, policy in pairwise(policies) if policy.inputs == RECOMPUTE
    ]  # these layers run once more
    attention += sum(before.attention == RECOMPUTE for before in rebuilt)
    products = measured.other_operations * (len(policies) + len(rebuilt))
    return measured.attention_operations * attention, products


def step_seconds(measured: Profile, policies: Sequence[LayerPolicy], gpu: str) -> float | None:
    """Returns the expected time of a training step on one document, without the optimizer.

    Copies from and to the host are assumed to hide behind the computation.

    Args:
        measured: Operations of a step, from `profile`.
        policies: LayerPolicy of every layer; empty if no layer is checkpointed.
        gpu: Name of the GPU.

    Returns:
        Seconds; None if the speeds of this GPU are unknown for the model's head dim or precision.
    """
    speed = SPEEDS.get((gpu, measured.head_dim))
    if speed is None or not measured.in_bfloat16:
        return None
    count = len(measured.layers)
    attention, products = repeated(measured, policies)
    forward = measured.attention_operations * count
    once = 2 * measured.other_operations + measured.trained_operations + measured.tile_operations
    return (
        (forward + attention) / speed.attention_forward
        + _BACKWARD_PRODUCTS * forward / speed.attention_backward
        + (products + once * count) / speed.products
        + measured.head_operations / speed.head
    )
