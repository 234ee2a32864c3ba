"""Tests how document boundaries are read: from a pack, rows, padding masks and position ids."""

import pytest
import torch

from lctrain.attention.boundaries import (
    find_positions,
    find_segments,
    from_cu_seqlens,
    from_padding,
    from_rows,
    from_segments,
)

CPU = torch.device("cpu")


def test_from_rows():
    found = from_rows(3, 4, 4, CPU)
    assert found.pack.cu_seqlens_q.tolist() == found.pack.cu_seqlens_k.tolist() == [0, 4, 8, 12]
    assert found.pack.cu_seqlens_q.dtype == torch.int32
    assert (found.pack.max_seqlen_q, found.pack.max_seqlen_k) == (4, 4)
    assert found.indices_q is found.indices_k is None
    assert (
        from_rows(3, 4, 4, CPU).pack.cu_seqlens_q is found.pack.cu_seqlens_q
    )  # one schedule for all layers


def test_from_rows_with_more_keys_than_queries():
    found = from_rows(2, 1, 5, CPU)
    assert found.pack.cu_seqlens_q.tolist() == [0, 1, 2]
    assert found.pack.cu_seqlens_k.tolist() == [0, 5, 10]
    assert (found.queries, found.keys) == ((2, 1), (2, 5))


def test_from_padding():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0]]).bool()
    found = from_padding(mask, 4)
    assert found.pack.cu_seqlens_q.tolist() == [
        0,
        2,
        5,
        5,
    ]  # an empty row is a document of length 0
    assert found.indices_q.tolist() == found.indices_k.tolist() == [2, 3, 4, 5, 6]
    assert (found.pack.max_seqlen_q, found.pack.max_seqlen_k) == (3, 3)


def test_from_padding_of_nothing():
    assert from_padding(torch.ones(2, 3).bool(), 3).indices_q is None


def test_from_padding_with_more_keys_than_queries():
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]).bool()
    found = from_padding(mask, 2)
    assert found.pack.cu_seqlens_q.tolist() == [0, 2, 4]
    assert found.pack.cu_seqlens_k.tolist() == [0, 3, 7]
    assert found.indices_q is None
    assert found.indices_k.tolist() == [1, 2, 3, 4, 5, 6, 7]


def test_from_padding_keeping_queries():
    mask = torch.tensor([[1, 0, 0], [1, 1, 1]]).bool()
    found = from_padding(mask, 3, drop_queries=False)
    assert found.pack.cu_seqlens_q.tolist() == [0, 3, 6]
    assert found.pack.cu_seqlens_k.tolist() == [0, 1, 4]


@pytest.mark.parametrize(
    ("positions", "mask", "expected"),
    [
        ([[0, 1, 2, 3]], None, None),
        ([[5, 6, 7, 8]], None, None),
        ([[0, 1, 0, 1], [0, 1, 2, 3]], None, [[1, 1, 2, 2], [1, 1, 1, 1]]),
        ([[0, 0, 0, 1]], None, [[1, 2, 3, 3]]),
        ([[0, 1, 7, 8]], None, [[1, 1, 2, 2]]),  # a jump ahead is another document, too
        ([[1, 1, 0, 1]], [[0, 0, 1, 1]], None),  # positions at padding mean nothing
        ([[0, 1, 2, 2]], [[1, 1, 1, 0]], None),
        ([[0, 1, 0, 1, 0]], [[1, 1, 1, 1, 0]], [[1, 1, 2, 2, 0]]),
        ([[0, 0, 1, 1, 2]], [[0, 1, 1, 0, 1]], None),  # padding inside, not counted
        ([[0, 1, 0, 3, 4]], [[1, 1, 0, 1, 1]], None),  # padding inside, counted
        ([[0, 1, 2, 0, 1]], [[1, 1, 0, 1, 1]], [[1, 1, 0, 2, 2]]),
        ([[0, 1, 0, 5, 6]], [[1, 1, 0, 1, 1]], [[1, 1, 0, 2, 2]]),
    ],
)
def test_find_segments(positions, mask, expected):
    mask = None if mask is None else torch.tensor(mask).bool()
    found = find_segments(torch.tensor(positions), mask)
    assert (None if found is None else found.tolist()) == expected


def test_positions_of_rows_packs_and_padding():
    assert find_positions(from_rows(2, 3, 3, CPU)).tolist() == [[0, 1, 2]] * 2
    segments = torch.tensor([[1, 1, 2, 0], [0, 1, 1, 1]])
    assert find_positions(from_segments(segments)).tolist() == [[0, 1, 0, 0], [0, 0, 1, 2]]
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0]]).bool()
    assert find_positions(from_padding(mask, 4)).tolist() == [[0, 0, 0, 1], [0, 1, 2, 0], [0] * 4]


def test_positions_of_a_pack_with_empty_documents():
    edges = torch.tensor([0, 0, 2, 2, 5, 5], dtype=torch.int32)
    pack = dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), edges)
    pack |= dict.fromkeys(("max_length_q", "max_length_k"), 3)
    found = find_positions(from_cu_seqlens(pack, (1, 5), (1, 5), CPU))
    assert found.tolist() == [[0, 1, 0, 1, 2]]
    assert found.dtype == torch.int64


def test_positions_go_on_after_cached_keys():
    assert find_positions(from_rows(2, 2, 5, CPU)).tolist() == [[3, 4]] * 2
    mask = torch.tensor([[0, 0, 0, 1, 1], [1, 1, 0, 1, 1], [1, 1, 1, 1, 0]]).bool()
    assert find_positions(from_padding(mask, 2)).tolist() == [[0, 1], [2, 3], [3, 0]]


def test_from_segments():
    found = from_segments(torch.tensor([[1, 1, 2, 0], [0, 1, 1, 1]]))
    assert found.pack.cu_seqlens_q.tolist() == [0, 2, 3, 6]
    assert found.indices_q.tolist() == [0, 1, 2, 5, 6, 7]
    assert (found.pack.max_seqlen_q, found.queries) == (3, (2, 4))


def pack(**changes):
    edges = torch.tensor([0, 3, 5], dtype=torch.int32)
    return {
        "cu_seq_lens_q": edges,
        "cu_seq_lens_k": edges,
        "max_length_q": 3,
        "max_length_k": torch.tensor(3),
        "document_ids": torch.tensor([7, 8], dtype=torch.int32),
    } | changes


def test_from_cu_seqlens():
    arguments = pack()
    found = from_cu_seqlens(arguments, (1, 5), (1, 5), CPU)
    assert found.pack.cu_seqlens_q is arguments["cu_seq_lens_q"]
    assert (found.pack.max_seqlen_q, found.pack.max_seqlen_k) == (3, 3)
    assert type(found.pack.max_seqlen_k) is int
    assert found.pack.document_ids.tolist() == [7, 8]


@pytest.mark.parametrize(
    ("changes", "rows", "message"),
    [
        ({"max_length_q": None}, (1, 5), "must bring cu_seq_lens_q, .*, got no max_length_q"),
        ({}, (2, 5), r"packed inputs must be one row \[1, T\], got 2 rows. Concatenate"),
        (
            {"max_length_k": torch.tensor(3, device="meta")},
            (1, 5),
            "max_length_k must be a Python int, got a tensor on meta",
        ),
        ({"cu_seq_lens_q": [0, 3, 5]}, (1, 5), "cu_seq_lens_q must be an int32 tensor .* got list"),
        (
            {"cu_seq_lens_k": torch.tensor([[0, 3, 5]])},
            (1, 5),
            r"cu_seq_lens_k must be an int32 tensor \[documents \+ 1\], got \[1, 3\]",
        ),
        (
            {"cu_seq_lens_k": torch.tensor([0, 2, 5], dtype=torch.int32)},
            (1, 5),
            r"must equal cu_seq_lens_k, got \[0, 3, 5\] and \[0, 2, 5\]: .* Pass one tensor",
        ),
        ({"max_length_q": 2}, (1, 5), "max_length_q must be at least 3, .*, got 2. Pass Packed"),
    ],
)
def test_from_cu_seqlens_refuses(changes, rows, message):
    with pytest.raises(ValueError, match=message):
        from_cu_seqlens(pack(**changes), rows, rows, CPU)
