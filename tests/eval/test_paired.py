"""Tests the paired comparison of runs, on runs whose difference is known."""

import csv
from types import MappingProxyType

import numpy as np
import pytest

from lctrain.eval import Item, Result
from lctrain.eval.cells import Cell, CellStore
from lctrain.eval.paired import compare_runs
from tests.eval.test_task import Counting
from tests.numerics import near

numbers = np.random.default_rng(0)
EASE = numbers.normal(size=40)  # how easy an item is for every model


def make_run(
    folder, gain=0.0, methods=("",), items=40, prefix="n", weight=1.0, identity=MappingProxyType({})
):
    folder.mkdir(parents=True)
    store = CellStore.create(folder, dict(identity))
    store.describe(Counting())
    for method in methods:
        for length in (8, 16):
            store[Cell("counting", method, length)] = Result(
                tuple(
                    Item(
                        f"{prefix}{n}",
                        {
                            "right": weight * float(EASE[n] + gain > 0),
                            "cost": weight * (5 - EASE[n] - gain + 0.01 * (n % 3)),
                        },
                        weight,
                    )
                    for n in range(items)
                )
            )
    return folder


def test_a_difference_within_the_spread_of_items_is_found_by_pairs(tmp_path):
    first, second = make_run(tmp_path / "a"), make_run(tmp_path / "b", gain=0.1)
    comparison = compare_runs([first, second])
    rows = {(row.length, row.measure.name): row for row in comparison.rows}
    assert set(rows) == {(n, name) for n in (8, 16) for name in ("right", "cost")}
    cost = rows[16, "cost"]
    assert cost.difference == near(-0.1)
    assert cost.high < 0  # although the items differ by much more
    assert cost.better == "b"
    assert rows[8, "right"].difference >= 0
    assert "b is better" in str(comparison)
    paths = comparison.save(tmp_path / "out")
    stored = list(csv.DictReader(paths["csv"].open(newline="")))
    assert len(stored) == 4
    assert stored[0]["first"] == "a"


def test_a_run_is_no_better_than_itself(tmp_path):
    folder = make_run(tmp_path / "a")
    for row in compare_runs([folder, folder]).rows:
        assert (row.difference, row.low, row.high, row.better) == (0.0, 0.0, 0.0, "")


@pytest.mark.parametrize(("items", "found"), [(1, False), (3, False), (5, False), (6, True)])
def test_few_equal_differences_show_no_better_run(tmp_path, items, found):
    """One run has no item right, the other all: the standard error of the difference is 0."""
    first = make_run(tmp_path / "a", gain=-9.0, items=items)
    second = make_run(tmp_path / "b", gain=9.0, items=items)
    comparison = compare_runs([first, second])
    for row in comparison.rows:
        if row.measure.name == "right":
            assert (row.difference, row.better) == (1.0, "b" if found else "")
            assert ((row.low, row.high) == (1.0, 1.0)) == found
            few = f"[no interval from {'1 item' if items == 1 else f'{items} items'}]"
            assert row.interval == ("[+1.0000, +1.0000]" if found else few)
            assert f"+1.0000 {row.interval}" in str(comparison)
    assert "nan" not in str(comparison)


def test_runs_are_compared_method_by_method_and_single_methods_with_each_other(tmp_path):
    both = make_run(tmp_path / "a", methods=("plain", "yarn"))
    one = make_run(tmp_path / "b", methods=("yarn",))
    other = make_run(tmp_path / "c", methods=("plain",))
    assert {row.methods for row in compare_runs([both, one]).rows} == {("yarn", "yarn")}
    assert {row.methods for row in compare_runs([one, other]).rows} == {("yarn", "plain")}
    assert {row.runs for row in compare_runs([both, one, other]).rows} == {("a", "b"), ("a", "c")}


def test_items_of_other_tokens_count_once_each(tmp_path):
    first, second = make_run(tmp_path / "a"), make_run(tmp_path / "b", gain=0.1, weight=3.0)
    rows = compare_runs([first, second]).rows
    assert [row.difference for row in rows if row.measure.name == "cost"] == near([-0.1, -0.1])


def test_items_of_the_same_name_and_other_contents_are_not_paired(tmp_path, caplog):
    texts = "hash of the documents"
    folder = make_run(tmp_path / "a", identity={"counting.seed": 0, "other.seed": 1, texts: "x"})
    with pytest.raises(ValueError, match=r"got .*a with counting.seed=0 and .*b with 1"):
        compare_runs([folder, make_run(tmp_path / "b", identity={"counting.seed": 1})])
    free = {"counting.seed": 0, "counting.items": 9, "other.seed": 2, "dtype": "float16"}
    assert compare_runs([folder, make_run(tmp_path / "c", identity=free | {texts: "x"})]).rows
    assert "other texts" not in caplog.text
    assert compare_runs([folder, make_run(tmp_path / "d", identity=free | {texts: "y"})]).rows
    assert "other texts or other tokens" in caplog.text


def test_runs_that_cannot_be_compared_are_an_error(tmp_path):
    folder = make_run(tmp_path / "a")
    with pytest.raises(ValueError, match="compare must name at least two folders"):
        compare_runs([folder])
    with pytest.raises(ValueError, match=r"compare must be a folder of lctrain-eval, got .*none"):
        compare_runs([folder, tmp_path / "none"])
    with pytest.raises(ValueError, match=r"items in common, .* the same tasks, methods"):
        compare_runs([folder, make_run(tmp_path / "b", prefix="m")])
