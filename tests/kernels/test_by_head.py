"""Tests the backward that computes one key/value head at a time."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lctrain_kernels.by_head import backward_by_head
from tests.kernels.oracle import Case, attention, equal_lengths, make_inputs

CASES = {
    "grouped": Case(equal_lengths(50, 17), heads=4, heads_k=2, causal=True),
    "window-dropout": Case(
        equal_lengths(33, 7), window=(9, 3), dropout_p=0.3, fused_qkv=True, dout_order="htd"
    ),
    "dropout-softcap": Case(((7, 20), (33, 33)), causal=True, dropout_p=0.2, softcap=3.0),
    "alibi-sink": Case(equal_lengths(40), heads=4, heads_k=4, alibi="heads", sink=True),
    "alibi-by-document": Case(equal_lengths(40, 3), alibi="documents", window_on_device=True),
    "chunks-dropout": Case(equal_lengths(40), causal=True, dropout_p=0.3, chunks=(16, 4)),
}


RUNS = [(name, "pytorch") for name in CASES]
RUNS += [(name, "triton") for name in ("grouped", "window-dropout", "chunks-dropout")]


@pytest.mark.parametrize(("name", "backend"), RUNS, ids=map("-".join, RUNS))
def test_results_and_gradients_have_the_same_bits(name, backend, device):
    case = CASES[name]
    place = "cpu" if backend == "pytorch" else device
    if backend == "pytorch":  # torch's batched products choose their order by the number of heads
        case = replace(case, dtype=torch.float64)
    inputs = make_inputs(case, place)
    whole = dict(attention(case, inputs, backend=backend).items())
    with backward_by_head():
        found = dict(attention(case, inputs, backend=backend).items())
    assert found.keys() == whole.keys()
    for key, expected in whole.items():
        assert torch.equal(found[key], expected), key


class Calls(TorchDispatchMode):
    """Notes the heads of the keys in every call of attention's backward."""

    def __init__(self):
        super().__init__()
        self.heads = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.lctrain.varlen_backward.default:
            self.heads.append(args[3].shape[1])  # dout, dlse, q, k
        return func(*args, **(kwargs or {}))


def test_the_backward_runs_once_for_each_key_value_head():
    case = CASES["grouped"]
    inputs = make_inputs(case)
    with Calls() as calls:
        attention(case, inputs, backend="pytorch")
        with backward_by_head():
            attention(case, inputs, backend="pytorch")
        attention(case, inputs, backend="pytorch")
    assert calls.heads == [2, 1, 1, 2]
