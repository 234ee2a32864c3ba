"""Defines the dropout mask in PyTorch: a pure function of (seed, document, head, query i, key j).

Philox-4x32 with seven rounds (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC
2011) yields four 32-bit words per counter. Each attention weight takes 16 bits, so one draw serves
the eight weights ``i in {i0, i0 + 8}``, ``j in {j0, j0 + 8, j0 + 16, j0 + 24}``. In the accumulator
layout of NVIDIA's matrix instructions one thread holds these eight weights. So the kernels use
every bit without moving bits between threads. The definition does not depend on the size of tiles.

- Counter: (32-column group of j, 16-row group of i, head, document).
- Key: (low half of the seed, high half of the seed).
- Word of a weight: number 2 * bit3(i) + bit4(j) of the four; bit3(j) selects its half.
- A weight is kept if its 16 bits are at least round(p * 65536).
"""

import torch
from torch import Tensor

ROUNDS = 7
_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF


def dropout_threshold(dropout_p: float) -> int:
    """Returns the number of 16-bit values that drop a weight: ``round(p * 65536)``.

    The result is at most 65,535, so that no p below 1 drops every weight.
    """
    return min(round(dropout_p * 65536), 65535)


def keep_scale(dropout_p: float) -> float:
    """Returns the factor of kept weights, 1 / (keep probability after rounding to 1/65536)."""
    return 65536 / (65536 - dropout_threshold(dropout_p))


def philox(counters: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Computes Philox-4x32-7 random words from counters and a key.

    All tensors are int64, hold unsigned 32-bit values and broadcast.

    Args:
        counters: Four tensors, int64, each value in [0, 2^32).
        key: Two tensors, int64, each value in [0, 2^32).

    Returns:
        Four int64 tensors of the broadcast shape, each value in [0, 2^32).
    """
    c0, c1, c2, c3 = counters
    key_0, key_1 = key
    for _ in range(ROUNDS):
        # An int64 product wraps modulo 2^64, so its bits are those of the unsigned product.
        product_0, product_1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        c0, c1, c2, c3 = (
            ((product_1 >> 32) & _MASK) ^ c1 ^ key_0,
            product_1 & _MASK,
            ((product_0 >> 32) & _MASK) ^ c3 ^ key_1,
            product_0 & _MASK,
        )
        key_0, key_1 = (key_0 + _WEYL_0) & _MASK, (key_1 + _WEYL_1) & _MASK
    return list(torch.broadcast_tensors(c0, c1, c2, c3))


def dropout_keep(
    seed: int | Tensor,
    document_id: int,
    heads: Tensor,
    rows: Tensor,
    columns: Tensor,
    dropout_p: float,
) -> Tensor:
    """Returns which attention weights of one document are kept.

    Args:
        seed: 64-bit seed, an int or an int64 tensor of one element.
        document_id: Id of the document. It is part of Philox's counter, so that the mask does not
            depend on the pack.
        heads: Indices of query heads, [H] int64.
        rows: Query positions inside the document, [M] int64.
        columns: Key positions inside the document, [N] int64.
        dropout_p: Probability of dropping a weight, applied as ``round(p * 65536) / 65536``.

    Returns:
        [H, M, N] bool, True where the weight is kept.
    """
    device = rows.device
    seed = torch.as_tensor(seed, dtype=torch.int64, device=device).reshape(())
    row_groups, row_index = torch.unique((rows >> 4) * 8 + (rows & 7), return_inverse=True)
    column_groups, column_index = torch.unique(
        (columns >> 5) * 8 + (columns & 7), return_inverse=True
    )
    words = philox(
        (
            column_groups[None, None, :],
            row_groups[None, :, None],
            heads[:, None, None],
            torch.tensor(document_id, dtype=torch.int64, device=device) & _MASK,
        ),
        (seed & _MASK, (seed >> 32) & _MASK),
    )
    stacked = torch.stack(words)  # [4, H, row groups, column groups]
    word = 2 * ((rows >> 3) & 1)[:, None] + ((columns >> 4) & 1)[None, :]
    half = ((columns >> 3) & 1)[None, :]
    head_index = torch.arange(len(heads), device=device)[:, None, None]
    draws = stacked[word, head_index, row_index[:, None], column_index[None, :]]
    return ((draws >> (16 * half)) & 0xFFFF) >= dropout_threshold(dropout_p)
