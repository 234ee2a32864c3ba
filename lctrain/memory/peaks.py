"""layer_peaks: predicts the activations on the GPU while a step is at each checkpointed layer."""

from __future__ import annotations

from collections.abc import Sequence

from lctrain.memory.layers import DEVICE, HOST, REBUILT, RECOMPUTE, LayerPolicy
from lctrain.memory.profile import LayerBytes
from lctrain.memory.store import MOST_WAITING


def layer_peaks(layers: Sequence[LayerBytes], policies: Sequence[LayerPolicy]) -> list[int]:
    """Returns the most bytes of activations while forward or backward is at each layer.

    The backward goes from the last layer to the first, and frees what a layer kept once that layer
    is done. While it is at a layer, the GPU holds:

    - what this layer and all earlier layers keep there;
    - the inputs of the segment up to this layer, copied from the host or rebuilt, and the attention
      that these layers reuse;
    - the layer's attention outputs, if they come from the host;
    - for a layer with tensors on the host, those of the last layer before with such tensors, which
      are prefetched;
    - the gradient of the layer's output, and the layer's recomputation and backward.

    The backward of a segment begins with the run that rebuilds its inputs. It counts at the
    segment's last layer.

    Args:
        layers: Bytes of every layer.
        policies: LayerPolicy of every layer.
    """
    peaks: list[int] = []
    kept = moved = 0  # bytes on the GPU until the backward; largest tensor that moves to the host
    held = rebuilding = 0  # of the segment: bytes held in its backward, and in its rebuilding run
    ahead = 0  # bytes on the host that the next layer with such tensors prefetches
    ahead_input = 0  # the input among them, which is left out within its own segment
    waiting = 0  # tensors whose copies to the host have not ended
    for layer, policy in zip(layers, policies, strict=True):
        if policy.inputs != RECOMPUTE:  # a segment begins
            held = rebuilding = 0
            ahead, ahead_input = ahead + ahead_input, 0
        inputs = layer.inputs if policy.inputs != DEVICE else 0
        to_host = {
            "input": layer.inputs if policy.inputs == HOST else 0,
            "attention": layer.attention if policy.attention == HOST else 0,
        }
        kept += layer.inputs - inputs
        kept += layer.attention if policy.attention == DEVICE else 0
        held += inputs
        moved = max(moved, *to_host.values())
        waiting = MOST_WAITING if any(to_host.values()) else max(waiting - 1, 0)
        # Forward: the layer's input, and a tensor that waits for its copy to the host.
        most = inputs + moved * min(waiting, 1) + layer.forward
        fetched = to_host["attention"]
        if HOST in (policy.inputs, policy.attention):
            fetched += ahead
            ahead, ahead_input = to_host["attention"], to_host["input"]
        most = max(most, rebuilding + fetched)
        # The gradient of the segment's output exists during the run that rebuilds inputs.
        rebuilding = max(rebuilding, held + layer.forward + layer.inputs)
        held += layer.attention if policy.attention == REBUILT else 0
        again = layer.attention if policy.attention != RECOMPUTE else 0
        backward = layer.backward - again + layer.inputs  # + the gradient of the layer's output
        peaks.append(kept + max(most, held + fetched + backward))
    return peaks
