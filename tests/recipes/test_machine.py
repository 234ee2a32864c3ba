"""Tests that the record of a run names the device that the run used."""

import time

import pytest
import torch

from lctrain.recipes.machine import machine


@pytest.mark.parametrize(
    ("has_gpu", "accelerator", "device"),
    [
        (True, "auto", "GPU X"),
        (True, "gpu", "GPU X"),
        (True, "cpu", "CPU"),
        (False, "auto", "CPU"),
    ],
)
def test_a_run_on_the_cpu_of_a_gpu_machine_is_no_run_on_the_gpu(
    monkeypatch, has_gpu, accelerator, device
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU X")
    monkeypatch.setattr(time, "strftime", lambda form: "2026-12-01")
    found = machine(accelerator)
    assert found["device"] == device
    assert (found["date"], found["torch"]) == ("2026-12-01", torch.__version__)
