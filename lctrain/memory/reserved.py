"""Estimates the GPU memory that a process takes beyond its tensors."""

from __future__ import annotations

from collections.abc import Sequence

from lctrain.memory.layers import DEVICE, HOST, REBUILT, RECOMPUTE, LayerPolicy
from lctrain.memory.profile import LayerBytes
from lctrain.memory.store import MOST_WAITING

CONTEXT = 2**30
"""Bytes for CUDA's context, its libraries and the code of the kernels."""
PAGE = 20 * 2**20
"""Bytes of a page of torch's expandable segments. A page with a byte in use stays reserved."""
HOLES = 2
"""Free blocks as large as the hidden states that expandable segments hold while the GPU has room.

They lie between kept tensors. The allocator gives them back before memory runs out, so a step does
not need them. One document of 524,288 tokens held 1.8 on an H200 (results/memory).
"""
SEGMENT = 2**21
"""Size to whose multiples torch rounds the segment of a large tensor."""
FIXED_LOSS = 0.8
"""Bytes that fixed segments lose for each byte of a tensor that outlives its layer.

Such a tensor is placed into the freed block of a larger temporary tensor, and the rest of that
block is too small for the next one. This is the loss with MLP tiles at 32,768 tokens on an H200
(results/memory/20261130-nvidia-h200.json); without tiles it was smaller (results/step).
"""


def allocator_bytes(
    layers: Sequence[LayerBytes],
    policies: Sequence[LayerPolicy],
    expandable: bool,
    scale: float = 1.0,
) -> int:
    """Returns the bytes that torch's allocator needs beyond the peak of the tensors.

    Args:
        layers: Bytes of every layer.
        policies: LayerPolicy of every layer; empty if no layer is checkpointed.
        expandable: Whether the allocator uses expandable segments.
        scale: Factor of all bytes.
    """
    if not policies:  # saved tensors are about as large as the layer's input
        large = [layer for layer in layers if scale * layer.inputs >= PAGE]
        return SEGMENT * sum(-(-layer.saved // layer.inputs) for layer in large)
    sizes = [layers[0].inputs]  # the hidden states between two layers
    on_host = 0
    for layer, policy in zip(layers, policies, strict=True):
        kept = [(layer.inputs, policy.inputs), (layer.attention, policy.attention)]
        sizes += [size for size, place in kept if place == DEVICE and size > 0]
        on_host += sum(place == HOST for _, place in kept)
    # Tensors on their way to the host, and back from it.
    sizes += [layers[0].inputs] * min(2 * MOST_WAITING, on_host)
    if any(policy.inputs == RECOMPUTE for policy in policies):
        sizes += [layers[0].inputs] * MOST_WAITING
    if any(policy.attention == REBUILT for policy in policies):
        sizes += [layers[0].attention] * MOST_WAITING
    if expandable:  # the last page of a tensor may hold nothing else; small tensors share pages
        return PAGE * sum(scale * size >= PAGE for size in sizes)
    return int(FIXED_LOSS * scale * sum(sizes))


def held_bytes(
    layers: Sequence[LayerBytes], policies: Sequence[LayerPolicy], expandable: bool
) -> int:
    """Returns the bytes of free blocks that the allocator holds while the GPU has room for them.

    Args:
        layers: Bytes of every layer.
        policies: LayerPolicy of every layer; empty if no layer is checkpointed.
        expandable: Whether the allocator uses expandable segments.
    """
    if not (policies and expandable):
        return 0  # the blocks of fixed segments count as lost
    return HOLES * max(layer.inputs for layer in layers)
