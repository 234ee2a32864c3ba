"""The mask function of lctrain's attention: what transformers calls before the first layer."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

UNPATCH = (
    "Call unpatch() on the handle of patch_model first, or load the model with another "
    "attn_implementation."
)


@torch.compiler.disable
def read_mask(mask: Tensor, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Reads a 2-D attention mask: padding as 0 and 1, or the numbers of documents.

    Numbers above 1 are the multipack convention: `1 1 1 2 2 3 0` are three documents and padding.

    Args:
        mask: [B, S] bool, integers or floats.
        device: Device of the result.

    Returns:
        [B, S] bool, True at real tokens, and [B, S] int64 numbers, 0 at padding, or None where the
        mask numbers no documents.

    Raises:
        ValueError: for negative or broken numbers, an additive mask among them, and for a number
            that comes back after another one.
    """
    real = mask.to(device=device, dtype=torch.bool)
    if mask.dtype == torch.bool or mask.numel() == 0:
        return real, None
    numbers = mask.to(device=device)
    low, high = float(numbers.min()), float(numbers.max())
    if numbers.is_floating_point() and (high <= 0.0 or bool((numbers != numbers.round()).any())):
        raise ValueError(
            f"attention_mask must be 0 at padding and 1 at real tokens, got {numbers.dtype} values "
            f"from {low:g} to {high:g} (an additive mask?). Pass mask == 0 instead, a bool mask."
        )
    if low < 0:
        raise ValueError(
            f"attention_mask must be 0 at padding and 1 at real tokens, or number documents from "
            f"1, got {low:g}. Pass a mask without negative values."
        )
    if high <= 1:
        return real, None
    numbers = numbers.long()
    if _come_back(numbers):
        raise ValueError(
            "attention_mask must number documents that are in one piece, got a number that comes "
            "back after another one. Number the documents 1, 2, 3, ... from left to right."
        )
    return real, numbers


def _come_back(numbers: Tensor) -> bool:
    """Whether a row [S] of numbers [B, S] has one, 0 aside, in several pieces."""
    row = torch.arange(numbers.shape[0], device=numbers.device)[:, None].expand_as(numbers)
    tokens = torch.stack([row[numbers > 0], numbers[numbers > 0]])
    pieces = torch.unique_consecutive(tokens, dim=1)
    return pieces.shape[1] != torch.unique(pieces, dim=1).shape[1]


def flash_attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable | None = None,
    attention_mask: Tensor | None = None,
    *,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **_: object,
) -> Tensor | None:
    """Returns the padding mask or documents for the layers, never a mask of all pairs.

    Args:
        batch_size: Rows B.
        q_length: Queries per row.
        kv_length: Keys per row, Sk.
        q_offset: Position of the first query; a tensor for caches of fixed size.
        kv_offset: Position of the first key.
        mask_function: transformers' predicate (batch, head, query, key) -> visible.
        attention_mask: [B, tokens] bool, True at real tokens; of the row from its beginning.
        allow_is_causal_skip: True if the mask is causal and nothing else.
        allow_is_bidirectional_skip: True if the mask is all-visible and nothing else.
        use_vmap: True if the model adds a mask of its own.
        device: Device of the layers.

    Returns:
        None for rows that are a document each; [B, Sk] bool for padded rows; [B, S] int64 numbers
        of the documents, from 1, for packed rows.

    Raises:
        ValueError: for masks that cannot be expressed by boundaries, and for caches of fixed size.
    """
    plain = allow_is_causal_skip or allow_is_bidirectional_skip
    if use_vmap or (attention_mask is not None and not plain and not isinstance(q_offset, Tensor)):
        raise ValueError(
            "the mask must be causal or full, with windows, padding or packing, got one that the "
            f"model extends by a pattern of its own (prefix, image or block mask). {UNPATCH}"
        )
    fixed_size = isinstance(q_offset, Tensor) or (
        allow_is_causal_skip and q_offset + q_length != kv_offset + kv_length
    )
    if fixed_size:
        raise ValueError(
            "the key/value cache must hold exactly the tokens seen so far, got one of fixed size. "
            f"Use a DynamicCache. {UNPATCH}"
        )
    if attention_mask is not None:
        # A layer of a sliding window may hold the last keys only; a mask may go on behind them.
        return attention_mask[:, kv_offset : kv_offset + kv_length]
    if plain or mask_function is None:
        return None
    return _packed_segments(mask_function, batch_size, q_length, device)


def _packed_segments(
    mask_function: Callable, batch_size: int, length: int, device: torch.device | str
) -> Tensor:
    """Numbers documents [B, S]: one begins at a token that does not see its predecessor."""
    batch = torch.arange(batch_size, device=device)[:, None]
    head = torch.zeros((), dtype=torch.int64, device=device)
    token = torch.arange(length, device=device)[None]
    sees_predecessor = mask_function(batch, head, token[:, 1:], token[:, :-1])
    sees_successor = mask_function(batch, head, token[:, :-1], token[:, 1:])
    if not torch.compiler.is_compiling() and bool(sees_successor.any()):
        raise ValueError(
            "the mask must be causal in packed rows, got one that sees the future (an image or "
            f"block mask). {UNPATCH}"
        )
    sees_predecessor = sees_predecessor.expand(batch_size, length - 1)
    return F.pad((~sees_predecessor).cumsum(-1), (1, 0)) + 1
