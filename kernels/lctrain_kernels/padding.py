"""unpad_input and pad_input, as in FlashAttention: rows [B, S, ...], packed tokens [T, ...]."""

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
    """Drops padding.

    How many tokens remain is data: it is read from the mask. With a mask on the CPU, or with
    `num_tokens` and `max_seqlen` given, no synchronisation happens; with a mask on a GPU and
    neither, one does.

    Args:
        hidden_states: [B, S, ...].
        attention_mask: [B, S] bool or int, 1 where a token is real.
        unused_mask: [B, S], 1 for allocated but unused tokens. They are kept in the output and not
            counted in the last element.
        num_tokens: Number of ones in both masks together, if known.
        max_seqlen: Largest number of ones in a row, if known.

    Returns:
        Packed tokens [T, ...], indices [T] int64 into the flattened rows, cu_seqlens [B + 1] int32,
        the longest length (int), and the real lengths [B] int32.

    Raises:
        ValueError: if the mask does not have the first two dimensions of hidden_states, or has
            other values than 0 and 1. Values are read unless `num_tokens` is given on a GPU.
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
    """Puts packed tokens back into rows; padding is zero.

    Args:
        hidden_states: [T, ...].
        indices: [T] int64 from unpad_input.
        batch: B.
        seqlen: S.

    Returns:
        [B, S, ...].
    """
    rows = hidden_states.new_zeros((batch * seqlen, *hidden_states.shape[1:]))
    return rows.index_copy(0, indices, hidden_states).unflatten(0, (batch, seqlen))


def pad_head_dim(x: Tensor) -> Tensor:
    """Pads the last of [T, H, D] to a multiple of 8 (16-byte rows); guarantees last stride 1."""
    if x.shape[2] % 8:
        return torch.nn.functional.pad(x, (0, -x.shape[2] % 8))
    return x if x.stride(2) == 1 else x.contiguous()
