"""Tests that a row of a batch-invariant linear layer has the same bits in every batch."""

import pytest
import torch
from torch.nn import functional

from lctrain.kernels import batch_invariant_linear
from lctrain_kernels.linear import launch_config as config
from tests.kernels.fused_cases import CASES, assert_error_at_most_twice_plain

devices = pytest.mark.parametrize(("device", "dtype", "backend"), CASES)


def batches(x, rows):
    """Yields tensors with the rows of x at other places, in other numbers, and their indices."""
    generator = torch.Generator().manual_seed(1)
    for size in (1, 2, 3, 17, 33, rows):
        index = torch.randperm(rows, generator=generator)[:size].to(x.device)
        yield x[index], index
    padded = torch.full((rows + 5, 2 * x.shape[1]), float("nan"), dtype=x.dtype, device=x.device)
    padded[2 : rows + 2, : x.shape[1]] = x
    yield padded[2 : rows + 2, : x.shape[1]], torch.arange(rows, device=x.device)


@pytest.mark.parametrize("has_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize(("width", "columns"), [(64, 48), (70, 33), (8, 5)])
@devices
def test_bits_depend_on_no_other_row(
    device, dtype, backend, width, columns, has_bias, ordered_products
):
    torch.manual_seed(0)
    x, weight = torch.randn(70, width), torch.randn(columns, width)
    x, weight = x.to(device, dtype), weight.to(device, dtype)
    bias = torch.randn(columns).to(device, dtype) if has_bias else None
    whole = batch_invariant_linear(x, weight, bias, backend=backend)
    assert whole.shape == (70, columns)
    for rows, index in batches(x, 70):
        found = batch_invariant_linear(rows, weight, bias, backend=backend)
        assert torch.equal(found, whole[index])
    rest = torch.cat((x[:9] * 1e30, x[9:10], x[10:] * 0))  # infinities in half precision
    assert torch.equal(batch_invariant_linear(rest, weight, bias, backend=backend)[9], whole[9])
    assert batch_invariant_linear(x[:0], weight, bias, backend=backend).shape == (0, columns)


@pytest.mark.parametrize("has_bias", [False, True], ids=["", "bias"])
@devices
def test_it_is_a_linear_layer(device, dtype, backend, has_bias):
    torch.manual_seed(0)
    tensors = [torch.randn(3, 23, 64), torch.randn(480, 64), torch.randn(480)][: 2 + has_bias]
    assert_error_at_most_twice_plain(
        lambda *tensors: batch_invariant_linear(*tensors, backend=backend),
        functional.linear,
        [tensor.to(device) for tensor in tensors],
        dtype,
    )


@pytest.mark.parametrize("frozen", [("x",), ("weight",), ("bias",), ("weight", "bias")])
def test_only_the_gradients_that_are_needed(frozen):
    leaves = {
        "x": torch.randn(5, 8),
        "weight": torch.randn(6, 8),
        "bias": torch.randn(6),
    }
    for name, leaf in leaves.items():
        leaf.requires_grad_(name not in frozen)
    batch_invariant_linear(*leaves.values()).sum().backward()
    assert {name for name, leaf in leaves.items() if leaf.grad is None} == set(frozen)


def test_autocast_casts_the_arguments():
    x, weight, bias = torch.randn(5, 8), torch.randn(6, 8), torch.randn(6)
    with torch.autocast("cpu", torch.bfloat16):
        out = batch_invariant_linear(x, weight, bias)
    assert out.dtype == torch.bfloat16
    expected = batch_invariant_linear(*(tensor.bfloat16() for tensor in (x, weight, bias)))
    assert torch.equal(out, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(2, 3), torch.ones(4, 5)), r"weight must be torch.float32 of shape \[N, 3\]"),
        ((torch.ones(2, 3), torch.ones(4, 3), torch.ones(3)), r"bias must be .* of shape \(4,\)"),
        (
            (torch.ones(2, 3), torch.ones(4, 3), torch.ones(4).double()),
            "bias must be torch.float32 .* got torch.float64",
        ),
        (
            (torch.ones(2, 3, dtype=torch.int64), torch.ones(4, 3)),
            "x must be floating point",
        ),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        batch_invariant_linear(*arguments)


def test_few_rows_take_a_tile_of_their_own_on_the_tuned_gpu(monkeypatch):
    monkeypatch.setattr(config, "device_table", lambda x: "sm_90")
    monkeypatch.setattr(config, "multiprocessors", lambda device: 132)
    tiles = config.TABLES["sm_90"]

    def tile(rows, columns):
        return config.linear_tile(torch.empty(rows, 64, device="meta"), columns)

    assert tile(1, 2048) == tile(64, 2048) == tiles.few
    assert tile(8192, 2048) == tiles.wide
    assert tile(1, 128256) == tiles.wide  # its columns fill the GPU
    assert tile(1, 16) == tiles.few
    assert tile(32768, 16) == tiles.narrow
    assert {t.block_k for t in (tiles.few, tiles.wide, tiles.narrow)} == {64}


@pytest.mark.parametrize("table", ["sm_80", "sm_100", "gfx942", "gfx950", "float32", "interpreter"])
def test_other_tables_have_one_tile_for_all_numbers_of_rows(table):
    assert config.TABLES[table].few is None
