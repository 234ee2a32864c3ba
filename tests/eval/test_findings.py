"""Tests the sentences about an evaluation: their numbers, the verdict, and missing results."""

import dataclasses
import math

import numpy as np
import pytest

from lctrain.eval import MethodComparison, PasskeyTable, PerplexityRow, PerplexityTable
from lctrain.eval.findings import beyond_window, context_gain, keys_found


def row(length, loss, gain=0.0, gain_stderr=0.0):
    perplexity = math.exp(loss)
    return PerplexityRow(
        length, perplexity, perplexity, perplexity, loss, 0.1, gain, gain_stderr, length, 3, 99
    )


@pytest.mark.parametrize(
    ("gain", "stderr", "verdict"),
    [
        (0.4, 0.1, ": context helps, 4.0 standard errors"),
        (0.04, 0.01, ": slightly lower with more context, 4.0 standard errors"),
        (0.3, 0.1, ": no clear change, 3.0 standard errors"),
        (-0.5, 0.1, ": context hurts, 5.0 standard errors"),
        (0.4, math.nan, "(lower is better)"),
        (0.4, 0.0, "(lower is better)"),
    ],
    ids=["helps", "slight", "unclear", "hurts", "one_document", "no_spread"],
)
def test_gain_inside_the_window_in_paired_standard_errors(gain, stderr, verdict):
    """Compares the longest length inside the window with the shortest one, document by document."""
    rows = [row(16, 3.0), row(64, 3.0 - gain, gain, stderr), row(256, 9.0, -6.0, 0.1)]
    sentence = context_gain(rows, 64)
    numbers = f"perplexity 20.1 with 16 tokens of context, {math.exp(3.0 - gain):.1f} with 64 "
    assert sentence.startswith(numbers)
    assert sentence.endswith(verdict)
    assert "with 256 " in context_gain(rows)


def test_no_gain_of_one_length_or_an_infinite_perplexity():
    assert context_gain([row(16, 3.0), row(64, 2.0)], 16) == ""
    assert context_gain([row(16, 3.0), row(64, math.inf)]) == ""


def test_no_verdict_on_documents_that_are_shorter_than_every_length():
    rows = [dataclasses.replace(row(length, 3.0), mean_context=22.5) for length in (64, 128)]
    assert context_gain(rows) == (
        "perplexity 20.1; no document has more than 64 tokens, so longer contexts add nothing"
    )


def comparison(*lengths, window=64):
    plain = PerplexityTable(tuple(row(n, 3.0 if n <= window else 3.3) for n in lengths))
    dual = PerplexityTable(tuple(row(n, 3.0 if n <= window else 2.99) for n in lengths))
    lost = PerplexityTable(tuple(row(n, 3.0 if n <= window else 7.0) for n in lengths))
    return MethodComparison({"plain": plain, "dual_chunk": dual, "ntk": lost}, window)


def test_change_beyond_the_window_by_method():
    assert beyond_window(comparison(32, 64, 512)) == (
        "perplexity at 512 tokens, 8 times the trained length: plain +35%, dual_chunk -1%, ntk x 55"
    )


def test_nothing_beyond_the_window_or_nothing_within():
    assert beyond_window(comparison(32, 64)) == ""
    assert beyond_window(comparison(128, 512)) == ""


def test_keys_at_the_longest_length():
    found = {"plain": np.array([[5, 4], [0, 0]]), "dual_chunk": np.array([[5, 5], [4, 3]])}
    assert keys_found(PasskeyTable(found, (64, 640), (0.0, 1.0), 5, 64)) == (
        "of 10 keys hidden in texts of 640 tokens, 10 times the trained length, found: plain 0, "
        "dual_chunk 7"
    )
    assert "in texts of 64 tokens, found" in keys_found(
        PasskeyTable({"plain": np.array([[1, 2]])}, (64,), (0.0, 1.0), 5, 64)
    )
