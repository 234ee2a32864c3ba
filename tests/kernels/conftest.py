"""Fixtures for the kernel tests."""

import numpy as np
import pytest
import torch


@pytest.fixture
def nan_filled_memory(monkeypatch):
    """Fixture: torch.empty returns NaN, so that rows that a kernel does not write are noticed."""
    empty, empty_like = torch.empty, torch.empty_like

    def nan_filled(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    def nan_filled_like(tensor, **kwargs):
        filled = empty_like(tensor, **kwargs)
        return filled.fill_(float("nan")) if filled.is_floating_point() else filled

    monkeypatch.setattr(torch, "empty", nan_filled)
    monkeypatch.setattr(torch, "empty_like", nan_filled_like)


@pytest.fixture
def no_synchronisation(device):
    """Fixture: a context manager in which synchronising the host with the device is an error."""

    class Guard:
        def __enter__(self) -> None:
            torch.cuda.synchronize(device)
            torch.cuda.set_sync_debug_mode("error")

        def __exit__(self, *_: object) -> None:
            torch.cuda.set_sync_debug_mode("default")

    return Guard


@pytest.fixture
def products_of_any_tile(device, monkeypatch):
    """Fixture: a matrix product of Triton's interpreter does not depend on the shape of its tile.

    A BLAS adds the terms of an entry in an order that depends on the shape and on the entry's place
    in the tile; a GPU does not. Here products of 16-bit floats are added in float64, which holds
    their sums exactly, and rounded to float32 once.
    """
    if device.type != "cpu":
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_dot(self, a, b, d, *options):
        assert a.data.dtype == b.data.dtype == np.float16
        product = a.data.astype(np.float64) @ b.data.astype(np.float64)
        return TensorHandle(product.astype(d.data.dtype) + d.data, d.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
