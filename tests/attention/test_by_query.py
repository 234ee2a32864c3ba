"""Tests attention by single queries: queries and requests without keys, and pages."""

import torch

from lctrain.attention.by_query import attend_by_query, attend_pages_by_query

OPTIONS = {"softmax_scale": 1.0, "softcap": 0.0, "window_size": (-1, -1), "backend": "auto"}


def test_queries_without_keys_get_zeros_and_leave_the_others_their_keys():
    """Padding of transformers' continuous batching is a document with more queries than keys."""
    q, (k, v) = torch.randn(5, 2, 8), torch.randn(2, 3, 2, 8)
    found = attend_by_query(q, k, v, [3, 2], [1, 2], OPTIONS)
    assert not found[:2].any()
    assert torch.equal(found[2], v[0])  # of one key
    assert torch.equal(found[3], v[1])
    assert torch.equal(found[3:], attend_by_query(q[3:], k[1:], v[1:], [2], [2], OPTIONS))


def test_pages_in_any_order_have_the_bits_of_a_pack():
    keys, page = 37, 16
    q, (k, v) = torch.randn(1, 2, 8), torch.randn(2, keys, 2, 8)
    expected = attend_by_query(q, k, v, [1], [keys], OPTIONS)
    pages, table = torch.full((2, 5, page, 2, 8), float("nan")), [3, 0, 4]
    for place, number in enumerate(table):
        part = slice(place * page, min((place + 1) * page, keys))
        pages[0, number, : part.stop - part.start] = k[part]
        pages[1, number, : part.stop - part.start] = v[part]
    lengths = torch.tensor([keys, 0], dtype=torch.int32)
    tables = torch.tensor([table, [0, 0, 0]], dtype=torch.int32)
    both = q[None].expand(2, 1, 2, 8)
    found = attend_pages_by_query(both, *pages, lengths, tables, OPTIONS)
    assert torch.equal(found[0], expected)
    assert not found[1].any()
