"""Runs every Python example of the README and the documents as printed, in order, page by page."""

import ast
import importlib.util
import os
import re
import sys
import types
from pathlib import Path

import pytest

from lctrain_kernels.bench import report
from lctrain_kernels.bench.record import BenchmarkRecord
from lctrain_kernels.bench.step_report import newest_step_record, step_table
from tests.forked import run_forked
from tests.house.typecheck import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"^```\w+ title=\"(.+?)\"\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# They register names with lctrain, or hold Triton kernels, which are compiled from a file.
AS_A_FILE = {"attention.md", "fused_operation.md", "data_source.md"}
GENERATED = ("reference/configuration.md", "reference/tested.md")  # test_site.py checks these
WITH_EXAMPLES = [page for page in PAGES if EXAMPLE.search(page.read_text())]


def write_files(page: Path, folder: Path) -> None:
    """Writes each titled block of a page into a file of that name."""
    for name, content in FILE.findall(page.read_text()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)


def run_as_a_file(page: Path, folder: Path, more: str = "") -> None:
    """Runs all examples of a page, followed by the code `more`, as one script."""
    write_files(page, folder)
    script = folder / "example.py"
    script.write_text("".join(EXAMPLE.findall(page.read_text())) + more)
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    environment = {"LCTRAIN_CACHE": str(folder / "cache"), "PYTHONPATH": path}
    run_forked(str(script), cwd=folder, env=environment)


@pytest.mark.parametrize("page", WITH_EXAMPLES, ids=lambda page: str(page.relative_to(ROOT)))
def test_examples_run(page: Path, tmp_path, monkeypatch):
    if page.name in AS_A_FILE:
        run_as_a_file(page, tmp_path)
        return
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("LCTRAIN_CACHE", str(tmp_path / "cache"))
    write_files(page, tmp_path)
    text = page.read_text()
    module = types.ModuleType("example")  # dataclasses look their module up by its name
    monkeypatch.setitem(sys.modules, "example", module)
    for example in EXAMPLE.finditer(text):
        if "from trl import" in example[1] and importlib.util.find_spec("trl") is None:
            continue  # tests/test_trl.py says that it was skipped; CI has TRL
        line = text[: example.start(1)].count("\n")
        tree = ast.increment_lineno(ast.parse(example[1]), line)
        exec(compile(tree, str(page), "exec"), module.__dict__)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)
    local = [t for t in targets if "://" not in t and not t.endswith(GENERATED)]
    missing = [target for target in local if not (page.parent / target).exists()]
    assert not missing


def test_the_readme_s_speeds_are_those_that_were_recorded():
    """The README's speeds stand in the tables that are generated from the records."""
    text = (ROOT / "README.md").read_text()
    record = BenchmarkRecord.load(report.newest_results()[0])
    workloads = ("1x32k", "mix32k", "16x2k")
    pairs = [(record.find(name, "lctrain"), record.find(name, "fa4")) for name in workloads]
    cells = ["{:.2f} / {:.2f}".format(*report.speedups(*pair)) for pair in pairs]
    assert f"| attention | {' | '.join(cells)} |" in text
    steps = [row for row in step_table(newest_step_record()).splitlines() if "| none |" in row]
    for shape in ("Llama-3.2-1B", "Qwen3-1.7B"):
        rows = [row for row in steps if shape in row]
        ratios = {row.split(" | ")[1]: row.split(" | ")[-1].removesuffix(" |") for row in rows}
        assert f"| step, {shape} shape | {ratios['1x32k']} | {ratios['mix32k']} | |" in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_exist(page: Path):
    """How-tos are left out, since they also name files that their reader adds."""
    if page.parent.name == "how_to":
        return
    named = re.findall(
        r"`((?:tests|lctrain|kernels|docs|configs|recipes)/[\w./-]*)`", page.read_text()
    )
    assert not [name for name in named if not (ROOT / name).exists()]


def test_the_readme_is_short():
    assert (ROOT / "README.md").stat().st_size <= 8 * 1024
