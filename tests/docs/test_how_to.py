"""Follows each how-to to its end: lctrain's commands then use what the how-to adds."""

import csv
import shlex
import sys

import pytest

from lctrain import train
from tests.docs.test_commands import SMALL, printed_commands
from tests.docs.test_pages import run_as_a_file, write_files
from tests.house.typecheck import ROOT

HOW_TO = ROOT / "docs" / "how_to"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning"),
]


def test_the_callback_logs_in_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("LCTRAIN_CACHE", str(tmp_path / "cache"))
    page = HOW_TO / "callback.md"
    write_files(page, tmp_path)
    (command,) = printed_commands(page.read_text())
    program, *overrides = shlex.split(command)
    arguments = [*overrides, *shlex.split(SMALL[program]), "trainer.log_every_n_steps=1"]
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    train.main()
    (metrics,) = tmp_path.rglob("metrics.csv")
    counts = [row["documents"] for row in csv.DictReader(metrics.open()) if row.get("documents")]
    assert float(counts[-1]) > 0


def test_the_data_source_has_a_name_in_a_run(tmp_path):
    page = HOW_TO / "data_source.md"
    (command,) = (line for line in printed_commands(page.read_text()) if "glossary" in line)
    program, *overrides = shlex.split(command)
    arguments = [
        *overrides,
        *shlex.split(SMALL[program]),
        "data.held_out_fraction=0",
        "evaluation.enabled=false",
        "trainer.log_every_n_steps=1",
        f"hydra.searchpath=[file://{tmp_path}]",
    ]
    more = f"""
import sys
from lctrain.train import main
if __name__ == "__main__":
    sys.argv = {[program, *arguments]!r}
    main()
"""
    run_as_a_file(page, tmp_path, more)
    (metrics,) = tmp_path.rglob("metrics.csv")
    assert "train" in metrics.read_text().splitlines()[0]
