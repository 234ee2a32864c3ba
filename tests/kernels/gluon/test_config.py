"""Tests by which lengths a Hopper backward chooses how it adds dq."""

import pytest

from lctrain_kernels.bench.workloads import WORKLOADS
from lctrain_kernels.gluon.config import LONG, document_of_a_token, tile_of_call
from lctrain_kernels.options import AttentionOptions

PACKS = {
    "one": (5000,),
    "equal": (700,) * 9,
    "one_long": (9000, *(100,) * 40),
    "mix": (9000, 700, 6500, 2900, 5100, 1800, 4700, 2068),
    "empty": (0, 0, 70, 0),
    "none": (),
    "no_tokens": (0, 0),
}


@pytest.mark.parametrize("lengths", PACKS.values(), ids=PACKS.keys())
def test_the_bound_is_between_the_mean_length_and_that_of_a_token(lengths):
    tokens = sum(lengths)
    exact = sum(length**2 for length in lengths) / max(1, tokens)
    mean = tokens / max(1, len(lengths))
    bound = document_of_a_token(tokens, len(lengths), max(lengths, default=0))
    assert mean - 1 < bound
    assert round(bound) <= round(exact)
    # A longest length that is not known, or larger than the pack, gives no more.
    for longest in (0, tokens + 1):
        assert round(document_of_a_token(tokens, len(lengths), longest)) <= round(bound)


@pytest.mark.parametrize(
    ("name", "from_registers"),
    [
        ("1x32k", True),
        ("4x8k", True),
        ("mix32k_tail", True),
        ("16x2k", False),
        ("mix32k", False),
    ],
)
def test_tokens_in_long_documents_choose_the_form(name, from_registers):
    """Each choice is that of bench/NOTES.md's measurements at D = 128."""
    lengths = WORKLOADS[name].lengths
    shape, documents = (sum(lengths), 32, 128), len(lengths)
    options = AttentionOptions(softmax_scale=1.0)
    tile = tile_of_call(shape, documents, max(lengths), options)
    assert tile.reduce_from_registers == from_registers
    assert not tile_of_call(
        shape, documents, max(lengths), options._replace(deterministic=True)
    ).reduce_from_registers


def test_the_mean_chooses_where_the_longest_length_is_not_known():
    options = AttentionOptions(softmax_scale=1.0)
    for mean, expected in ((LONG - 1, False), (LONG, True)):
        tile = tile_of_call((mean * 40, 8, 128), 40, 0, options)
        assert tile.reduce_from_registers == expected
