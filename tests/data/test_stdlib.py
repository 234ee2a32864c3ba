"""Tests the default data: fill and balance of packs of this interpreter's standard library."""

import numpy as np
import pytest

from lctrain.data import PackedDataModule
from lctrain.data.order import epoch_order, imbalance

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def stdlib_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("stdlib")


@pytest.mark.parametrize("max_tokens", [4096, 32768])
def test_fill_is_99_percent_and_ranks_are_balanced(stdlib_cache, max_tokens):
    data = PackedDataModule(max_tokens=max_tokens, cache_dir=stdlib_cache)
    data.setup()
    report = data.packing_report
    assert report.fill >= 0.99
    assert report.truncated == report.dropped == 0
    assert len(data.held_out_documents()) > 20
    costs = data.train_dataloader()._dataloader.dataset.plan.costs()
    for world_size in (2, 8):
        order = epoch_order(costs, world_size, seed=0, epoch=0)
        plain = np.random.default_rng(0).permutation(order.flatten()).reshape(order.shape)
        assert imbalance(order, costs) - 1 < 0.2 * (imbalance(plain, costs) - 1)
