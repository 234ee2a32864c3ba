"""Chooses the number of tokens per chunk of logits, from a budget of memory."""

from __future__ import annotations

import functools

import torch

CHUNK_MULTIPLE = 128
MAX_CHUNK_TOKENS = 8192
"""More tokens make the products no faster (measured on an H200)."""
# Bytes of one chunk of logits. On a CPU a chunk is near the size of the cache. On a GPU chunks are
# large, because every chunk reads and writes the whole gradient of the weight.
CPU_CHUNK_BYTES = 64 * 2**20
ACCELERATOR_CHUNK_BYTES = 2 * 2**30
MIN_ACCELERATOR_CHUNK_BYTES = 2**28
FREE_SHARE = 4
"""A chunk takes at most this part of the memory that was free at the first call."""


def pick_chunk_tokens(
    tokens: int,
    vocabulary: int,
    element_size: int,
    device: torch.device,
    logits_bytes: int | None = None,
) -> int:
    """Returns the number of tokens per chunk. Chunks have equal sizes within a memory budget.

    Args:
        tokens: Number of tokens.
        vocabulary: Number of vocabulary entries on this rank.
        element_size: Bytes per logit.
        device: Device of the logits.
        logits_bytes: Budget of a chunk of logits, in bytes. None takes a fixed budget on the CPU.
            On a GPU None takes 2 GiB, or a quarter of the memory that was free at the first call if
            that is less.

    Returns:
        A multiple of 128, at least 128.
    """
    budget = chunk_bytes(device) if logits_bytes is None else logits_bytes
    most = budget // (element_size * vocabulary) // CHUNK_MULTIPLE * CHUNK_MULTIPLE
    most = min(max(most, CHUNK_MULTIPLE), MAX_CHUNK_TOKENS)
    chunks = max(-(-tokens // most), 1)
    return min(-(-tokens // (chunks * CHUNK_MULTIPLE)) * CHUNK_MULTIPLE or CHUNK_MULTIPLE, most)


def chunk_bytes(device: torch.device) -> int:
    """Returns the default budget of a chunk of logits on a device, in bytes.

    The budget is cached, so it does not change from step to step. To torch.compile it is a
    constant: reading the free memory would break the graph.
    """
    return _read_chunk_bytes(device)


chunk_bytes._dynamo_marked_constant = True  # type: ignore[attr-defined]
# torch.compiler.assume_constant_result does the same, but imports the compiler.


@functools.cache
def _read_chunk_bytes(device: torch.device) -> int:
    if device.type == "cpu":
        return CPU_CHUNK_BYTES
    if device.type != "cuda":
        return MIN_ACCELERATOR_CHUNK_BYTES
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(max(free // FREE_SHARE, MIN_ACCELERATOR_CHUNK_BYTES), ACCELERATOR_CHUNK_BYTES)
