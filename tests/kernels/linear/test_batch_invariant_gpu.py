"""Tests on a GPU that tiles, numbers of rows and strides change no bit of a linear layer."""

import pytest
import torch

from lctrain.kernels import batch_invariant_linear
from lctrain_kernels.linear.launch_config import override_linear_tile, tiles_of

pytestmark = pytest.mark.gpu

# Width and columns: projections of a 1B Llama and its head, an adapter, and odd sizes.
SHAPES = [
    (2048, 2048),
    (2048, 512),
    (8192, 2048),
    (2048, 128256),
    (2048, 16),
    (16, 2048),
    (200, 77),
]


@pytest.fixture
def inputs(device):
    """Returns a factory of x [rows, width] and weight [columns, width] in bf16."""

    def make(rows, width, columns):
        generator = torch.Generator(device).manual_seed(5)
        x = torch.randn(rows, width, device=device, generator=generator)
        weight = torch.randn(columns, width, device=device, generator=generator)
        return x.bfloat16(), (weight / width**0.5).bfloat16()

    return make


@pytest.mark.parametrize(("width", "columns"), SHAPES)
def test_tiles_change_no_bit(width, columns, inputs):
    x, weight = inputs(300, width, columns)
    tiles = tiles_of(x)
    found = []
    for tile in (tiles.wide, tiles.narrow, tiles.few or tiles.wide):
        with override_linear_tile(tile):
            found.append(batch_invariant_linear(x, weight))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize(("width", "columns"), SHAPES)
def test_numbers_of_rows_change_no_bit(width, columns, inputs):
    x, weight = inputs(2500, width, columns)
    whole = batch_invariant_linear(x, weight)
    for begin, rows in ((0, 1), (7, 1), (100, 16), (33, 65), (1, 129), (500, 1000)):
        part = slice(begin, begin + rows)
        assert torch.equal(batch_invariant_linear(x[part], weight), whole[part])
    apart = torch.cat((x, x), 1)[:, width:]
    assert torch.equal(batch_invariant_linear(apart, weight), whole)
