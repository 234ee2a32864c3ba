"""Tests that the workloads are the same on every machine."""

import pytest

from lctrain_kernels.bench.workloads import WORKLOADS, Workload, lognormal_lengths


def test_mix32k_is_the_published_mix():
    lengths = WORKLOADS["mix32k"].lengths
    assert len(lengths) == 41
    assert max(lengths) == 3105
    assert sum(lengths) == 32_768


def test_mix32k_tail_has_a_heavy_tail():
    lengths = WORKLOADS["mix32k_tail"].lengths
    assert max(lengths) == 9430
    assert sum(length < 200 for length in lengths) == 24
    assert len(lengths) == 49


@pytest.mark.parametrize("name", sorted(WORKLOADS))
def test_every_workload_fills_its_name(name):
    workload = WORKLOADS[name]
    assert workload.name == name
    assert workload.tokens == (131_072 if "128k" in name else 32_768)
    assert workload.heads % workload.heads_kv == 0
    assert (workload.dropout_p > 0) == name.endswith("dropout")


def test_lognormal_lengths_keep_the_shortest_but_for_the_last():
    lengths = lognormal_lengths(5000, mu=1.0, sigma=2.0, shortest=16, seed=3)
    assert sum(lengths) == 5000
    assert min(lengths[:-1]) >= 16


def test_flops_of_a_square_are_those_of_two_products_halved():
    workload = Workload("x", (10, 20), heads=3, heads_kv=1, head_dim=8)
    assert workload.forward_flops == 2 * (2 * 10**2 * 8 + 2 * 20**2 * 8) * 3 // 2
    assert workload.backward_flops == 2.5 * workload.forward_flops


def test_description_names_what_matters():
    workload = Workload("x", (1000, 24), heads=4, heads_kv=2, head_dim=8, dropout_p=0.1)
    assert workload.describe() == (
        "2 documents, 1,024 tokens, longest 1,000, 4/2 heads of 8, dropout 0.1"
    )
