"""Tests the size of the cache on a GPU, and when memory goes back from torch to the driver."""

import gc
import weakref

import pytest
import torch

from lctrain.generation import continuous, generate, pool_size
from lctrain.generation.options import SamplingOptions
from lctrain.generation.pages import CacheShape, PagePool
from lctrain.generation.pool_size import (
    LARGE,
    LARGE_PACK_TOKENS,
    PACK_TOKENS,
    PACK_WIDTHS,
    give_back,
    pack_tokens,
    pool_pages,
)
from lctrain.generation.task import GenerationTask

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
SHAPE = CacheShape(2, 2, 8, torch.float32)
TOTAL = 1000 * SHAPE.page_bytes


@pytest.fixture
def gpu(monkeypatch):
    """Returns the memory of a GPU that is pretended, in pages, and a count of empty_cache."""
    memory = {"free": 10, "reserved": 90, "allocated": 50, "split": 0, "emptied": 0}
    page = SHAPE.page_bytes

    def empty_cache():
        """Gives back all that is not allocated, except the unused parts of split blocks."""
        kept = memory["allocated"] + memory["split"]
        memory["free"] += memory["reserved"] - kept
        memory.update(reserved=kept, emptied=memory["emptied"] + 1)

    stats = "inactive_split_bytes.all.current"
    monkeypatch.setattr(torch.cuda, "empty_cache", empty_cache)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda at: (page * memory["free"], TOTAL))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda at: page * memory["reserved"])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda at: page * memory["allocated"])
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda at: {stats: page * memory["split"]})
    return memory


def test_a_pool_that_the_memory_does_not_hold_is_an_error():
    """torch's own message names the bytes only; a CPU's cache is what the longest request needs."""
    with pytest.raises(ValueError, match=r"must fit the memory of cpu, got \d+ pages.*max_new_tok"):
        PagePool(SHAPE, 2**45, CPU)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), (ValueError, "must fit the memory of cuda")),
        (RuntimeError("CUDA error: device-side assert"), (RuntimeError, "device-side assert")),
    ],
    ids=["memory", "earlier"],
)
def test_an_earlier_error_of_a_gpu_is_not_one_of_memory(error, expected, monkeypatch):
    def fail(*_, **options):
        raise error

    monkeypatch.setattr(torch, "empty", fail)
    kind, message = expected
    with pytest.raises(kind, match=message):
        PagePool(SHAPE, 4, GPU)


def asked(pages):
    """Returns a task whose full batch needs a number of pages."""
    return GenerationTask([[1]] * pages, [0] * pages, SamplingOptions(), 1, batch_size=pages)


@pytest.mark.parametrize(
    ("wanted", "split", "emptied"),
    [(8, 0, 0), (40, 0, 0), (41, 0, 1), (24, 20, 0), (25, 20, 1), (9, 60, 1)],
)
def test_the_allocator_keeps_its_memory_if_the_cache_fits_beside_it(gpu, wanted, split, emptied):
    """50 pages are free, less those of split blocks. Four fifths of them are for the cache."""
    gpu.update(split=split, reserved=max(90, 50 + split))
    room = 40 if split == 0 else 24 if split == 20 else 8
    assert pool_pages(asked(wanted), SHAPE, GPU, None) == min(wanted, room)
    assert gpu["emptied"] == emptied


def test_a_given_size_asks_nothing_of_the_gpu(gpu):
    assert pool_pages(asked(9), SHAPE, GPU, 4.5 * SHAPE.page_bytes / 2**30) == 4
    assert gpu["emptied"] == 0


@pytest.mark.parametrize(
    ("device", "share", "has_graphs", "emptied"),
    [(GPU, 0.5, False, 0), (GPU, 1, False, 1), (GPU, 0, True, 1), (CPU, 1, True, 0)],
    ids=["small", "large", "graphs", "cpu"],
)
def test_only_large_caches_and_graphs_go_back_to_the_driver(
    gpu, device, share, has_graphs, emptied
):
    give_back(device, int(share * LARGE * TOTAL), has_graphs)
    assert gpu["emptied"] == emptied


@pytest.mark.parametrize("captured", [False, True], ids=["plain", "captured"])
def test_a_batch_frees_its_cache_without_the_garbage_collector(make_batch, captured, monkeypatch):
    """The next step of a training needs the memory, and the collector may run much later."""
    made = []

    class Pool(PagePool):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(weakref.ref(self))

    def capture(function):
        result = function()
        return (lambda: None), result

    monkeypatch.setattr(continuous, "PagePool", Pool)
    gc.disable()
    try:
        make_batch([[1, 2, 3], [4, 5]], capture=capture if captured else None).run()
        assert [pool() for pool in made] == [None]
    finally:
        gc.enable()


def test_generate_frees_its_cache_and_asks_whether_memory_goes_back(patched, monkeypatch):
    calls = []
    monkeypatch.setattr(continuous, "give_back", lambda *given, **named: calls.append(given))
    generate(patched, [[1, 2, 3]], max_new_tokens=4)
    ((device, size),) = calls
    assert device == CPU
    assert size > 0


@pytest.mark.parametrize("narrow", [True, False], ids=["narrow", "wide"])
def test_packs_are_large_where_their_activations_fit(patched, monkeypatch, narrow):
    width = patched.config.intermediate_size
    assert patched.config.hidden_size < width < patched.config.vocab_size
    monkeypatch.setattr(pool_size, "NARROW", width if narrow else width - 1)
    needed = LARGE_PACK_TOKENS * PACK_WIDTHS * width * 4
    free = iter([2 * needed, 2 * needed - 1, needed, needed - 1])
    monkeypatch.setattr(pool_size, "_certain_bytes", lambda device: next(free))
    assert pack_tokens(patched, CPU) == PACK_TOKENS
    largest = LARGE_PACK_TOKENS * (1 + narrow)
    expected = [largest, LARGE_PACK_TOKENS, LARGE_PACK_TOKENS, PACK_TOKENS]
    assert [pack_tokens(patched, GPU) for _ in expected] == expected
