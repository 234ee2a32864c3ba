"""Tests how CI divides the tests among its workers: by file, files with long tests first."""

import gc
from types import SimpleNamespace

import pytest

from tests.conftest import file_of, pytest_collection_modifyitems, pytest_xdist_make_scheduler


def test_one_worker_runs_all_tests_of_a_file(pytestconfig, monkeypatch):
    pytest.importorskip("xdist")
    monkeypatch.setattr(pytestconfig.option, "tx", ["2*popen"])
    monkeypatch.setattr(pytestconfig.option, "dist", "load")
    assert pytest_xdist_make_scheduler(pytestconfig, None) is None
    monkeypatch.setattr(pytestconfig.option, "dist", "loadgroup")
    unit = pytest_xdist_make_scheduler(pytestconfig, None)._split_scope
    assert unit("tests/a.py::test_x[tests/b.py::y]") == unit("tests/a.py::test_z") == "tests/a.py"
    assert unit("tests/a.py::test_x[y]@triton") == unit("tests/b.py::test_x@triton") == "triton"


def test_files_stay_together_and_those_with_long_tests_are_first():
    def item(name, *marks):
        return SimpleNamespace(nodeid=name, get_closest_marker=lambda mark: mark in marks or None)

    items = [item(f"a.py::test_{n}") for n in range(2)] + [item(f"b.py::test_{n}") for n in "abc"]
    items += [item("c.py::test_x"), item("c.py::test_y", "slow")]
    pytest_collection_modifyitems(items)
    assert [file_of(one) for one in items] == ["c.py"] * 2 + ["b.py"] * 3 + ["a.py"] * 2
    assert [one.nodeid for one in items[:2]] == ["c.py::test_x", "c.py::test_y"]


def test_the_garbage_collector_leaves_out_what_collection_has_made():
    """With all tests these are 700,000 objects, among which every full collection would look."""
    assert gc.isenabled()
    assert gc.get_freeze_count() > 10_000
    made = [[] for _ in range(3)]
    made.append(made)
    assert any(one is made for one in gc.get_objects())  # what a test makes is looked at
