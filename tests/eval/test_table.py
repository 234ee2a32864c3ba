import csv
import json
import math

import pytest

from lctrain.eval import PerplexityRow, PerplexityTable
from tests.numerics import near


def make_row(length: int, loss: float, stderr: float = 0.1, **changes) -> PerplexityRow:
    values = {
        "length": length,
        "perplexity": math.exp(loss),
        "perplexity_low": math.exp(loss - stderr),
        "perplexity_high": math.exp(loss + stderr),
        "loss": loss,
        "stderr": stderr,
        "gain": 3.0 - loss,
        "gain_stderr": stderr / 4,
        "mean_context": length * 0.75,
        "documents": 12,
        "tokens": 34567,
        "interval_low": math.exp(loss - 2 * stderr),
        "interval_high": math.exp(loss + 2 * stderr),
    }
    return PerplexityRow(**{**values, **changes})


@pytest.fixture
def table() -> PerplexityTable:
    rows = [make_row(256, 3.0), make_row(1024, 2.5), make_row(4096, 2.25)]
    return PerplexityTable(tuple(rows), name="a model")


def test_csv_and_json_hold_every_row(table, tmp_path) -> None:
    paths = table.save(tmp_path / "new" / "folder")
    assert set(paths) == {"csv", "json", "png"}
    with paths["csv"].open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [{key: float(value) for key, value in row.items()} for row in rows] == table.as_dicts()
    content = json.loads(paths["json"].read_text())
    assert content["rows"] == table.as_dicts()
    assert content["name"] == "a model"
    assert (content["overlap"], content["min_context"]) == (0.5, 1)


def test_png_is_an_image_of_some_size(table, tmp_path) -> None:
    from matplotlib.image import imread

    height, width, _ = imread(table.save(tmp_path)["png"]).shape
    assert (width, height) == (1080, 675)


def test_plot_needs_no_display_and_leaves_pyplot_alone(table, tmp_path, monkeypatch) -> None:
    import matplotlib.pyplot

    monkeypatch.setenv("MPLBACKEND", "no-such-backend")
    table.save(tmp_path)
    assert matplotlib.pyplot.get_fignums() == []


def test_one_document_has_no_error_band_and_writes_valid_files(tmp_path) -> None:
    changes = dict.fromkeys(
        ("stderr", "gain_stderr", "perplexity_low", "perplexity_high"), math.nan
    )
    table = PerplexityTable((make_row(256, 3.0, documents=1, **changes),))
    paths = table.save(tmp_path)
    content = json.loads(paths["json"].read_text(), parse_constant=pytest.fail)
    assert content["rows"][0]["stderr"] is None
    with paths["csv"].open(newline="") as file:
        assert next(csv.DictReader(file))["stderr"] == ""
    assert "±0" not in str(table)
    assert "1 document," in str(table)


def test_infinite_perplexity_is_saved(tmp_path) -> None:
    row = make_row(256, 3.0, perplexity=math.inf, perplexity_high=math.inf)
    paths = PerplexityTable((row, make_row(512, 2.0))).save(tmp_path)
    assert json.loads(paths["json"].read_text())["rows"][0]["perplexity"] is None
    assert paths["png"].stat().st_size > 0


def test_text_is_a_readable_table(table) -> None:
    assert str(table).splitlines() == [
        "Perplexity by context length of a model: 34,567 tokens of 12 documents, "
        "the same at every length",
        "    length  mean context          perplexity              loss                gain",
        "       256         192.0         20.09 ±2.01    3.0000 ±0.1000      0.0000 ±0.0250",
        "     1,024         768.0         12.18 ±1.22    2.5000 ±0.1000      0.5000 ±0.0250",
        "     4,096       3,072.0          9.49 ±0.95    2.2500 ±0.1000      0.7500 ±0.0250",
        "± one standard error over documents; gain: loss at the shortest length minus this loss",
        "95 % intervals of the perplexity, bootstrap over documents: "
        "16.44 to 24.53 at 256, 9.97 to 14.88 at 1,024, 7.77 to 11.59 at 4,096",
    ]


def test_lengths_that_no_document_fills_are_named():
    import dataclasses

    from lctrain.eval import PerplexityRow, PerplexityTable

    row = PerplexityRow(64, 9.0, 8.5, 9.5, 2.2, 0.05, 0.0, 0.0, 60.0, 3, 500)
    long = dataclasses.replace(row, length=100_000, mean_context=812.0)
    text = str(PerplexityTable((row, long)))
    assert "length 100,000 was not reached: a scored token saw 812 tokens on average" in text
    assert "not reached" not in str(
        PerplexityTable((row, dataclasses.replace(row, length=128, mean_context=110.0)))
    )


def test_the_band_of_the_plot_is_paired():
    import math

    from lctrain.eval import PerplexityRow, PerplexityTable
    from lctrain.eval.plots import paired_interval

    first = PerplexityRow(64, 10.0, 5.0, 20.0, 2.3, 0.7, 0.0, 0.0, 60.0, 3, 500)
    second = PerplexityRow(128, 8.0, 4.0, 16.0, 2.1, 0.7, 0.2, 0.1, 110.0, 3, 500)
    low, high = paired_interval(PerplexityTable((first, second)))
    assert low[0] == high[0] == 10.0
    assert (low[1], high[1]) == near((8.0 * math.exp(-0.1), 8.0 * math.exp(0.1)))


def test_the_text_counts_documents_that_are_shorter_than_a_length(table) -> None:
    assert "shorter than a length" not in str(table)
    rows = (table.rows[0], make_row(1024, 2.5, short_documents=5))
    assert "that they have: 5 of 12 at 1,024" in str(PerplexityTable(rows, name="a model"))
