"""flash_attention_mask: the mask function that transformers calls before the first layer."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lctrain.attention.cached import left_padded_rows

UNPATCH = (
    "Call unpatch() on the handle of patch_model first, or load the model with another "
    "attn_implementation."
)


@torch.compiler.disable
def read_mask(mask: Tensor, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Reads a 2-D attention mask, which marks padding by 0 and may number the documents.

    Numbers above 1 number the documents of a row: `1 1 1 2 2 3 0` is a row of three documents and
    one token of padding. Multipack collators use this convention.

    Args:
        mask: [B, S] bool, integers or floats.
        device: Device of the result.

    Returns:
        [B, S] bool, True at tokens that are not padding; and [B, S] int64, the number of each
        token's document, 0 at padding. The second is None if no number exceeds 1.

    Raises:
        ValueError: if a value is negative or not an integer (as in an additive mask), or if a
            document is not in one piece.
    """
    real = mask.to(device=device, dtype=torch.bool)
    if mask.dtype == torch.bool or mask.numel() == 0:
        return real, None
    numbers = mask.to(device=device)
    low, high = float(numbers.min()), float(numbers.max())
    whole = not numbers.is_floating_point() or (
        high > 0.0 and math.isfinite(high) and not bool((numbers != numbers.round()).any())
    )
    if not whole:
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
    """Returns whether a document number occurs in several separate parts of a row [B, S]."""
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
    """Returns the mask that layers get: a padding mask, or the number of each token's document.

    A mask of S x Sk pairs of query and key is never computed.

    Args:
        batch_size: Number of rows B.
        q_length: Queries per row, S.
        kv_length: Keys per row, Sk.
        q_offset: Position of the first query; a tensor with a cache of fixed size.
        kv_offset: Position of the first key.
        mask_function: transformers' function (batch, head, query, key) -> whether the query sees
            the key.
        attention_mask: [B, tokens] bool, True at tokens that are not padding. Column 0 is the first
            token of the row.
        allow_is_causal_skip: True if the mask is causal and has no other condition.
        allow_is_bidirectional_skip: True if every query sees every key that is not padding.
        use_vmap: True if the model adds a mask of its own.
        device: Device of the layers.

    Returns:
        None if each row is one document without padding; [B, Sk] bool, True at keys that are not
        padding, for padded rows; [B, S] int64, the number of each token's document from 1, for
        packed rows; the result of `cached_rows` for a cache of fixed size. A layer with a window
        may have a part of the row in its cache, and `cached_rows` counts from its first column.

    Raises:
        ValueError: if boundaries of documents cannot express the mask, or a cache of fixed size has
            padding after a token.
    """
    longer = isinstance(q_offset, Tensor) or q_offset + q_length != kv_offset + kv_length
    # transformers forbids this skip for one query over a cache that it may compile.
    compiles = q_length == 1 and not allow_is_causal_skip
    cached = (longer or compiles) and not use_vmap
    if cached and (_is_causal(mask_function) or _is_window(mask_function)):
        columns = None if attention_mask is None else attention_mask[:, kv_offset:]
        return left_padded_rows(columns, batch_size, q_offset + q_length - kv_offset, device)
    plain = allow_is_causal_skip or allow_is_bidirectional_skip
    if use_vmap or (attention_mask is not None and not plain and not isinstance(q_offset, Tensor)):
        raise ValueError(
            "the mask must be causal or full, with windows, padding or packing, got one that the "
            "model extends by a pattern of its own (prefix, image or block mask), or chunks in a "
            f"cache of fixed size. Use a DynamicCache for chunks. {UNPATCH}"
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
        # A sliding-window layer may cache only the last keys, fewer than the mask has columns.
        return attention_mask[:, kv_offset : kv_offset + kv_length]
    if plain or mask_function is None:
        return None
    return _packed_segments(mask_function, batch_size, q_length, device)


def _is_causal(mask_function: Callable | None) -> bool:
    """Returns whether a mask function of transformers is the plain causal one, without a window."""
    from transformers.masking_utils import causal_mask_function

    return mask_function is causal_mask_function


def _is_window(mask_function: Callable | None) -> bool:
    """Returns whether a mask function of transformers is causal with a window, and nothing else."""
    if getattr(mask_function, "__qualname__", "") != "and_masks.<locals>.and_mask":
        return False
    (parts,) = (cell.cell_contents for cell in mask_function.__closure__)  # type: ignore[union-attr]
    names = [getattr(part, "__qualname__", "") for part in parts]
    windows = [name.startswith("sliding_window_overlay.") for name in names]
    return len(parts) == 2 and any(windows) and any(map(_is_causal, parts))


def _packed_segments(
    mask_function: Callable, batch_size: int, length: int, device: torch.device | str
) -> Tensor:
    """Returns the number of each token's document from 1, [B, S] int64.

    A document begins at a token that does not see the token before it.
    """
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
