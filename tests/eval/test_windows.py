import itertools

import numpy as np
import pytest

from lctrain.eval import cut_windows
from tests.numerics import near

SIZES = [1, 2, 3, 9, 10, 11, 12, 64, 100]


def scored_positions(windows) -> set[tuple[int, int]]:
    """Returns all scored (document, position) pairs; fails if a pair occurs twice."""
    pairs = [
        (int(document), position)
        for document, begin, end in zip(
            windows.documents, windows.scored_from, windows.stops, strict=True
        )
        for position in range(begin, end)
    ]
    assert len(pairs) == len(set(pairs))
    return set(pairs)


@pytest.mark.parametrize("overlap", [0.0, 0.3, 0.5, 0.99])
@pytest.mark.parametrize("length", [1, 2, 7, 10, 64, 1000])
def test_every_position_is_scored_once_whatever_the_length(length, overlap) -> None:
    windows = cut_windows(SIZES, length, overlap=overlap)
    expected = {(d, p) for d, size in enumerate(SIZES) for p in range(size - 1)}
    assert scored_positions(windows) == expected


@pytest.mark.parametrize("min_context", [1, 5, 64])
@pytest.mark.parametrize("length", [2, 7, 64])
def test_scored_positions_have_the_smallest_context(length, min_context) -> None:
    windows = cut_windows(SIZES, length, min_context=min_context)
    expected = {
        (d, p) for d, size in enumerate(SIZES) for p in range(size - 1) if p + 1 >= min_context
    }
    assert scored_positions(windows) == expected


@pytest.mark.parametrize("overlap", [0.0, 0.3, 0.5, 0.99])
@pytest.mark.parametrize("length", [1, 2, 7, 10, 64, 1000])
def test_contexts_are_bounded_and_windows_stay_inside_their_document(length, overlap) -> None:
    windows = cut_windows(SIZES, length, overlap=overlap)
    stride = max(1, round(length * (1 - overlap)))
    contexts = []
    for document, start, begin, end in zip(
        windows.documents, windows.starts, windows.scored_from, windows.stops, strict=True
    ):
        assert 0 <= start <= begin < end <= SIZES[document] - 1
        assert end - start <= length
        for position in range(begin, end):
            context = position - start + 1
            assert context == position + 1 or length - stride < context <= length
            contexts.append(context)
    assert windows.mean_context() == near(np.mean(contexts))


def test_windows_of_one_document() -> None:
    windows = cut_windows([24], 10, overlap=0.5)
    assert windows.starts.tolist() == [0, 5, 10, 13]
    assert windows.scored_from.tolist() == [0, 10, 15, 20]
    assert windows.stops.tolist() == [10, 15, 20, 23]


def test_more_overlap_never_shortens_a_context() -> None:
    contexts = [cut_windows([500], 50, overlap=o).mean_context() for o in (0.0, 0.5, 0.9, 0.98)]
    assert all(low < high for low, high in itertools.pairwise(contexts))
    assert contexts[-1] == near(np.minimum(np.arange(1, 500), 50).mean())
