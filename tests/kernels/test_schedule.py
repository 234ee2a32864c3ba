"""Tests the tile schedule: each tile once, in order, equal from the CPU and from the device."""

import gc

import pytest
import torch

from lctrain.kernels import TileSchedule, make_schedule
from lctrain_kernels import schedule as schedule_module
from lctrain_kernels.schedule import SCHEDULE_ROWS, device_schedule
from tests.kernels.oracle import cumulative

PACKS = {
    "one": ([300], [300]),
    "mixed": ([0, 1, 127, 128, 129, 0, 1000, 5], [0, 1, 127, 128, 129, 0, 1000, 5]),
    "unequal": ([10, 700, 0, 256, 40], [500, 3, 129, 256, 0]),
    "empty-documents": ([0, 0], [0, 0]),
    "no-documents": ([], []),
}
by_pack = pytest.mark.parametrize(("queries", "keys"), PACKS.values(), ids=PACKS.keys())


def expected_tiles(lengths: list[int]) -> set[tuple[int, int]]:
    return {
        (document, block)
        for document, length in enumerate(lengths)
        for block in range(-(-length // SCHEDULE_ROWS))
    }


def query_work(queries: list[int], keys: list[int], document: int, block: int) -> int:
    """Returns how many keys the last query of a block sees in causal attention."""
    shift = keys[document] - queries[document]
    return min((block + 1) * SCHEDULE_ROWS + shift, keys[document])


def key_order(queries: list[int], keys: list[int], document: int, block: int) -> tuple[int, ...]:
    """Returns a sort key: documents with more queries first, each from its start."""
    return queries[document], -document, -block


@by_pack
def test_every_tile_once_in_order(queries, keys):
    schedule = make_schedule(queries, keys)
    assert (schedule.total_q, schedule.total_k) == (sum(queries), sum(keys))
    for tiles, lengths, work in (
        (schedule.q_tiles, queries, query_work),
        (schedule.k_tiles, keys, key_order),
    ):
        assert tiles.dtype == torch.int32
        assert tiles.is_contiguous()
        listed = [tuple(tile) for tile in tiles.tolist()]
        assert len(listed) == len(set(listed))
        assert set(listed) == expected_tiles(lengths)
        amounts = [work(queries, keys, *tile) for tile in listed]
        assert amounts == sorted(amounts, reverse=True)


@by_pack
def test_the_device_builds_the_same_order(queries, keys, device):
    if not queries:
        return_value = device_schedule(cumulative([], device), cumulative([], device), 0, 0)
        assert return_value.q_tiles.shape == return_value.k_tiles.shape == (0, 2)
        return
    here = make_schedule(queries, keys)
    there = device_schedule(
        cumulative(queries, device), cumulative(keys, device), sum(queries), sum(keys)
    )
    for expected, tiles in ((here.q_tiles, there.q_tiles), (here.k_tiles, there.k_tiles)):
        tiles = tiles.cpu()
        assert torch.equal(tiles[: len(expected)], expected)
        assert (tiles[len(expected) :, 0] == -1).all(), "unused slots hold document -1"
    assert (there.total_q, there.total_k) == (-1, -1), "known on the device only"


def test_lengths_of_keys_default_to_those_of_queries():
    one, two = make_schedule([5, 300]), make_schedule((5, 300), (5, 300))
    assert all(torch.equal(a, b) for a, b in zip(one[:2], two[:2], strict=True))
    assert one[2:] == two[2:] == (305, 305, 2)


def test_the_device_schedule_is_built_once_per_pack(device, monkeypatch):
    built = []
    build = schedule_module._build_on_device
    monkeypatch.setattr(
        schedule_module, "_build_on_device", lambda *args: built.append(1) or build(*args)
    )
    cu_seqlens = cumulative([5, 200], device)
    first = device_schedule(cu_seqlens, cu_seqlens, 205, 205)
    assert device_schedule(cu_seqlens, cu_seqlens, 205, 205) is first
    assert len(built) == 1
    cu_seqlens[1] = 6
    changed = device_schedule(cu_seqlens, cu_seqlens, 205, 205)
    assert changed is not first, "a change in place is another pack"
    assert len(built) == 2
    device_schedule(cu_seqlens, cu_seqlens.clone(), 205, 205)
    assert len(built) == 3


def test_a_device_schedule_lives_as_long_as_its_pack(device):
    gc.collect()
    before = len(schedule_module._device_schedules)
    cu_seqlens = cumulative([5, 200], device)
    device_schedule(cu_seqlens, cu_seqlens, 205, 205)
    assert len(schedule_module._device_schedules) == before + 1
    del cu_seqlens
    gc.collect()
    assert len(schedule_module._device_schedules) == before


def test_tensors_of_inference_mode_have_schedules_too(device):
    with torch.inference_mode():
        cu_seqlens = cumulative([5, 200], device)
        schedule = device_schedule(cu_seqlens, cu_seqlens, 205, 205)
    expected = make_schedule([5, 200])
    assert torch.equal(schedule.q_tiles[: len(expected.q_tiles)].cpu(), expected.q_tiles)


def test_a_pack_that_ends_elsewhere_is_refused_when_the_device_builds():
    """On a GPU this check is a device-side assertion, which would end the process."""
    cu_seqlens = cumulative([5, 4], "cpu")
    with pytest.raises(RuntimeError, match="cu_seqlens_q must start at 0, not decrease and end"):
        device_schedule(cu_seqlens, cu_seqlens, 10, 10)


def test_to_moves_both_lists(device):
    schedule = make_schedule([5, 300]).to(device, non_blocking=True)
    assert isinstance(schedule, TileSchedule)
    assert schedule.q_tiles.device.type == schedule.k_tiles.device.type == device.type
    assert (schedule.total_q, schedule.total_k) == (305, 305)


@pytest.mark.gpu
def test_pin_memory_pins_both_lists():
    schedule = make_schedule([5, 300]).pin_memory()
    assert schedule.q_tiles.is_pinned()
    assert schedule.k_tiles.is_pinned()


def test_as_many_keys_as_documents_are_needed():
    with pytest.raises(ValueError, match=r"one entry per document \(2\), got 1"):
        make_schedule([1, 2], [1])


def test_negative_lengths_are_refused():
    with pytest.raises(ValueError, match="must be >= 0, got a negative one"):
        make_schedule([4, -1])
    with pytest.raises(ValueError, match="must be >= 0, got a negative one"):
        make_schedule([4, 1], [4, -1])
