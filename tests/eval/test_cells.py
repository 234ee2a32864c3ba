"""Tests the store of finished cells: a killed evaluation goes on, and others are refused."""

import json
import os

import numpy as np
import pytest
import torch

from lctrain.eval import Item, Result
from lctrain.eval.cells import CELLS, Cell, CellStore
from lctrain.eval.resume import folder_to_resume
from tests.eval.test_task import Counting

IDENTITY = {"model": "m", "lengths": (8, 16)}
RESULT = Result((Item("a", {"right": 0.5}, 2.0, {"kind": "x"}, "said"),), {"windows": 3})


@pytest.fixture
def store(tmp_path) -> CellStore:
    made = CellStore.create(tmp_path, IDENTITY)
    made.describe(Counting())
    made[Cell("counting", "", 8)] = RESULT
    made[Cell("counting", "yarn", 16)] = Result(())
    return made


def test_what_is_read_is_what_was_stored(store, tmp_path):
    again = CellStore.read(tmp_path, "resume")
    assert dict(again) == dict(store)
    assert again[Cell("counting", "", 8)] == RESULT
    assert again.tasks["counting"].measures == Counting.measures
    assert len(again) == 2


def test_numbers_of_numpy_and_torch_are_stored_as_those_of_python(store, tmp_path):
    """A task of a user may yield them; a finished cell must not be lost for it."""
    item = Item("a", {"right": np.float32(0.5)}, np.int64(2), {"depth": np.float32(0.25), "x": [1]})
    store[Cell("counting", "", 16)] = Result((item,), {"n": torch.tensor(3)})
    again = CellStore.read(tmp_path, "resume")
    assert dict(again) == dict(store)
    (found,) = again[Cell("counting", "", 16)].items
    assert hash(tuple(found.columns.items())) == hash((("depth", 0.25), ("x", (1,))))


def test_a_line_that_a_kill_cut_off_is_computed_again(store, tmp_path):
    file = tmp_path / CELLS
    file.write_text(file.read_text()[:-20])
    again = CellStore.reopen(tmp_path, IDENTITY)
    assert list(again) == [Cell("counting", "", 8)]
    again[Cell("counting", "yarn", 16)] = Result(())
    assert dict(CellStore.read(tmp_path, "resume")) == dict(store)


def test_other_settings_are_refused(store, tmp_path):
    with pytest.raises(ValueError, match=r"same settings, got .* with lengths=\[8, 16\] instead"):
        CellStore.reopen(tmp_path, IDENTITY | {"lengths": [8]})
    with pytest.raises(ValueError, match=r"with seed=None instead of 3. Restore it"):
        CellStore.reopen(tmp_path, IDENTITY | {"seed": 3})
    store.require_same(IDENTITY | {"seed": 3}, unknown=["seed"])


def test_settings_of_tasks_without_finished_cells_may_change(store, tmp_path):
    tasks = ["counting", "other"]
    again = CellStore.reopen(tmp_path, IDENTITY | {"other.seed": 3}, tasks)
    assert again.identity["other.seed"] == 3
    assert CellStore.read(tmp_path, "resume").identity == again.identity
    CellStore.reopen(tmp_path, IDENTITY | {"other.seed": 4}, tasks)
    with pytest.raises(ValueError, match=r"with counting.seed=None instead of 3"):
        CellStore.reopen(tmp_path, IDENTITY | {"counting.seed": 3}, tasks)
    with pytest.raises(ValueError, match=r"with other.seed=4 instead of 5"):
        CellStore.reopen(tmp_path, IDENTITY | {"other.seed": 5}, ["counting"])


@pytest.mark.parametrize(
    "line", [{"task": "x"}, {"items": [{"name": "other"}], "task": "x", "method": "", "length": 8}]
)
def test_a_line_of_another_version_is_an_error(store, tmp_path, line):
    with (tmp_path / CELLS).open("a") as file:
        file.write(json.dumps(line) + "\n")
    with pytest.raises(ValueError, match="compare must be a folder of this version's lctrain-eval"):
        CellStore.read(tmp_path, "compare")


@pytest.mark.parametrize("content", [None, "", "no json\n", "3\n", '{"task": "x"}\n'])
def test_a_folder_without_cells_is_an_error(tmp_path, content):
    if content is not None:
        (tmp_path / CELLS).write_text(content)
    with pytest.raises(ValueError, match=r"compare must be a folder of lctrain-eval, got"):
        CellStore.read(tmp_path, "compare")


def test_a_finished_cell_stays(store):
    with pytest.raises(TypeError, match="stays in its file"):
        del store[Cell("counting", "", 8)]


def test_the_last_evaluation_without_a_report_goes_on(tmp_path):
    with pytest.raises(ValueError, match=r"got last, and .* holds none without a report"):
        folder_to_resume("last", tmp_path)
    with pytest.raises(ValueError, match="resume must be last or a folder of lctrain-eval"):
        folder_to_resume(str(tmp_path), tmp_path)
    for name in ("finished", "stopped"):
        (tmp_path / name).mkdir()
        (tmp_path / name / CELLS).write_text(json.dumps({"identity": {}}) + "\n")
    (tmp_path / "finished" / "report.html").touch()
    assert folder_to_resume("last", tmp_path) == tmp_path / "stopped"
    assert folder_to_resume(str(tmp_path / "finished"), tmp_path) == tmp_path / "finished"


def test_an_evaluation_that_was_refused_does_not_hide_the_stopped_one(tmp_path):
    for number, name in enumerate(("stopped", "refused")):
        (tmp_path / name).mkdir()
        store = CellStore.create(tmp_path / name, IDENTITY)
        if name == "stopped":
            store[Cell("counting", "", 8)] = RESULT
        os.utime(tmp_path / name / CELLS, (number, number))
    assert folder_to_resume("last", tmp_path) == tmp_path / "stopped"
