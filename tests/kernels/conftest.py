"""Fixtures for the kernel tests."""

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
