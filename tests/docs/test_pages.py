"""Every Python example of the README and the documents runs as printed, in order, page by page."""

import ast
import re
from pathlib import Path

import pytest

from tests.house.typecheck import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
WITH_EXAMPLES = [page for page in PAGES if EXAMPLE.search(page.read_text())]


@pytest.mark.parametrize("page", WITH_EXAMPLES, ids=lambda page: str(page.relative_to(ROOT)))
def test_examples_run(page: Path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LCTRAIN_CACHE", str(tmp_path / "cache"))
    text = page.read_text()
    namespace: dict[str, object] = {"__name__": "example"}
    for example in EXAMPLE.finditer(text):
        line = text[: example.start(1)].count("\n")
        tree = ast.increment_lineno(ast.parse(example[1]), line)
        exec(compile(tree, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)
    local = [target for target in targets if "://" not in target]
    missing = [target for target in local if not (page.parent / target).exists()]
    assert not missing


def test_the_readme_is_short():
    assert (ROOT / "README.md").stat().st_size <= 8 * 1024
