"""Tests that the report holds all results, and needs no network."""

import math
from html.parser import HTMLParser

from lctrain.eval.plots import new_figure
from lctrain.eval.report import Section, write_report


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
