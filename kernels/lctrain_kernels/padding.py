"""Converts padded rows [B, S, ...] to packed tokens [T, ...] and back, as in FlashAttention."""

import torch
from torch import Tensor


def unpad_input(
    hidden_states: Tensor,
    attention_mask: Tensor,
    unused_mask: Tensor | None = None,
    *,
    num_tokens: int | None = None,
    max_seqlen: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Drops the padding of rows and returns the packed tokens with their boundaries.

    The function synchronises with the GPU only if the mask is on a GPU and `num_tokens` or
    `max_seqlen` is missing, because it then reads the number of tokens from the mask.

    Args:
        hidden_states: Padded rows [B, S, ...].
        attention_mask: [B, S] bool or int, 1 where a token is real.
        unused_mask: [B, S], 1 where a token is allocated but unused. Unused tokens are kept in the
            output, and are not counted in the real lengths.
        num_tokens: Number of ones in both masks together, if known.
        max_seqlen: Largest number of ones in a row, if known.

    Returns:
        Packed tokens [T, ...]; indices [T] int64 of these tokens in the flattened rows [B * S];
        cu_seqlens [B + 1] int32; the longest length (int); and the real lengths [B] int32.

    Raises:
        ValueError: if the mask is not [B, S], or has values other than 0 and 1. With `num_tokens`
            on a GPU the values are not checked.
    """
    if attention_mask.shape != hidden_states.shape[:2]:
        raise ValueError(
            f"attention_mask must have shape {tuple(hidden_states.shape[:2])}, got "
            f"{tuple(attention_mask.shape)}. Pass the [batch, tokens] padding mask."
        )
    readable = attention_mask.device.type == "cpu" or num_tokens is None
    if readable and bool(((attention_mask != 0) & (attention_mask != 1)).any()):
        raise ValueError(
            f"attention_mask must hold 0 and 1 only, got {float(attention_mask.min()):g} to "
            f"{float(attention_mask.max()):g}. Pass one row per document, or cu_seqlens."
        )
    real = attention_mask.bool()
    kept = real if unused_mask is None else real | unused_mask.bool()
    lengths = kept.sum(dim=-1, dtype=torch.int32)
    if num_tokens is None:
        indices = kept.flatten().nonzero().flatten()
    else:
        indices = torch.nonzero_static(kept.flatten(), size=num_tokens).flatten()
    max_seqlen = int(lengths.max()) if max_seqlen is None else max_seqlen
    device = hidden_states.device
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    indices = indices.to(device, non_blocking=True)
    return (
        hidden_states.flatten(0, 1).index_select(0, indices),
        indices,
        cu_seqlens.to(device, non_blocking=True),
        max_seqlen,
        real.sum(dim=-1, dtype=torch.int32).to(device, non_blocking=True),
    )


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """Puts packed tokens back into rows. The padding is zero.

    Args:
        hidden_states: Packed tokens [T, ...].
        indices: Indices [T] int64 that unpad_input returned.
        batch: Batch size B.
        seqlen: Row length S, in tokens.

    Returns:
        Padded rows [B, S, ...].
    """
    rows = hidden_states.new_zeros((batch * seqlen, *hidden_states.shape[1:]))
    return rows.index_copy(0, indices, hidden_states).unflatten(0, (batch, seqlen))


def pad_head_dim(x: Tensor) -> Tensor:
    """Pads the head dim of x [T, H, D] with zeros to a multiple of 8; the result has last stride 1.

    Half-precision rows then have a multiple of 16 bytes, as TMA and vector loads need.
    """
    if x.shape[2] % 8:
        return torch.nn.functional.pad(x, (0, -x.shape[2] % 8))
    return x if x.stride(2) == 1 else x.contiguous()
