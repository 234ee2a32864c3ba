"""Tests packing: every token once, best fit decreasing, the counts in the report, and the speed."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lctrain.data.packing import plan_rows


def log_normal(count: int, seed: int = 0, mean: float = 6.5, sigma: float = 1.2) -> np.ndarray:
    lengths = np.random.default_rng(seed).lognormal(mean, sigma, count)
    return np.maximum(lengths, 1).astype(np.int64)


def naive_best_fit_decreasing(lengths: list[int], capacity: int) -> list[int]:
    """Returns the free tokens of each row, by the textbook algorithm."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [(room, row) for row, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting)[1]] -= length
        else:
            rooms.append(capacity - length)
    return rooms


def tokens_of(plan, lengths: np.ndarray) -> list[np.ndarray]:
    """Returns how often the rows contain each token of each document."""
    seen = [np.zeros(length, dtype=np.int64) for length in lengths]
    for row in range(len(plan)):
        for piece in plan.row(row):
            start = plan.starts[piece]
            seen[plan.documents[piece]][start : start + plan.lengths[piece]] += 1
    return seen


@pytest.mark.parametrize("capacity", [2, 7, 100, 1024, 1025, 5000])
def test_equals_the_definition_of_best_fit_decreasing(capacity):
    lengths = np.minimum(log_normal(400, mean=4), capacity)
    plan = plan_rows(lengths, capacity)
    rooms = [capacity - int(plan.lengths[plan.row(r)].sum()) for r in range(len(plan))]
    assert sorted(rooms) == sorted(naive_best_fit_decreasing(lengths.tolist(), capacity))


@pytest.mark.parametrize("window", [1, 50, 100_000])
def test_split_keeps_every_token_once(window):
    lengths = log_normal(300)
    plan = plan_rows(lengths, 512, window=window)
    assert all((count == 1).all() for count in tokens_of(plan, lengths))
    assert max(plan.lengths[plan.row(r)].sum() for r in range(len(plan))) <= 512
    assert plan.report.tokens == lengths.sum()
    assert plan.report.split == (lengths > 512).sum()
    assert plan.report.documents == 300
    assert plan.report.pieces == len(plan.lengths) == np.ceil(lengths / 512).sum()
    assert plan.report.truncated == plan.report.dropped == 0


def test_truncate_keeps_the_beginning_and_counts_the_rest():
    lengths = np.array([3, 10, 5, 8])
    plan = plan_rows(lengths, 5, overlong="truncate")
    seen = tokens_of(plan, lengths)
    assert [int(count.sum()) for count in seen] == [3, 5, 5, 5]
    assert all((count[:5] == 1).all() for count in seen)
    report = plan.report
    assert (report.truncated, report.truncated_tokens, report.documents) == (2, 8, 4)


def test_drop_leaves_out_whole_documents_and_counts_them():
    lengths = np.array([3, 10, 5, 8])
    plan = plan_rows(lengths, 5, overlong="drop")
    assert [int(count.sum()) for count in tokens_of(plan, lengths)] == [3, 0, 5, 0]
    report = plan.report
    assert (report.dropped, report.dropped_tokens, report.documents) == (2, 18, 2)
    assert report.tokens == 8


@pytest.mark.parametrize(
    ("overlong", "pieces"),
    [("split", [4, 4, 1, 3]), ("truncate", [4, 3]), ("drop", [3])],
)
def test_documents_may_be_shorter_than_rows(overlong, pieces):
    plan = plan_rows(np.array([9, 3]), 16, max_document_tokens=4, overlong=overlong)
    assert plan.lengths.tolist() == pieces
    assert len(plan) == 1
    lost = plan.report.truncated_tokens + plan.report.dropped_tokens
    assert plan.report.tokens + lost == 12


def test_windows_are_not_mixed():
    plan = plan_rows(log_normal(100), 512, window=30)
    for row in range(len(plan)):
        assert len(set(plan.documents[plan.row(row)] // 30)) == 1


def test_piece_ids_do_not_depend_on_the_window():
    lengths = log_normal(200)
    small, large = plan_rows(lengths, 512, window=10), plan_rows(lengths, 512)
    assert np.array_equal(small.documents, large.documents)
    assert np.array_equal(small.starts, large.starts)


def test_costs_are_sums_of_squares():
    plan = plan_rows(np.array([4, 3, 3, 2]), 5)
    expected = [float((plan.lengths[plan.row(r)] ** 2).sum()) for r in range(len(plan))]
    assert plan.costs().tolist() == expected


def test_fill_of_the_report_and_its_text():
    report = plan_rows(np.array([4, 4]), 5, dropped_empty=3, dropped_unreadable=1).report
    assert report.fill == 0.8
    assert "fill 0.8000" in str(report)
    assert "0 split, 0 truncated, 0 dropped, 3 empty, 1 unreadable" in str(report)


@pytest.mark.parametrize(
    ("overlong", "text"),
    [
        ("truncate", "0 split, 1 truncated (1,495 tokens lost), 0 dropped, 0 empty"),
        ("drop", "0 split, 0 truncated, 1 dropped (1,500 tokens lost), 0 empty"),
    ],
)
def test_lost_tokens_are_in_the_text(overlong, text):
    assert text in str(plan_rows(np.array([1500, 4]), 5, overlong=overlong).report)


def test_no_documents_make_no_rows():
    plan = plan_rows(np.array([], dtype=np.int64), 8)
    assert len(plan) == 0
    assert plan.report.fill == 0.0
    assert len(plan.costs()) == 0


@pytest.mark.parametrize("capacity", [4096, 32768])
def test_fill_on_log_normal_lengths(capacity):
    assert plan_rows(log_normal(20_000), capacity).report.fill >= 0.99


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"max_tokens": 1}, "max_tokens must be at least 2, got 1"),
        ({"max_tokens": 8, "overlong": "cut"}, "overlong must be one of split, truncate, drop"),
        ({"max_tokens": 8, "window": 0}, "window must be at least 1, got 0"),
        ({"max_tokens": 8, "max_document_tokens": 9}, r"in \[2, max_tokens = 8\], got 9. Use null"),
        ({"max_tokens": 8, "max_document_tokens": 1}, r"in \[2, max_tokens = 8\], got 1. Use null"),
    ],
    ids=["max_tokens", "overlong", "window", "long-documents", "short-documents"],
)
def test_bad_settings_are_an_error(keywords, message):
    with pytest.raises(ValueError, match=message):
        plan_rows(np.array([1, 2]), **keywords)


def test_empty_document_is_an_error():
    with pytest.raises(ValueError, match="lengths must be at least 1"):
        plan_rows(np.array([1, 0]), 8)


# ru_maxrss would not do: after exec it still holds the peak of the process that forked this one.
MEASURE = """
import json, re
from pathlib import Path
import numpy as np
from lctrain.data.packing import plan_rows
lengths = np.random.default_rng(0).lognormal(7.5, 1.5, 1_000_000).clip(1).astype(np.int64)
plan = plan_rows(lengths, 32768)
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
print(json.dumps({"bytes": peak, "fill": plan.report.fill}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_a_million_documents_in_one_gibibyte():
    """Takes seconds; an algorithm with quadratic work would exceed the suite's timeout."""
    output = subprocess.run(
        [sys.executable, "-c", MEASURE], check=True, capture_output=True, text=True
    )
    measured = json.loads(output.stdout)
    assert measured["bytes"] < 2**30
    assert measured["fill"] > 0.99


def test_a_bar_shows_the_packing(monkeypatch, capfd):
    """The progress bar appears after a delay, which this test sets to zero."""
    from lctrain.data import packing

    monkeypatch.setattr(packing, "BAR_DELAY_S", 0)
    plan_rows(np.full(1000, 5), 64, window=100)
    assert "Packing" not in capfd.readouterr().err
    plan_rows(np.full(1000, 5), 64, window=100, progress=True)
    assert "Packing: 100%" in capfd.readouterr().err
