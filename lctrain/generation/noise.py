"""Noise that is a function of seed, position and token: draw_keys, token_numbers, add_gumbel.

No generator has a state, so a CUDA graph can draw, and a request draws the same in every batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

KEYS = 3
"""Keys of 32 bits per row."""

_BITS = 64
_STEP = np.uint64(0x9E3779B97F4A7C15)
_FACTORS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_SHIFTS = (np.uint64(30), np.uint64(27), np.uint64(31))
_DRAWN_BITS = 31


def draw_keys(seeds: Sequence[int], positions: Sequence[int]) -> Tensor:
    """Returns the keys of a draw per row, [n, KEYS] int32 on the CPU.

    The finalizer of SplitMix64 (Steele, Lea, Flood 2014) mixes seed and position.

    Args:
        seeds: Seed of each row, an integer of 64 bits with or without sign.
        positions: Position of the token that is drawn in each row.
    """
    seed = np.array([value % 2**_BITS for value in seeds], dtype=np.uint64)
    start = _mix(_mix(seed) + np.array(positions, dtype=np.uint64) * _STEP)
    found = _mix(start[:, None] + np.arange(KEYS, dtype=np.uint64) * _STEP)
    return torch.from_numpy((found >> np.uint64(32)).astype(np.uint32).view(np.int32))


def add_gumbel(scores: Tensor, keys: Tensor, numbers: Tensor) -> Tensor:
    """Returns scores plus Gumbel noise, whose largest value is a draw from their softmax.

    The bits of a token are a multiply-xorshift hash of its number, keyed by row: an exclusive or
    with a key, and two products with odd keys modulo 2^32.

    Args:
        scores: [B, V] float32.
        keys: [B, KEYS] int32, a result of draw_keys on the device of the scores.
        numbers: [V] int32, a result of token_numbers.
    """
    first, one, other = (keys[:, index, None] for index in range(KEYS))
    bits = numbers ^ first
    bits *= one | 1
    # The shift copies the sign, so the highest bit is 0 afterwards; the 31 others are as random.
    bits ^= bits >> 15
    bits *= other | 1
    bits &= 2**_DRAWN_BITS - 1
    # Exponential numbers -log(1 - u), exact for small u, which give the largest noise.
    noise = bits.to(torch.float32).add_(0.5).mul_(-(2.0**-_DRAWN_BITS)).log1p_().neg_()
    return torch.sub(scores, noise.log_(), out=noise)


def token_numbers(size: int, device: torch.device) -> Tensor:
    """Returns a random number of 32 bits for each token of a vocabulary, [size] int32.

    Args:
        size: Size V of the vocabulary.
        device: Device of the scores.
    """
    mixed = _mix(np.arange(1, size + 1, dtype=np.uint64) * _STEP)
    return torch.from_numpy((mixed >> np.uint64(32)).astype(np.uint32).view(np.int32)).to(device)


def _mix(x: np.ndarray) -> np.ndarray:
    """Returns the output of SplitMix64's finalizer for each number, uint64."""
    x = (x ^ (x >> _SHIFTS[0])) * _FACTORS[0]
    x = (x ^ (x >> _SHIFTS[1])) * _FACTORS[1]
    return x ^ (x >> _SHIFTS[2])
