"""Reads and checks the arguments of a call that continues the rows of a filled key/value cache."""

from typing import Any

import torch
from torch import Tensor

from lctrain.attention.boundaries import find_segments
from lctrain.attention.mask import read_mask
from lctrain.models.cache import given_cache


def refuse_numbers(mask: Any) -> None:
    """Raises a ValueError if an attention mask numbers documents.

    Args:
        mask: Attention mask of a call with a filled cache.
    """
    if isinstance(mask, Tensor) and mask.dim() == 2 and read_mask(mask, mask.device)[1] is not None:
        raise ValueError(
            "attention_mask must be 0 or 1 on top of a filled key/value cache, got numbers of "
            "documents. Pass use_cache=False and no past_key_values."
        )


def continued_lengths(inputs: dict[str, Any], tokens: Tensor) -> Tensor:
    """Returns the length of each token's row, cached tokens included, [B, S] int64.

    With position ids, the length is the row's highest position plus 1.

    Args:
        inputs: Keyword arguments of the model, with a filled cache.
        tokens: [B, S, ...], tokens or embeddings of the call.
    """
    rows = tuple(tokens.shape[:2])
    seen = int(given_cache(inputs).get_seq_length())
    position_ids, mask = inputs.get("position_ids"), inputs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[1] < seen + rows[1]:
        mask = torch.ones((rows[0], seen + rows[1]), dtype=torch.bool, device=tokens.device)
    real = mask[:, : seen + rows[1]].to(device=tokens.device, dtype=torch.bool)
    if position_ids is None:
        lengths = real.sum(1)
    else:
        position_ids = position_ids.amax(0) if position_ids.dim() == 3 else position_ids
        positions = position_ids.to(tokens.device).expand(rows)
        lengths = positions.masked_fill(~real[:, seen:], 0).amax(1) + 1
    return lengths[:, None].expand(rows)


def is_filled(cache: Any) -> bool:
    """Returns whether a key/value cache holds tokens; False for None."""
    return cache is not None and cache.get_seq_length() > 0


def refuse_restart(inputs: dict[str, Any], tokens: int) -> None:
    """Raises a ValueError if the position ids of a call with a filled cache restart.

    Args:
        inputs: Keyword arguments of the model.
        tokens: Tokens per row of the call.
    """
    position_ids, mask = inputs.get("position_ids"), inputs.get("attention_mask")
    if position_ids is None or position_ids.dim() != 2 or tokens == 1:
        return
    if isinstance(mask, Tensor) and mask.dim() == 2:
        seen = int(given_cache(inputs).get_seq_length())
        if mask.shape[1] < seen + tokens:
            return  # such a mask is refused by the attention function or DualChunkHook
        mask = mask[:, seen : seen + tokens].to(device=position_ids.device, dtype=torch.bool)
        position_ids = position_ids.expand(mask.shape[0], -1)
    if find_segments(position_ids, mask if isinstance(mask, Tensor) else None) is not None:
        raise ValueError(
            "position_ids must not restart on top of a filled key/value cache, got several "
            "documents in one row. Pass use_cache=False and no past_key_values."
        )
