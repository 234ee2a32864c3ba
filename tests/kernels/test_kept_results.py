"""Tests that an oracle runs once for equal numbers, and again for others."""

import dataclasses

import pytest
import torch

from tests.kernels import kept_results
from tests.kernels.kept_results import keep_results
from tests.kernels.oracle import Case, make_inputs

CASE = Case(((3, 3), (2, 2)), head_dim=4)


@pytest.fixture
def calls():
    return []


@pytest.fixture
def oracle(calls):
    @keep_results
    def oracle(case, inputs, dtype, *, sample=None):
        calls.append(dtype)
        return inputs.q.to(dtype).sum()

    return oracle


def test_equal_numbers(oracle, calls):
    first = oracle(CASE, make_inputs(CASE), torch.float64)
    assert oracle(CASE, make_inputs(CASE), torch.float64) is first
    assert len(calls) == 1


@pytest.mark.parametrize("name", ["q", "v", "dlse", "cu_seqlens_k"])
def test_another_number(oracle, calls, name):
    inputs = make_inputs(CASE)
    oracle(CASE, inputs, torch.float64)
    getattr(inputs, name)[-1:] += 1  # in place: the object stays the same
    oracle(CASE, inputs, torch.float64)
    assert len(calls) == 2


def test_another_case_dtype_or_option(oracle, calls):
    inputs = make_inputs(CASE)
    oracle(CASE, inputs, torch.float64)
    oracle(dataclasses.replace(CASE, causal=True), inputs, torch.float64)
    oracle(CASE, inputs, torch.float32)
    oracle(CASE, inputs, torch.float64, sample=[0])
    oracle(CASE, dataclasses.replace(inputs, sink=torch.zeros(4)), torch.float64)
    assert len(calls) == 5


def test_the_oldest_is_dropped(oracle, calls, monkeypatch):
    monkeypatch.setattr(kept_results, "MOST_KEPT", 2)
    for seed in (0, 1, 0, 2, 0, 1):
        oracle(CASE, make_inputs(CASE, seed=seed), torch.float64)
    assert len(calls) == 4
