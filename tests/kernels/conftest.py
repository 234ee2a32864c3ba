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
def ordered_products(monkeypatch):
    """Fixture: Triton's interpreter sums each element of a product of tiles in one order.

    It multiplies by NumPy's BLAS, whose order depends on the place of a row in a tile. That of a
    GPU's matrix instructions does not.
    """
    matmul = np.matmul

    def ordered(a, b, dtype=None, **options):
        if a.ndim != 2 or b.ndim != 2 or options:
            return matmul(a, b, dtype=dtype, **options)
        dtype = np.result_type(a, b) if dtype is None else dtype
        out = np.zeros((a.shape[0], b.shape[1]), dtype)
        with np.errstate(all="ignore"):
            for k in range(a.shape[1]):
                out += a[:, k, None].astype(dtype) * b[k, None, :].astype(dtype)
        return out

    monkeypatch.setattr(np, "matmul", ordered)
