"""Tests the persistent Hopper backward in the emulator: programs that work on several tiles."""

import dataclasses

import pytest
import torch

from lctrain_kernels.gluon import config
from lctrain_kernels.varlen import hopper as varlen
from tests.kernels.gluon_emulator import emulate
from tests.kernels.oracle import (
    Case,
    assert_matches_oracle,
    attention,
    equal_lengths,
    make_inputs,
)

pytestmark = [
    pytest.mark.usefixtures("nan_filled_memory"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="test_hopper_gpu.py has a GPU"),
]

ONE_HEAD = Case(equal_lengths(300, 0, 1, 140), 2, 2, 64, torch.bfloat16, causal=True)
CASES = {
    "one_head": ONE_HEAD,
    # The last documents see no query, or have none; a window leaves tiles without a step.
    "group": Case(((130, 200), (70, 300), (0, 63), (65, 0)), 4, 1, 40, torch.float16, True),
    "window": dataclasses.replace(ONE_HEAD, documents=((40, 290), (129, 129)), window=(30, 0)),
}


@pytest.mark.parametrize("name", CASES)
def test_number_of_programs_changes_no_bit_of_dk_and_dv(name, monkeypatch):
    """One program works on all tiles, or several share them; dq is added in varying order."""
    case = CASES[name]
    inputs = make_inputs(case)
    results = []
    for programs in (1, 3):
        emulate(monkeypatch, varlen, seed=programs)
        monkeypatch.setattr(varlen, "multiprocessors", lambda device, n=programs: n)
        results.append(attention(case, inputs, backend="hopper"))
        assert_matches_oracle(results[-1], case, inputs)
    assert torch.equal(results[0].dk, results[1].dk)
    assert torch.equal(results[0].dv, results[1].dv)


def test_plain_calls_up_to_64_columns_are_persistent():
    for head_dim in (8, 64):
        assert config.is_persistent(config.backward_tile(head_dim, False, plain=True))
        assert not config.is_persistent(config.backward_tile(head_dim, False, plain=False))
        assert not config.is_persistent(config.backward_tile(head_dim, True, plain=True))
    assert not config.is_persistent(config.backward_tile(72, False, plain=True))
