"""Tests that the report holds all results, and needs no network."""

import math
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from matplotlib.image import imread

from lctrain.eval.plots import new_figure
from lctrain.eval.report import Section, write_report

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)


class Reader(HTMLParser):
    """Collects the tags with their attributes, and the cells of tables."""

    def __init__(self):
        super().__init__()
        self.links, self.open, self.cells, self.text = [], [], [], ""

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] == "td":
            self.cells.append(data)


def test_the_report_holds_tables_and_pictures_and_no_link(tmp_path):
    new_figure().savefig(tmp_path / "a.png")
    rows = [
        {"method": "", "length": 4096, "loss": 1.23456, "note": "a < b"},
        {"method": "", "length": 8192, "loss": math.nan, "note": "<script>"},
    ]
    sections = [Section("One & two", "text <of> it", rows, tmp_path / "a.png")]
    path = write_report(tmp_path / "report.html", "Of <m>", sections, {"model": "m"})
    page = path.read_text()
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    assert reader.cells == ["4,096", "1.235", "a < b", "8,192", "-", "<script>"]
    assert "text <of> it" in reader.text
    assert "model = m" in reader.text
    assert [link[:22] for link in reader.links] == ["data:image/png;base64,"]
    for outside in ("http", "//", "url(", "@import", "<script", "<link"):
        assert outside not in page.replace(reader.links[0], "")


@pytest.mark.skipif(BROWSER is None, reason="needs a headless Chromium or Chrome")
def test_a_browser_without_a_network_shows_the_picture_and_runs_nothing(tmp_path):
    """Names of models and answers are text; the picture of one colour is seen on the screen."""
    figure = new_figure()
    figure.set_facecolor("#ff00ff")
    figure.savefig(tmp_path / "a.png")
    run = "document.title='run'"
    script = f'</pre><script>{run}</script><img src=x onerror="{run}">'
    section = Section(script, script, [{"answer": script, "length": 8}], tmp_path / "a.png")
    path = write_report(tmp_path / "report.html", script, [section], {script: script})
    seen = subprocess.run(
        [
            *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"),
            "--host-resolver-rules=MAP * ~NOTFOUND",
            f"--user-data-dir={tmp_path / 'browser'}",
            f"--screenshot={tmp_path / 'screen.png'}",
            "--window-size=900,900",
            path.as_uri(),
        ],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    reader = Reader()
    reader.feed(seen)
    assert "script" not in re.findall(r"<(\w+)", seen)
    assert reader.text.count(run) == 14
    pixels = imread(tmp_path / "screen.png")[..., :3]
    assert (pixels == (1.0, 0.0, 1.0)).all(-1).mean() > 0.2


def test_large_numbers_are_not_in_powers_of_ten(tmp_path):
    rows = [{"perplexity": 15915.78, "tokens": 1234567, "loss": 0.000123456, "huge": 1e15}]
    page = write_report(tmp_path / "r.html", "m", [Section("P", "", rows)], {}).read_text()
    reader = Reader()
    reader.feed(page)
    assert reader.cells == ["15,915.8", "1,234,567", "0.0001235", "1e+15"]
