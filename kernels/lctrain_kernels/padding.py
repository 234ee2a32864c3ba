"""Converts padded rows [B, S, ...] to packed tokens [T, ...] and back, as in FlashAttention."""

import torch
from torch import Tensor

from lctrain_kernels.checks import has_values, require_tensors


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
        TypeError: if an argument is no tensor.
        ValueError: if a mask is not [B, S], or has values other than 0 and 1, or if `num_tokens` or
            `max_seqlen` is wrong. With `num_tokens` on a GPU the values are only checked if
            LCTRAIN_CHECK_CACHE=1 is set.
    """
    require_tensors(hidden_states=hidden_states, attention_mask=attention_mask)
    for name, mask in (("attention_mask", attention_mask), ("unused_mask", unused_mask)):
        if mask is not None:
            _check_mask(name, mask, hidden_states, read=num_tokens is None)
    real = attention_mask.bool()
    kept = real if unused_mask is None else real | unused_mask.bool()
    lengths = kept.sum(dim=-1, dtype=torch.int32)
    if has_values(lengths):
        _check_counts(lengths, num_tokens, max_seqlen)
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

    Raises:
        TypeError: if an argument is no tensor.
        ValueError: if a size is negative, or an index is outside of the rows. Indices on a GPU are
            only checked if LCTRAIN_CHECK_CACHE=1 is set.
    """
    require_tensors(hidden_states=hidden_states, indices=indices)
    for name, size in (("batch", batch), ("seqlen", seqlen)):
        is_int = isinstance(size, int | torch.SymInt) and not isinstance(size, bool)
        if not is_int or size < 0:
            raise ValueError(f"{name} must be an int of at least 0, got {size!r}. Pass the shape.")
    if indices.dtype != torch.int64 or indices.shape != hidden_states.shape[:1]:
        raise ValueError(
            f"indices must be int64 of shape ({hidden_states.shape[0]},), got {indices.dtype} of "
            f"shape {tuple(indices.shape)}. Pass what unpad_input returned."
        )
    if has_values(indices) and indices.numel():
        low, high = (int(end) for end in indices.aminmax())
        if low < 0 or high >= batch * seqlen:
            raise ValueError(
                f"indices must be from 0 to {batch * seqlen - 1} for {batch} rows of {seqlen} "
                f"tokens, got {low} to {high}. Pass what unpad_input returned."
            )
    rows = hidden_states.new_zeros((batch * seqlen, *hidden_states.shape[1:]))
    return rows.index_copy(0, indices, hidden_states).unflatten(0, (batch, seqlen))


def _check_mask(name: str, mask: Tensor, hidden_states: Tensor, read: bool) -> None:
    """Raises unless a mask is [B, S], and, where its values are read, holds 0 and 1 only.

    Args:
        name: Name of the argument, for the message.
        mask: The mask.
        hidden_states: Padded rows [B, S, ...].
        read: Whether the caller reads the mask on a GPU, too.
    """
    require_tensors(**{name: mask})
    if mask.shape != hidden_states.shape[:2]:
        raise ValueError(
            f"{name} must have shape {tuple(hidden_states.shape[:2])}, got {tuple(mask.shape)}. "
            "Pass the [batch, tokens] padding mask."
        )
    if (read or has_values(mask)) and bool(((mask != 0) & (mask != 1)).any()):
        raise ValueError(
            f"{name} must hold 0 and 1 only, got {float(mask.min()):g} to {float(mask.max()):g}. "
            "Pass one row per document, or cu_seqlens."
        )


def _check_counts(lengths: Tensor, num_tokens: int | None, max_seqlen: int | None) -> None:
    """Raises if a count that the caller knows differs from that of the masks."""
    total, longest = int(lengths.sum()), int(lengths.max()) if lengths.numel() else 0
    if num_tokens is not None and num_tokens != total:
        raise ValueError(
            f"num_tokens must be the ones in both masks, {total}, got {num_tokens}. Count them, or "
            "leave it out."
        )
    if max_seqlen is not None and max_seqlen < longest:
        raise ValueError(
            f"max_seqlen must be at least {longest}, the longest row, got {max_seqlen}. Count the "
            "ones of each row, or leave it out."
        )


def pad_head_dim(x: Tensor) -> Tensor:
    """Pads the head dim of x [T, H, D] with zeros to a multiple of 8; the result has last stride 1.

    Half-precision rows then have a multiple of 16 bytes, as TMA and vector loads need.
    """
    if x.shape[2] % 8:
        return torch.nn.functional.pad(x, (0, -x.shape[2] % 8))
    return x if x.stride(2) == 1 else x.contiguous()
