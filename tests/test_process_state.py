"""Tests that one test does not see what another has left in the process."""

import copy
import logging
import os
import sys

import torch

from tests.process_state import process_state_kept


def test_state_is_restored(monkeypatch):
    monkeypatch.setenv("KEPT", "1")
    environment, hook, level = os.environ, sys.excepthook, logging.getLogger().level
    with process_state_kept():
        os.environ["ADDED"] = "1"
        os.environ = copy.copy(os.environ)  # noqa: B003 - as `Dataset.map` does
        os.environ["KEPT"] = "2"
        del os.environ["PATH"]
        sys.excepthook = print
        logging.basicConfig(level=logging.DEBUG, force=True)
        torch.set_default_dtype(torch.float64)
        torch.use_deterministic_algorithms(True)
    assert os.environ is environment
    assert os.environ["KEPT"] == "1"
    assert "ADDED" not in os.environ
    assert "PATH" in os.environ
    assert sys.excepthook is hook
    assert logging.getLogger().level == level
    assert not any(type(h) is logging.StreamHandler for h in logging.getLogger().handlers)
    assert torch.get_default_dtype() == torch.float32
    assert not torch.are_deterministic_algorithms_enabled()
