"""Tests training on packs that ranks share, on two data ranks of two context ranks.

All checks read the results of one group of processes, since each of them imports torch for seconds.
"""

from functools import partial

import pytest
import torch

from tests.distributed.shared_packs import (
    ACCUMULATED,
    CASES,
    RANKS,
    Recorder,
    fit,
    make_model,
    packs,
)
from tests.float64 import built_in_float64
from tests.forked import run_forked
from tests.numerics import assert_equal_in_float64, near


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    ranks = "tests.distributed.shared_packs"
    run_forked(ranks, str(folder), env={"NODE_RANK": "0"}, ignored=True)
    return torch.load(folder / "found.pt", weights_only=False)


def in_turn(data_ranks, _):
    """Returns the packs of all data ranks, so that one rank accumulates those of a step."""
    by_rank = [packs(rank) for rank in range(data_ranks)]
    begins = range(0, len(by_rank[0]), ACCUMULATED)
    windows = [[x for own in by_rank for x in own[i : i + ACCUMULATED]] for i in begins]
    return [pack for window in windows for pack in window]


def test_the_second_module_of_a_strategy_is_sharded_too(found):
    records, weights = found["second"]
    for mine, theirs in zip(records, found["heads"][0], strict=True):
        assert mine == near(theirs)
    assert_equal_in_float64(weights, found["heads"][1])


def test_a_leak_between_ranks_is_found(found):
    """One rank alone would compute the pack without the shared boundaries, and find nothing."""
    assert "documents of a pack mix" in found["errors"]["leak"]


def test_packs_that_differ_after_the_first_are_found(found):
    message = "the 2 ranks of a context group must get the same pack, got different ones"
    assert message in found["errors"]["diverging"]


def test_a_loss_that_is_not_finite_on_one_rank_stops_all(found):
    """Rank 0 names the rank, whose peers have finite losses; or all leave out the same step."""
    assert "on rank 3" in found["errors"]["infinite"]
    assert found["skipped"] == [1] * RANKS


def test_the_head_is_gathered_once_for_all_tokens(found):
    """One all-gather for each of the two layers, and one for the root, which has the head."""
    assert found["gathers"] == {8: 3, 3000: 3}


def test_heads_are_exchanged_inside_a_machine(found):
    """And keys between machines: four ranks on two machines make two heads groups."""
    assert found["heads", "dropout-machines"] == 2
    assert found["heads", "dropout-heads"] == 4


@pytest.mark.parametrize("name", CASES)
def test_shared_packs_train_like_whole_ones(found, tmp_path, name):
    """Unequal packs, ranks without tokens, accumulation with an incomplete window, clipping."""
    records, weights = found[name]
    case = CASES[name]
    data_ranks = RANKS // case.context
    with built_in_float64(float32_frequencies=case.attention["name"] == "dual_chunk"):
        module = Recorder(make_model(case.version), case, partial(in_turn, data_ranks))
        settings = {"accumulate_grad_batches": data_ranks * ACCUMULATED}
        expected, reference = fit(tmp_path, module, **settings)
    assert len(records) == len(expected) == 3
    for mine, theirs in zip(records, expected, strict=True):
        assert mine == near(theirs)
    assert_equal_in_float64(weights, reference)
