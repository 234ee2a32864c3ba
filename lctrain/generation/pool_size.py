"""Sizes of the paged cache: what it holds, how large it may be, whether it goes back; of packs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lctrain.data.vocabulary import vocabulary_size
from lctrain.distributed.gather import free_bytes
from lctrain.generation.pages import PAGE, CacheMemoryError, CacheShape, pages_of
from lctrain.generation.road import find_cache
from lctrain.generation.task import GenerationTask
from lctrain.loss import evaluation_mode
from lctrain.models.kept_frequencies import kept_frequencies

SHARE = 0.8
"""Share of the free memory of a GPU that the cache may take; activations need the rest."""
LARGE = 1 / 16
"""Share of a GPU's memory from which a cache goes back to the driver at the end of a call."""
HOST_BYTES = 4 * 2**30
"""Most bytes of a cache on a CPU, unless one request needs more or the caller gives a size."""

PACK_TOKENS = 8192
"""Most tokens of a pack of prompts on a CPU, and on a GPU without room for LARGE_PACK_TOKENS."""
LARGE_PACK_TOKENS = 16384
"""The same on a GPU. An H200 computes a smaller pack of a 1B model before the next is launched."""
NARROW = 2048
"""Width of the widest layer up to which a GPU gets packs of twice as many tokens."""
PACK_WIDTHS = 8
"""Estimate of the memory of a pack: numbers of a token, in widths of its widest layer."""


def longest_pages(task: GenerationTask) -> list[int]:
    """Returns the pages of each prompt with its longest completion; the last token is not read."""
    return [pages_of(len(row) + task.max_new_tokens - 1) for row in task.prompts]


def pool_pages(
    task: GenerationTask, shape: CacheShape, device: torch.device, cache_gib: float | None
) -> int:
    """Returns the number of pages: those of the longest requests of a full batch, if they fit.

    Args:
        task: Prompts and options.
        shape: Shape of keys and values.
        device: Device of the cache.
        cache_gib: Most memory of the cache in GiB; None for a share of the free memory.

    Raises:
        CacheMemoryError: if one request alone does not fit.
    """
    needs = sorted(longest_pages(task), reverse=True)
    wanted = sum(sorted(needs * min(task.samples, task.batch_size))[-task.batch_size :])
    if cache_gib is not None:
        room = int(cache_gib * 2**30)
    elif device.type == "cuda":
        room = int(SHARE * _certain_bytes(device))
        if room < wanted * shape.page_bytes:
            room = _default_bytes(device)
    else:
        room = max(_default_bytes(device), needs[0] * shape.page_bytes)
    fitting = room // shape.page_bytes
    if fitting < needs[0]:
        raise CacheMemoryError(
            f"cache_gib must be at least {needs[0] * shape.page_bytes / 2**30:.3g} for a prompt "
            f"with its completion of {needs[0] * PAGE} tokens, got {room / 2**30:.3g}"
            f"{' of free memory' if cache_gib is None else ''}. Shorten the prompts, lower "
            "max_new_tokens, or pass a larger cache_gib."
        )
    return min(wanted, fitting)


def pack_tokens(model: nn.Module, device: torch.device) -> int:
    """Returns the most tokens of a pack of prompts, from the memory that the cache leaves free.

    Args:
        model: A causal LM of transformers, or a model of PEFT around one.
        device: Device of the model, on which the cache lies already.
    """
    if device.type != "cuda":
        return PACK_TOKENS
    vocabulary = vocabulary_size(model)
    widths = [
        (size, size * weight.element_size())
        for weight in model.parameters()
        if weight.dim() > 1
        for size in weight.shape[-2:]
        if size != vocabulary
    ]
    width, width_bytes = max(widths, default=(0, 0))
    room = _certain_bytes(device) // (PACK_WIDTHS * width_bytes) if width else LARGE_PACK_TOKENS
    if width <= NARROW and room >= 2 * LARGE_PACK_TOKENS:
        return 2 * LARGE_PACK_TOKENS
    return LARGE_PACK_TOKENS if room >= LARGE_PACK_TOKENS else PACK_TOKENS


def cache_tokens(model: Any, cache_gib: float | None = None) -> int | None:
    """Returns the most tokens that run together in the cache that `generate` makes.

    Args:
        model: A causal LM of transformers, in any mode.
        cache_gib: Most memory of the cache in GiB; None for a share of the free memory.

    Returns:
        Tokens of prompts and completions; None if the model generates in padded batches, or is
        sharded: its ranks must make the same calls, whatever memory each of them has.
    """
    with evaluation_mode(model), kept_frequencies(model):
        shape = find_cache(model)
    if isinstance(shape, str):
        return None
    if cache_gib is None:
        room = _default_bytes(next(model.parameters()).device)
    else:
        room = int(cache_gib * 2**30)
    return room // shape.page_bytes * PAGE


def bytes_beside(device: torch.device, peak: int) -> int:
    """Returns the bytes of a cache on a GPU beside which other work still reaches its peak.

    Args:
        device: A GPU.
        peak: Most bytes that torch has allocated on it for the other work.

    Returns:
        At most the share of the free memory that a cache takes by default; 0 if nothing is left.
    """
    free = _free_bytes(device)
    growth = max(peak - torch.cuda.memory_allocated(device), 0)
    return max(min(int(SHARE * free), free - growth), 0)


def give_back(device: torch.device, size: int, has_graphs: bool) -> None:
    """Returns the unused memory of torch's allocator to the driver, if a call needs that.

    This synchronises with the GPU, and the allocator asks for the memory again later. So a small
    cache stays in the allocator. A large one does not: the allocator may split its block for other
    tensors, and the next cache would need a second one. Nothing else can use the memory pool of
    CUDA graphs, and each call has one.

    Args:
        device: Device of the cache, which is freed already.
        size: Bytes of the cache.
        has_graphs: Whether CUDA graphs were captured.
    """
    if device.type != "cuda":
        return
    _, total = torch.cuda.mem_get_info(device)
    if has_graphs or size >= LARGE * total:
        torch.cuda.empty_cache()


def _default_bytes(device: torch.device) -> int:
    """Returns the bytes that the cache may take by default: on a GPU, of its free memory."""
    if device.type != "cuda":
        return HOST_BYTES
    torch.cuda.empty_cache()  # may free parts of split blocks, if segments are expandable
    return int(SHARE * _certain_bytes(device))


def _certain_bytes(device: torch.device) -> int:
    """Returns the bytes of a GPU that torch can certainly allocate, without emptying its cache.

    The allocator gives back blocks that nothing is using before it runs out of memory, but not the
    unused parts of blocks that it has split.
    """
    free = free_bytes(device)
    assert free is not None
    split = torch.cuda.memory_stats(device).get("inactive_split_bytes.all.current", 0)
    return max(free - int(split), 0)


def _free_bytes(device: torch.device) -> int:
    """Returns the free bytes of a GPU, after torch has given back what it holds unused."""
    torch.cuda.empty_cache()
    free = free_bytes(device)
    assert free is not None
    return free
