"""Tests how ranks share documents and prompts; tests/distributed/test_sharded_kinds runs them."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import lctrain
from lctrain.distributed import Topology
from lctrain.eval.runner import score_windows
from lctrain.eval.shared_work import joined, owners, share_of, summed
from lctrain.eval.windows import cut_windows
from tests.float64 import built_in_float64
from tests.numerics import near
from tests.train_two_ranks import make_model


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_every_part_has_one_owner_and_work_is_even(size):
    costs = [1, 9, 3, 4, 7, 5, 5, 2]
    owner = owners(costs, size)
    work = [sum(c for c, of in zip(costs, owner, strict=True) if of == r) for r in range(size)]
    assert sum(work) == sum(costs)
    assert max(work) <= sum(costs) / size + max(costs)
    if size <= 3:
        assert max(work) - min(work) <= min(costs)


@pytest.mark.parametrize(("size", "context"), [(1, 1), (2, 1), (4, 2), (3, 1)])
def test_shares_are_joined_in_order(size, context):
    """With as many parts on each rank; ranks that share a pack compute the same parts."""
    parts = list(range(10, 17))
    ranks = [Topology(rank, size, context=context) for rank in range(size)]
    shares = [share_of(parts, each) for each in ranks]
    assert len({len(share) for share in shares}) == 1
    gathered = SimpleNamespace(gather=lambda value: shares, context=context)
    assert joined(shares[0], len(parts), gathered) == parts


def test_sums_of_one_rank_keep_their_bits():
    sums = [np.array([0.1, 0.0]), np.array([0.1, 0.0]), np.array([0.0, 0.7]), np.array([0.0, 0.7])]
    ranks = SimpleNamespace(data_size=2, context=2, gather=lambda value: sums)
    assert summed(sums[0], ranks).tolist() == [0.1, 0.7]


@pytest.mark.parametrize("patched", [True, False], ids=["packs", "rows"])
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_score_every_window_once(patched, size):
    """And as often as the others call the model, if they share its parameters."""
    documents = [np.arange(n) % 89 + 3 for n in (9, 60, 14)]
    windows = cut_windows([len(ids) for ids in documents], 16)
    with built_in_float64():
        model = make_model().eval()
        calls = []
        model.model.layers[0].register_forward_pre_hook(lambda *given: calls.append(given))
        if patched:
            lctrain.patch_model(model)

        def scored(ranks):
            calls.clear()
            options = {"max_tokens": 20, "device": torch.device("cpu"), "ranks": ranks}
            found = {}
            for batch in score_windows(model, documents, windows, **options):
                places = zip(batch.documents.tolist(), batch.positions.tolist(), strict=True)
                found |= dict(zip(places, batch.losses.tolist(), strict=True))
            return found, len(calls)

        scored(Topology())  # the first call checks the output head
        whole, _ = scored(Topology())
        shares = [scored(Topology(rank, size, is_sharded=True)) for rank in range(size)]
    assert len({count for _, count in shares}) == 1
    found = {}
    for share, _ in shares:
        assert not found.keys() & share.keys()
        found |= share
    assert found == near(whole)
    of_documents = [{document for document, _ in share} for share, _ in shares]
    assert sum(map(len, of_documents)) == len(documents)
