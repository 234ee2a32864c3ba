"""Tests the protocol of tasks: the runner, the table of any task, and the registry by name."""

import csv
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

from lctrain.data import TokenizedDocument
from lctrain.eval import Item, Measure, Result, Run, Subject, Task, computed
from lctrain.eval.measure_table import MeasureTable
from lctrain.eval.reading import GivenReading
from lctrain.eval.registry import make_task
from lctrain.eval.run_task import progress_bar
from lctrain.eval.tasks.needle import Needle
from lctrain.eval.tasks.passkey import PasskeyRetrieval
from lctrain.eval.tasks.perplexity import Perplexity
from lctrain.eval.tasks.ruler import Ruler
from tests.numerics import near


class Counting(Task):
    """Scores numbers; right at lengths of at most `reach`, and at double that for even items."""

    measures = (
        Measure("right", "Right answers", is_share=True, threshold=0.75),
        Measure("cost", "Cost", larger_is_better=False),
    )
    title = "Counting"
    unit = "number"
    name = "counting"

    def __init__(self, reach: int = 20, kinds: int = 2) -> None:
        self.reach = reach
        self.kinds = kinds
        self.read = []

    def make(self, length):
        return list(range(8))

    def score(self, reader, length, made):
        self.read.append(length)
        for number in made:
            right = length <= self.reach * (2 if number % 2 == 0 else 1)
            columns = {"kind": f"kind {number % self.kinds}"} if self.kinds > 1 else {}
            yield Item(f"n{number}", {"right": float(right), "cost": 2.0 * length}, 1.0, columns)
            reader.advance(1)

    def size(self, length):
        return 8


def run_of(task, model, lengths=(8, 20, 40, 80)):
    return Run.prepared(task, Subject(model, name="m"), [GivenReading()], lengths, max_tokens=99)


@pytest.fixture
def table(make_llama) -> MeasureTable:
    run = run_of(Counting(), make_llama())
    return run.task.table(computed(run))


def test_items_without_a_measure_are_an_error(make_llama):
    class Half(Counting):
        def score(self, reader, length, made):
            for item in super().score(reader, length, made):
                yield Item(item.id, {"right": 1.0})

    with pytest.raises(ValueError, match="of counting must hold cost, right, got right in n0"):
        computed(run_of(Half(), make_llama()))


def test_rows_are_means_by_length_and_column(table):
    measure, cost = table.measures
    assert table.means(measure, "").tolist() == [[1, 1], [1, 1], [1, 0], [0, 0]]
    assert table.means(cost, "").tolist() == [[2.0 * n] * 2 for n in (8, 20, 40, 80)]
    rows = table.as_dicts()
    assert [row["items"] for row in rows] == [4] * 8
    assert rows[0]["kind"] == "kind 0"
    assert rows[0]["right_low"] < rows[0]["right"] == near(rows[0]["right_high"])
    assert math.isnan(rows[0]["cost_low"])  # four equal items say nothing about others
    assert math.isnan(rows[0]["cost_high"])


def test_the_effective_length_is_the_longest_that_is_mastered_with_all_shorter_ones(table):
    measure, cost = table.measures
    even, odd = table.groups
    assert table.effective_length(measure, "", even) == 40
    assert table.effective_length(measure, "", odd) == 20
    assert table.effective_length(measure, "", None) == 20
    assert table.effective_length(cost, "", even) is None


def test_a_model_that_fails_at_the_shortest_length_has_no_effective_length(make_llama):
    run = run_of(Counting(reach=1, kinds=1), make_llama())
    table = run.task.table(computed(run))
    assert table.effective_length(table.measures[0], "", ()) == 0


@pytest.mark.parametrize("kinds", [1, 2])
def test_files_text_and_metrics(make_llama, tmp_path, kinds):
    run = run_of(Counting(kinds=kinds), make_llama())
    table = run.task.table(computed(run))
    paths = table.save(tmp_path)
    assert {path.name for path in paths.values()} == {
        f"counting.{k}" for k in ("csv", "json", "png")
    }
    rows = list(csv.DictReader(paths["csv"].open(newline="")))
    assert len(rows) == 4 * kinds
    assert ("kind" in rows[0]) == (kinds > 1)
    content = json.loads(paths["json"].read_text())
    found = [entry["tokens"] for entry in content["effective_length"]]
    assert found == ([40, 20, 20] if kinds == 2 else [20])
    assert paths["png"].read_bytes().startswith(b"\x89PNG")
    text = str(table)
    assert "Counting of m: Right answers" in text
    assert "100.0%" in text
    assert len(table.metrics()) == 4 * kinds
    expected = "counting_kind_1_40" if kinds == 2 else "counting_40"
    assert table.metrics()[expected] == (0.0 if kinds == 2 else 0.5)


def test_cells_that_are_done_are_not_computed_again(make_llama):
    run = run_of(Counting(), make_llama())
    done = {}
    with progress_bar(run.size(done), "number", False) as bar:
        run.compute(done, bar)
        assert run.task.read == [8, 20, 40, 80]
        del done[run.cells()[2]]
        assert run.size(done) == 8
        run.compute(done, bar)
    assert run.task.read == [8, 20, 40, 80, 40]
    assert list(run.results(done)[""]) == [8, 20, 40, 80]


def test_the_progress_bar_counts_units(make_llama, capsys):
    computed(run_of(Counting(), make_llama()), progress=True)
    assert "32/32" in capsys.readouterr().err


def test_a_task_of_ones_own_is_built_by_its_target():
    own = {"mine": {"_target_": f"{__name__}.Counting", "reach": 3}}
    task = make_task("mine", SimpleNamespace(own_tasks=own))
    assert (task.name, task.reach) == ("mine", 3)
    assert np.isfinite(task.size(8))


@pytest.mark.parametrize(
    ("name", "own", "message"),
    [
        ("none", {}, r"tasks must be some of perplexity, .*, got \['none'\]. Name a task"),
        (
            "mine",
            {"mine": {"_target_": "types.SimpleNamespace"}},
            r"own_tasks.mine._target_ must be a lctrain.eval.Task, got one .* a SimpleNamespace",
        ),
    ],
)
def test_a_name_without_a_task_is_an_error(name, own, message):
    with pytest.raises(ValueError, match=message):
        make_task(name, SimpleNamespace(own_tasks=own))


@pytest.mark.parametrize(
    "task", [PasskeyRetrieval(), Needle(), Ruler()], ids=["passkey", "needle", "ruler"]
)
def test_a_task_of_texts_without_a_tokenizer_is_an_error(make_llama, task):
    message = f"tokenizer must be given for {task.name}, got none. Set data.tokenizer"
    with pytest.raises(ValueError, match=message):
        run_of(task, make_llama())


def test_perplexity_needs_no_tokenizer(make_llama):
    documents = [TokenizedDocument("d", np.arange(30), 0)]
    subject = Subject(make_llama(), documents=documents)
    task = Perplexity(begin=None)
    run = Run.prepared(task, subject, [GivenReading()], (8,), max_tokens=64)
    assert run.size({}) == 29


def test_rows_of_items_with_other_columns_have_the_same_keys(tmp_path):
    totals = {"right": 1.0, "cost": 1.0}
    results = {"": {8: Result((Item("a", totals, columns={"kind": "x"}), Item("b", totals)))}}
    table = MeasureTable.of("own", "Own", "item", Counting.measures, results, Subject(None))
    first, second = table.as_dicts()
    assert list(first) == list(second)
    assert (first["kind"], second["kind"]) == ("x", None)
    assert table.save(tmp_path)["csv"].exists()


def test_a_cell_without_items_is_an_error(make_llama):
    task = Counting()
    task.score = lambda reader, length, made: iter(())
    with pytest.raises(ValueError, match="counting must score at least one number at length 8"):
        computed(run_of(task, make_llama()))


def test_the_text_of_losses_has_their_standard_errors():
    measures = (Measure("gain", "Gain", larger_is_better=True), Measure("found", "", is_share=True))
    items = tuple(Item(f"{i}", {"gain": gain, "found": 1.0}) for i, gain in enumerate((0.1, 0.3)))
    results = {"": {8: Result(items, {}), 16: Result(items[:1], {})}}
    subject = Subject(model=None, name="m")
    text = str(MeasureTable.of("t", "T", "document", measures, results, subject))
    lines = [line.split() for line in text.splitlines()]
    assert ["0.2000", "0.1000"] in lines
    assert ["error", "±0.1000", "-"] in lines  # one item has no error
    assert sum(line[0] == "error" for line in lines) == 1  # shares have their counts
