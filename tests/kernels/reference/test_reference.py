"""Compares the dense reference with torch, and the CPU path with the dense reference."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lctrain.kernels import flash_attn_varlen_func
from lctrain_kernels.reference.attention import dense_attention, visible_mask
from lctrain_kernels.varlen import reference as varlen
from tests.kernels.cases import TINY_CASES
from tests.kernels.oracle import Case, attention, cumulative, dense, equal_lengths, make_inputs
from tests.numerics import assert_equal_in_float64, near


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (2, 0), (1, 3), (0, 0), (-1, 2), (4, -1)])
@pytest.mark.parametrize("lengths", [(5, 5), (3, 7), (7, 3), (1, 4)])
def test_visible_mask_pair_by_pair(window, lengths):
    (length_q, length_k), (left, right) = lengths, window
    mask = visible_mask(length_q, length_k, left, right)
    for i in range(length_q):
        for j in range(length_k):
            aligned = i + length_k - length_q
            seen = (left < 0 or j >= aligned - left) and (right < 0 or j <= aligned + right)
            assert mask[i, j] == seen, (i, j)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_the_oracle_is_torchs_attention(causal):
    q = torch.randn(6, 4, 8, dtype=torch.float64)
    k, v = (torch.randn(6, 2, 8, dtype=torch.float64) for _ in "kv")
    out, lse, weights = dense_attention(q, k, v, window=(-1, 0 if causal else -1))
    heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))
    expected = F.scaled_dot_product_attention(*heads_first, is_causal=causal, enable_gqa=True)
    assert_equal_in_float64(out, expected[0].transpose(0, 1))
    assert_equal_in_float64(weights.sum(-1), torch.ones(4, 6, dtype=torch.float64))
    if not causal:
        logits = torch.einsum("ihd,jhd->hij", q, k.repeat_interleave(2, 1)) * 8**-0.5
        assert_equal_in_float64(lse, logits.logsumexp(-1))


def test_the_oracles_features_entry_by_entry():
    """Computes softcap, ALiBi, a sink and dropout a second time, in loops over Python numbers."""
    q, k, v = (torch.randn(n, 1, 2, dtype=torch.float64) for n in (2, 3, 3))
    slope, sink, cap = 0.3, 0.4, 1.5
    out, lse, signed = dense_attention(
        q,
        k,
        v,
        softcap=cap,
        alibi_slopes=torch.tensor([slope]),
        learnable_sink=torch.tensor([sink]),
        dropout_p=0.5,
        dropout_seed=2,
    )
    slope, sink = (torch.tensor(x).double().item() for x in (slope, sink))
    for i in range(2):
        logits = []
        for j in range(3):
            score = float(q[i, 0] @ k[j, 0]) / math.sqrt(2)
            logits.append(cap * math.tanh(score / cap) - slope * abs(i + 1 - j))
        total = sum(math.exp(x) for x in [*logits, sink])
        assert float(lse[0, i]) == near(math.log(total))
        expected = torch.zeros(2, dtype=torch.float64)
        for j, x in enumerate(logits):
            weight = float(signed[0, i, j])
            assert abs(weight) == near(math.exp(x) / total)
            expected += 2 * max(weight, 0.0) * v[j, 0]
        assert_equal_in_float64(out[i, 0], expected)
    assert (signed < 0).any()
    assert (signed > 0).any()


def test_the_oracle_in_chunks_is_the_oracle():
    """test_varlen_gpu.py needs chunks of queries for long documents."""
    case = Case(
        ((30, 30), (9, 25), (25, 9)),
        causal=True,
        window=(12, -1),
        alibi="heads",
        sink=True,
        dtype=torch.float64,
    )
    inputs = make_inputs(case)
    whole = dict(dense(case, inputs, torch.float64).items())
    for name, tensor in dense(case, inputs, torch.float64, chunk=7).items():
        assert_equal_in_float64(tensor, whole[name], name)


@pytest.mark.parametrize("name", ["window_left-causal", "dropout-softcap-gqa4", "everything"])
def test_chunks_of_queries_change_nothing(name, monkeypatch):
    """The CPU path works in chunks of queries, so its memory is linear in a document's length."""
    case = dataclasses.replace(TINY_CASES[name], dtype=torch.float64)
    inputs = make_inputs(case)
    whole = dict(attention(case, inputs).items())
    monkeypatch.setattr(varlen, "_CHUNK_ELEMENTS", 1)
    for key, tensor in attention(case, inputs).items():
        assert_equal_in_float64(tensor, whole[key], key, tensor.dtype)


class LargestTensor(TorchDispatchMode):
    """Records the largest number of elements that any operation has returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.numel())
        return result


@pytest.mark.parametrize("dropout_p", [0.0, 0.1], ids=["plain", "dropout"])
def test_memory_is_bounded(dropout_p, monkeypatch):
    """No tensor grows quadratically: at most the limit, or 16 rows of logits."""
    limit, heads, length = 1 << 14, 2, 600
    monkeypatch.setattr(varlen, "_CHUNK_ELEMENTS", limit)
    case = Case(equal_lengths(length), heads=heads, heads_k=1, dropout_p=dropout_p)
    inputs = make_inputs(dataclasses.replace(case, dtype=torch.float32))
    with LargestTensor() as largest:
        attention(case, inputs)
    bound = max(limit, heads * 16 * length, inputs.q.numel())
    assert bound < heads * length * length / 10
    assert largest.elements <= bound


GRADCHECKED = {
    "causal": {"causal": True},
    "window-softcap": {"window_size": (2, 1), "softcap": 1.5},
    "dropout": {"dropout_p": 0.3, "dropout_seed": 5, "causal": True},
    "alibi-scale": {"alibi_slopes": torch.tensor([0.3, 0.1]), "softmax_scale": 0.4},
}


@pytest.mark.parametrize("options", GRADCHECKED.values(), ids=GRADCHECKED.keys())
@pytest.mark.parametrize("with_sink", [False, True], ids=["", "sink"])
def test_gradcheck(options, with_sink):
    """Finite differences of out and lse in q, k, v and the sink; rows without keys have no lse."""
    cu_q, cu_k = cumulative([3, 4], "cpu"), cumulative([5, 3], "cpu")
    q = torch.randn(7, 2, 3, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(8, 1, 3, dtype=torch.float64, requires_grad=True) for _ in "kv")
    sink = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def call(q, k, v, *sink):
        out, lse = flash_attn_varlen_func(
            q,
            k,
            v,
            cu_q,
            cu_k,
            4,
            5,
            return_lse=True,
            learnable_sink=sink[0] if sink else None,
            **options,
        )
        return out, lse.masked_fill(lse == -torch.inf, 0.0)

    leaves = (q, k, v, sink) if with_sink else (q, k, v)
    assert torch.autograd.gradcheck(call, leaves)


def test_other_documents_cannot_reach_a_result():
    """All other documents of the packed tensors hold NaN."""
    case = Case(equal_lengths(9, 7), dtype=torch.float32)
    inputs = make_inputs(case)
    poisoned = dataclasses.replace(inputs, k=inputs.k.clone(), v=inputs.v.clone())
    poisoned.k[:9] = poisoned.v[:9] = float("nan")
    expected, actual = attention(case, inputs), attention(case, poisoned)
    assert torch.equal(actual.out[9:], expected.out[9:])
    assert torch.equal(actual.dk[9:], expected.dk[9:])
    assert actual.out[:9].isnan().all()
