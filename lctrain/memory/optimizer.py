"""Counts the bytes of an optimizer's states, on the device and on the host."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lctrain.config.optim import HOST_ADAMW
from lctrain.memory.quantized import stored_bytes

ADAMW = "torch.optim.AdamW"
_EIGHT_BITS = ("torchao.optim.Adam8bit", "torchao.optim.AdamW8bit")
_HOST_BYTES = 12  # for each weight: two moments and the copy, in float32
_BLOCK = 256  # elements of torchao's 8-bit moments that share a float32 scale
_SMALLEST = 4096  # elements of a weight from which torchao's moments have 8 bits


def optimizer_bytes(parameters: Sequence[Tensor], target: str = ADAMW) -> tuple[int, int]:
    """Returns the bytes of an optimizer's states on the device and on the host.

    An optimizer that this module does not know counts as AdamW: two moments in the weights' dtype.

    Args:
        parameters: The trained weights.
        target: Dotted name of the optimizer's class.
    """
    if target == HOST_ADAMW:
        counts = [parameter.numel() for parameter in parameters]
        return 0, _HOST_BYTES * sum(counts) + 4 * max(counts, default=0)  # and one gradient
    of_one = _eight_bits if target in _EIGHT_BITS else stored_bytes
    return 2 * sum(map(of_one, parameters)), 0


def _eight_bits(parameter: Tensor) -> int:
    """Returns the bytes of one moment of torchao's 8-bit optimizers, with its scales and table."""
    count = parameter.numel()
    if count < _SMALLEST or count % _BLOCK:
        return stored_bytes(parameter)
    return count + 4 * (count // _BLOCK) + 4 * 256
