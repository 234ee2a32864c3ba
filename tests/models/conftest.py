"""A float64 model that computes in float64 throughout, so that it can be a reference."""

import pytest
import torch


@pytest.fixture
def float64_stays_float64(monkeypatch):
    """transformers computes norms and eager softmax in float32 even where a model is float64."""
    softmax, to, to_float = torch.nn.functional.softmax, torch.Tensor.to, torch.Tensor.float

    def wide_softmax(states, dim=None, dtype=None, **kwargs):
        dtype = torch.float64 if states.dtype == torch.float64 else dtype
        return softmax(states, dim=dim, dtype=dtype, **kwargs)

    def wide_to(tensor, *args, **kwargs):
        stays = tensor.dtype == torch.float64 and torch.float32 in args
        return tensor if stays else to(tensor, *args, **kwargs)

    def wide_float(tensor):
        stays = tensor.dtype == torch.float64 and tensor.requires_grad  # not rotary frequencies
        return tensor if stays else to_float(tensor)

    monkeypatch.setattr(torch.nn.functional, "softmax", wide_softmax)
    monkeypatch.setattr(torch.Tensor, "to", wide_to)
    monkeypatch.setattr(torch.Tensor, "float", wide_float)
