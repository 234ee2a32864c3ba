"""Refuses padding between the tokens of a document for models that attend within windows."""

from typing import Any

import torch

from lctrain.attention.boundaries import Boundaries, find_places
from lctrain.attention.spec import AttentionSpec
from lctrain.models.architectures import has_windows


def row_length_within_windows(model: Any, spec: AttentionSpec) -> int | None:
    """Returns the length up to which rows lie within a window; None if no layer has windows.

    Args:
        model: A transformers model.
        spec: Options of its attention.
    """
    chosen = getattr(spec, "sliding_window", None)
    if chosen is None and not has_windows(model):
        return None
    window = getattr(model.config, "sliding_window", None) if chosen is None else chosen
    return window // 2 if isinstance(window, int) else 0  # some layers halve the config's window


@torch.compiler.disable
def refuse_holes(boundaries: Boundaries, name: str) -> None:
    """Raises a ValueError if a document has padding between its tokens.

    The kernels' windows count tokens, and transformers' windows count padding too.

    Args:
        boundaries: Boundaries of documents in rows. On a GPU, this costs one synchronisation.
        name: Class name of the model, for the message.

    Raises:
        ValueError: if two tokens of a document are next to each other in the pack only.
    """
    if boundaries.indices_q is None:
        return
    document, _ = find_places(boundaries)
    if bool(((boundaries.indices_q.diff() != 1) & (document.diff() == 0)).any()):
        raise ValueError(
            f"attention_mask must have padding only at the ends of a row for {name}, whose windows "
            "count the tokens between query and key, got padding between tokens. Remove the "
            "padding from within the rows."
        )
