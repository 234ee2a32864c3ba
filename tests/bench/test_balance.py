"""Tests the simulation of the balance over ranks: its bars, its record and its table."""

import json

import numpy as np
import pytest

from lctrain.bench import balance
from lctrain_kernels.bench.balance_report import balance_table
from lctrain_kernels.bench.newest import newest_record
from tests.numerics import near


def test_spread_sums_the_packs_of_a_step():
    order = np.array([[0, 1], [2, 3]])
    costs = np.array([1.0, 3.0, 5.0, 3.0])
    assert balance.spread(order, costs, packs=1) == near((3 / 2 + 5 / 4) / 2)
    assert balance.spread(order, costs, packs=2) == 1.0


@pytest.mark.parametrize("mix", balance.MIXES, ids=lambda mix: f"{mix.max_tokens}")
@pytest.mark.parametrize("seed", [0, 1])
def test_the_bars_hold(mix, seed):
    found = balance.simulate(mix, ranks=8, seed=seed)
    assert found["fill"] >= 0.98
    assert found["balanced"]["1"] <= 1.02
    assert found["balanced"]["4"] <= 1.05
    assert found["as_drawn"]["1"] > 1.5


def test_it_is_a_function_of_its_arguments():
    mix = balance.Mix(4096, 1.0, 2000)
    assert balance.simulate(mix, 4, seed=1) == balance.simulate(mix, 4, seed=1)
    assert balance.simulate(mix, 4, seed=1) != balance.simulate(mix, 4, seed=2)


def test_the_command_writes_a_record_and_its_table(tmp_path, capsys):
    output = tmp_path / "balance" / "balance.json"
    assert balance.main(["--tiny", "--seeds", "2", "--output", str(output)]) == 0
    record = newest_record(output.parent.name, output.parent.parent)
    assert record == json.loads(output.read_text())
    assert len(record["results"]) == 2 * len(balance.MIXES)
    assert balance_table(record) in capsys.readouterr().out
    assert newest_record("nothing", tmp_path) is None


def test_the_table_has_means_of_seeds_and_the_worst_fill():
    result = {"mix": {"max_tokens": 32768, "sigma": 1.0}, "as_drawn": {"1": 2.0}}
    record = {
        "date": "2026-11-30T00:00:00+00:00",
        "settings": {"ranks": 8, "window": 256, "seeds": 2},
        "results": [
            {**result, "balanced": {"1": 1.01}, "fill": 1.0},
            {**result, "balanced": {"1": 1.03}, "fill": 0.99},
        ],
    }
    assert "| 32,768 | 1.0 | 1 | 2.000 | 1.020 | 0.990 |" in balance_table(record)
