"""Tests the comparison of ways beyond the window on the shipped model."""

import json

import pytest

from lctrain.recipes.passkey_model import methods


@pytest.mark.filterwarnings("ignore")
def test_the_shipped_model_finds_more_keys_by_dual_chunk(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(methods, "TEXT_BYTES", 200_000)
    options = ["--keys", "1", "--ratios", "8", "1", "--methods", "plain", "dual_chunk_yarn"]
    methods.main(["--output", str(tmp_path), *options])
    rows = json.loads((tmp_path / "passkey_retrieval.json").read_text())["rows"]
    found = {}
    for row in rows:
        key = row["method"], row["length"]
        found[key] = found.get(key, 0) + row["found"]
    assert found.keys() == {(m, n) for m in ("plain", "dual_chunk_yarn") for n in (128, 1024)}
    assert found["plain", 1024] < found["dual_chunk_yarn", 1024]
    assert "dual_chunk_yarn" in capsys.readouterr().out


def test_the_readme_has_the_table_of_the_record(tmp_path, monkeypatch):
    text = methods.README.read_text()
    assert methods.tables() in text
    copy = tmp_path / "README.md"
    copy.write_text(text.replace("| `yarn` |", "| `other` |"))
    monkeypatch.setattr(methods, "README", copy)
    methods.main(["--readme"])
    assert copy.read_text() == text
