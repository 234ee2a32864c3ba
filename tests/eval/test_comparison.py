"""Tests the comparison of methods: the tokens scored, their contexts, and the files written."""

import csv
import json
import math

import numpy as np
import pytest
import torch

from lctrain.data import TokenizedDocument
from lctrain.eval import METHODS, Extension, compare_methods
from tests.numerics import near, near_roundings

WINDOW = 16
LENGTHS = [16, 32, 64]


@pytest.fixture
def model(make_llama):
    return make_llama(max_position_embeddings=WINDOW)


@pytest.fixture
def documents() -> list[TokenizedDocument]:
    """Three documents of 90, 40 and 71 tokens; the second cannot fill a length of 64."""
    random = np.random.default_rng(0)
    return [
        TokenizedDocument(f"d{n}", random.integers(97, size=size), n)
        for n, size in enumerate((90, 40, 71))
    ]


def compare(model, documents, methods=("plain",), **options):
    extensions = [Extension(method, WINDOW) for method in methods]
    return compare_methods(
        model, documents, LENGTHS, extensions, **{"max_tokens": 256, "name": "m"} | options
    )


def direct_loss(model, documents, length: int, stride: int, edit=lambda window: [window]) -> float:
    """Returns the mean loss of positions from 64 - stride on, one window at a time."""
    losses = []
    for document in documents:
        ids = torch.from_numpy(document.input_ids)
        for start in range(64 - stride, len(ids) - 1, stride):
            stop = min(start + stride, len(ids) - 1)
            window = ids[max(0, stop - length) : stop]
            with torch.no_grad():
                parts = [model(input_ids=p[None], use_cache=False).logits[0] for p in edit(window)]
            scored = torch.cat(parts)[-(stop - start) :].log_softmax(-1)
            losses += scored[torch.arange(stop - start), ids[start + 1 : stop + 1]].neg().tolist()
    return float(np.mean(losses))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.usefixtures("in_float64")
def test_scores_what_the_definition_scores(model, documents, length):
    table = compare(model, documents).tables["plain"]
    (row,) = [row for row in table.rows if row.length == length]
    assert row.documents == 2
    assert row.tokens == (89 - 56) + (70 - 56)
    assert row.loss == near(direct_loss(model, documents, length, stride=8))
    assert length - 8 < row.mean_context <= length


@pytest.mark.usefixtures("in_float64")
def test_intra_chunk_sees_its_own_chunk_only(model, documents):
    row = compare(model, documents, ["intra_chunk"]).tables["intra_chunk"].rows[-1]
    expected = direct_loss(model, documents, 64, 8, edit=lambda window: window.split(WINDOW))
    assert row.loss == near(expected)


@pytest.mark.usefixtures("in_float64_but_frequencies")
def test_every_method_scores_the_same_tokens_and_is_plain_at_the_window(model, documents):
    before = model.model.rotary_emb.inv_freq.clone()
    comparison = compare(model, documents, METHODS)
    rows = {method: table.rows for method, table in comparison.tables.items()}
    assert list(rows) == list(METHODS)
    assert len({(row.tokens, row.documents) for table in rows.values() for row in table}) == 1
    for method in METHODS:
        # dual chunk attention takes angles in float32: below WINDOW, each is rounded by that much
        assert rows[method][0].loss == near_roundings(rows["plain"][0].loss, 2 * WINDOW)
        assert comparison.ratio(method, rows[method][0]) == 1.0
    assert len({round(table[-1].loss, 6) for table in rows.values()}) == len(METHODS)
    assert model.model.rotary_emb.inv_freq.equal(before)


def test_stride_and_context_can_be_chosen(model, documents):
    table = compare(model, documents, stride=4, min_context=70).tables["plain"]
    assert table.rows[0].tokens == (90 - 70) + (71 - 70)
    assert all(row.length - 4 < row.mean_context for row in table.rows)


def test_files_hold_every_method_and_the_ratio(model, documents, tmp_path):
    comparison = compare(model, documents, ["plain", "dual_chunk"])
    paths = comparison.save(tmp_path / "new")
    with paths["csv"].open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], int(row["length"])) for row in rows] == [
        (method, length) for method in ("plain", "dual_chunk") for length in LENGTHS
    ]
    content = json.loads(paths["json"].read_text())
    assert (content["window"], content["stride"], content["min_context"]) == (16, 8, 57)
    for row in content["rows"]:
        first = next(r for r in content["rows"] if r["method"] == row["method"])
        assert row["ratio_to_window"] == near(row["perplexity"] / first["perplexity"])
    assert paths["png"].read_bytes().startswith(b"\x89PNG")


def test_text_is_a_column_per_method(model, documents):
    text = str(compare(model, documents, ["plain", "yarn"]))
    assert "of m: 47 tokens of 2 documents, the same in every cell; window 16" in text
    assert text.splitlines()[1].split() == ["length", "plain", "yarn"]
    assert text.splitlines()[2].split()[0] == "16"
    assert "(1.000)" in text.splitlines()[2]
    assert "in brackets: over the same method's perplexity at the window; standard errors" in text


def test_without_a_length_inside_the_window_there_is_no_ratio(model, documents, tmp_path):
    comparison = compare_methods(
        model, documents, [32, 64], [Extension("plain", WINDOW)], max_tokens=256
    )
    assert math.isnan(comparison.ratio("plain", comparison.tables["plain"].rows[0]))
    assert "(" not in str(comparison).splitlines()[2]
    assert "in brackets" not in str(comparison)
    assert (
        json.loads(comparison.save(tmp_path)["json"].read_text())["rows"][0]["ratio_to_window"]
        is None
    )


def test_documents_too_short_for_the_longest_length_are_an_error(model, documents):
    with pytest.raises(ValueError, match="documents must hold one of more than 57 tokens, got 1"):
        compare(model, documents[1:2])


@pytest.mark.parametrize("stride", [0, 17])
def test_a_stride_beyond_the_shortest_length_is_an_error(model, documents, stride):
    with pytest.raises(ValueError, match=r"stride must be in \[1, shortest length = 16\]"):
        compare(model, documents, stride=stride)


def test_progress_bars_name_the_method(model, documents, capsys):
    compare(model, documents, ("plain", "dual_chunk"), progress=True)
    shown = capsys.readouterr().err
    assert "Perplexity, plain RoPE, 1 of 2" in shown
    assert "Perplexity, dual chunk attention, 2 of 2" in shown
    compare(model, documents)
    assert not capsys.readouterr().err
