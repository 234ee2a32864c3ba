"""Finds how many positions a model with a position table supports."""

import re
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from lctrain.attention.boundaries import Boundaries, find_positions
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
        if _is_table(name, module):
            limits.append(module.num_embeddings - _offset(model, module))
        if _RELATIVE.search(name.rpartition(".")[2]):
            continue
        table = getattr(module, "pos_encoding", None)  # sinusoids in a tensor, as in CTRL
        if isinstance(table, Tensor):
            limits.append(table.shape[0])
    return min(limits, default=None)


def first_position(model: nn.Module) -> int:
    """Returns the position id that a model gives to the first token of a document.

    Args:
        model: A transformers model. Models like RoBERTa count from padding_idx + 1, others from 0.
    """
    if not counts_positions_itself(model):
        return 0
    tables = (module for name, module in model.named_modules() if _is_table(name, module))
    return max((_offset(model, table) for table in tables), default=0)


@torch.compiler.disable
def require_first_position(
    model: nn.Module, position_ids: Tensor, boundaries: Boundaries, first: int
) -> None:
    """Raises a ValueError unless the position ids of every document begin at `first`.

    For one rank's share of a pack, all position ids are checked, since documents begin on other
    ranks too: so all ranks raise the error. Synchronises with the device.

    Args:
        model: A transformers model, named in the message.
        position_ids: [B, S] or [1, S] integers.
        boundaries: Boundaries of the documents in rows [B, S], or of the pack of a share [1, S].
        first: `first_position(model)`.
    """
    positions = position_ids.expand(boundaries.queries).flatten()
    if boundaries.share is not None:
        begins = positions - find_positions(boundaries).flatten().to(positions.device)
    else:
        if boundaries.indices_q is not None:
            positions = positions[boundaries.indices_q.to(positions.device)]
        begins = positions[boundaries.pack.cu_seqlens_q[:-1].to(positions.device)]
    wrong = begins[begins != first]
    if wrong.numel():
        raise ValueError(
            f"position_ids must begin at {first} in every document of {type(model).__name__}, "
            f"which counts positions from there, got {int(wrong[0])}. Add {first} to position ids "
            "that count from 0, or pass padded rows with an attention_mask."
        )


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


def restarting_positions(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """Returns positions [1, T] int64 that restart at 0 in every document, without synchronising.

    Args:
        cu_seqlens: [N + 1] integers, boundaries of the documents.
        tokens: Number of tokens T.
    """
    lengths = cu_seqlens.diff()
    starts = torch.repeat_interleave(cu_seqlens[:-1], lengths, output_size=tokens)
    return (torch.arange(tokens, device=cu_seqlens.device) - starts)[None]


def _is_table(name: str, module: nn.Module) -> TypeGuard[nn.Embedding]:
    """Returns whether a module is a table of absolute positions."""
    own = name.rpartition(".")[2]
    return (
        isinstance(module, nn.Embedding)
        and _TABLE.search(own) is not None
        and _RELATIVE.search(own) is None
    )


def _offset(model: nn.Module, table: nn.Embedding) -> int:
    """Returns the row of the table that belongs to position 0."""
    if counts_positions_itself(model):
        return (table.padding_idx or 0) + 1  # as in RoBERTa
    return int(getattr(table, "offset", 0))  # as in OPT and BART
