"""Tests whether strided tensors share addresses, against a list of all their addresses."""

import random

import pytest
import torch

from lctrain_kernels.overlap import meeting_rows, repeats_memory, share_memory

BASE = torch.zeros(400)


def addresses(tensor: torch.Tensor) -> list[int]:
    """Returns the address of every element, in elements of BASE."""
    places = torch.arange(len(BASE))
    return (
        places.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).flatten().tolist()
    )


def random_view(numbers: random.Random) -> torch.Tensor:
    shape = [numbers.randint(1, 4) for _ in range(3)]
    strides = [numbers.choice([0, 1, 2, 3, 4, 6, 12, 24]) for _ in range(3)]
    return BASE.as_strided(shape, strides, numbers.randint(0, 60))


def test_every_random_layout() -> None:
    numbers = random.Random(0)
    found = set()
    for _ in range(400):
        first, second = random_view(numbers), random_view(numbers)
        shared = bool(set(addresses(first)) & set(addresses(second)))
        places = addresses(first)
        repeated = len(set(places)) < len(places)
        assert share_memory(first, second) == share_memory(second, first) == shared
        assert repeats_memory(first) == repeated
        found.add((shared, repeated))
    assert len(found) == 4


@pytest.mark.parametrize("dim", range(4))
def test_interleaved_halves_share_no_address(dim) -> None:
    halves = BASE[:256].view(4, 4, 4, 4).unflatten(dim, (2, 2)).unbind(dim)
    assert not share_memory(*halves)
    assert share_memory(halves[0], BASE)


def test_tensors_of_two_storages_and_empty_ones() -> None:
    assert not share_memory(BASE, BASE.clone())
    assert not share_memory(BASE, BASE[:0])
    assert not repeats_memory(BASE[:0].expand(3, 0))


def test_rows_that_meet() -> None:
    numbers = random.Random(0)
    counts = set()
    for _ in range(300):
        first = random_view(numbers)
        shape = [numbers.randint(1, 4), *first.shape[1:]]
        second = BASE.as_strided(shape, first.stride(), numbers.randint(0, 60))
        rows = [[set(addresses(row)) for row in tensor] for tensor in (first, second)]
        expected = {
            b - a for a, one in enumerate(rows[0]) for b, other in enumerate(rows[1]) if one & other
        }
        assert meeting_rows(first, second) == sorted(expected)
        counts.add(len(expected))
    assert len(counts) > 3


def test_pages_of_one_pool_meet_the_pages_before_them() -> None:
    pool = torch.zeros(9, 4, 2)
    assert meeting_rows(pool[:-1], pool[1:]) == [-1]
    assert meeting_rows(pool[:-3], pool[3:]) == [-3]
    assert meeting_rows(*pool.view(9, 2, 2, 2).unbind(1)) == []
    assert meeting_rows(pool, torch.zeros_like(pool)) == []
