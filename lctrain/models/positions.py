"""Finds how many positions a model supports that looks positions up in a table."""

import re
from typing import Any

from torch import Tensor, nn

from lctrain.models.architectures import counts_positions_itself

_TABLE = re.compile(r"(^|_)(wpe|pos|positions?)(_|$)")
_RELATIVE = re.compile(r"relative|distance|bias|type")


def position_limit(model: Any) -> int | None:
    """Returns the number of positions in a model's position table.

    Returns None for models that compute positions (RoPE, ALiBi). A higher position would index the
    table out of range, which on a GPU ends the process.

    Args:
        model: A transformers model on any device, the meta device included.
    """
    limits = []
    for name, module in model.named_modules():
        own = name.rpartition(".")[2]
        if _RELATIVE.search(own):
            continue
        if isinstance(module, nn.Embedding) and _TABLE.search(own):
            limits.append(module.num_embeddings - _offset(model, module))
        table = getattr(module, "pos_encoding", None)  # sinusoids in a tensor, as in CTRL
        if isinstance(table, Tensor):
            limits.append(table.shape[0])
    return min(limits, default=None)


def require_positions(
    model: Any, tokens: int, name: str, remedy: str, limit: int | None = None
) -> None:
    """Raises a ValueError if a document is longer than a model's position table.

    Args:
        model: A transformers model.
        tokens: Length of the longest document, in tokens.
        name: Name of `tokens` in the message.
        remedy: Last sentence of the message.
        limit: `position_limit(model)`; None computes it.
    """
    limit = position_limit(model) if limit is None else limit
    if limit is not None and tokens > limit:
        raise ValueError(
            f"{name} must be at most {limit}, the number of positions in the table of "
            f"{type(model).__name__}, got {tokens}. {remedy}"
        )


def _offset(model: nn.Module, table: nn.Embedding) -> int:
    """Returns the row of the table that belongs to position 0."""
    if counts_positions_itself(model):
        return (table.padding_idx or 0) + 1  # as in RoBERTa
    return int(getattr(table, "offset", 0))  # as in OPT and BART
