"""Tests the tables for the terminal and the documents, which depend on the record alone."""

import dataclasses
import re

import pytest

from lctrain_kernels.bench import report
from tests.house.typecheck import ROOT


def test_terminal_table_gives_ratios_and_reasons(record):
    table = report.terminal_table(record, "1x32k")
    ours, fa2, fla = table.splitlines()[1:]
    assert "300.0 TFLOP/s" in ours
    assert "error at most 0.90x plain PyTorch's" in ours
    assert "ours is 1.50x / 1.20x" in fa2
    assert "error: RuntimeError: no" in fla


def test_terminal_table_says_why_a_peer_has_no_figure(record):
    assert "unsupported: has no dropout" in report.terminal_table(record, "mix32k_dropout")


def test_markdown_shows_speed_ratio_and_memory(record):
    text = report.markdown_tables(record)
    assert "One GPU X, 2026-11-23, bfloat16" in text
    assert "| lctrain | 300 / 250 | 300 / 250 |" in text
    assert "| FlashAttention-2 in torch | 1.50 / 1.20 |" in text
    assert "| FlashAttention-2 in torch | 2.00 | - |" in text
    assert "fla" not in text.lower().replace("flashattention", "")


def test_readme_tables_are_written_anew(record, tmp_path):
    record.save(tmp_path / "run.json")
    readme = f"top\n\n{report.BEGIN}\nold\n{report.END}\n\nbottom\n"
    text = report.readme_with_tables(readme, [tmp_path / "run.json"])
    assert text.startswith("top\n\n")
    assert text.endswith(f"{report.END}\n\nbottom\n")
    assert "old" not in text
    assert report.readme_with_tables(text, [tmp_path / "run.json"]) == text


def test_a_readme_without_markers_is_refused():
    with pytest.raises(ValueError, match="must hold the lines"):
        report.readme_with_tables("nothing here", [])


def test_the_newest_result_of_each_device_counts(record, tmp_path):
    later = dataclasses.replace(record, date="2026-12-01T00:00:00+00:00")
    elsewhere = dataclasses.replace(record, device="GPU Y", date="2026-01-01T00:00:00+00:00")
    for name, run in (("c", record), ("a", later), ("b", elsewhere)):
        run.save(tmp_path / f"{name}.json")
    assert [path.stem for path in report.newest_results(tmp_path)] == ["a", "b"]


def test_the_command_rewrites_a_readme(record, tmp_path):
    record.save(tmp_path / "run.json")
    readme = tmp_path / "README.md"
    readme.write_text(f"{report.BEGIN}\n{report.END}\n")
    assert report.main([str(readme), str(tmp_path / "run.json")]) == 0
    assert "One GPU X" in readme.read_text()


def test_the_command_refuses_a_readme_without_markers(tmp_path, capsys):
    (tmp_path / "README.md").write_text("no tables")
    with pytest.raises(SystemExit, match="2"):
        report.main([str(tmp_path / "README.md"), str(tmp_path / "none.json")])
    assert re.search("must hold the lines", capsys.readouterr().err)


def test_sections_of_other_attentions_come_from_their_folders(record, tmp_path):
    """The record names the contenders and their titles; the first is compared with the rest."""
    record.workloads = {"1x32k": {}}
    record.settings["titles"] = {"lctrain": "in one launch", "fa2": "in two"}
    record.results[0] = dataclasses.replace(record.results[0], forward_peak_bytes=2**29)
    (tmp_path / "dual_chunk").mkdir()
    record.save(tmp_path / "dual_chunk" / "run.json")
    begin, end = "<!-- dual_chunk tables: begin -->", "<!-- dual_chunk tables: end -->"
    text = report.readme_with_sections(f"top\n{begin}\nold\n{end}\nbottom", tmp_path)
    assert text.startswith(f"top\n{begin}\n\nOne GPU X, 2026-11-23, bfloat16")
    assert "| in one launch | 2.00 / 5.00 |" in text
    assert "How many times faster in one launch is" in text
    assert "| in two | 1.50 / 1.20 |" in text
    assert "| in one launch | 0.50 / 1.00 |" in text
    assert "old" not in text
    assert report.readme_with_sections("no sections", tmp_path) == "no sections"
    with pytest.raises(ValueError, match="must hold the lines"):
        report.readme_with_sections(begin, tmp_path)


def test_the_readme_of_this_repository_is_up_to_date():
    readme = (ROOT / "docs" / "benchmarks.md").read_text()
    written = report.readme_with_tables(readme, report.newest_results())
    written = report.readme_with_steps(report.readme_with_sections(written))
    assert written == readme, "run: python -m lctrain_kernels.bench.report docs/benchmarks.md"
