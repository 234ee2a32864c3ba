"""Tests copies between host and device."""

import pytest
import torch

from lctrain.transfer import HostCopy, upload

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(3, 5), (0,), ()])
def test_an_upload_has_the_values_of_the_tensor(shape, device):
    values = torch.randn(shape, dtype=torch.float64)
    found = upload(values, torch.device(device))
    assert found.device.type == device
    assert torch.equal(found.cpu(), values)


@pytest.mark.parametrize("device", DEVICES)
def test_a_host_copy_keeps_values_that_are_overwritten(device):
    values = torch.arange(1_000_000, device=device)
    copy = HostCopy(values)
    values.zero_()
    assert torch.equal(copy.wait(), torch.arange(1_000_000))
