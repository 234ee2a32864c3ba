"""Tests the list of kernels that are loaded during a measurement."""

import pytest

from lctrain_kernels.bench.compilations import loaded_kernels


def test_kernels_are_listed_while_the_context_lasts():
    triton = pytest.importorskip("triton")
    hook = triton.knobs.runtime.kernel_load_end_hook
    with loaded_kernels() as names:
        hook("module", "function", "first_kernel", None, "hash")
    hook("module", "function", "later_kernel", None, "hash")
    assert names == ["first_kernel"]


def test_without_triton_the_list_stays_empty(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with loaded_kernels() as names:
        pass
    assert names == []
