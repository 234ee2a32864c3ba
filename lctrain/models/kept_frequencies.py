"""kept_frequencies: restores rotary frequencies that a forward pass chose by its length."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lctrain.models.frequencies import length_dependent


@contextmanager
def kept_frequencies(model: nn.Module) -> Iterator[None]:
    """Context manager: rotary frequencies are as before at its end.

    With the rope types 'dynamic' and 'longrope', transformers stores the frequencies of the longest
    input so far, and later inputs are rotated at them. An evaluation of long texts would change the
    training of a model that is not patched.

    Args:
        model: A transformers model.
    """
    kept = [
        (
            module,
            dict(module._buffers),
            {n: v for n, v in vars(module).items() if n.endswith("max_seq_len_cached")},
        )
        for module in length_dependent(model).values()
    ]
    try:
        yield
    finally:
        for module, buffers, lengths in kept:
            module._buffers.update(buffers)
            vars(module).update(lengths)
