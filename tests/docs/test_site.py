"""Tests the documentation site: no warning while it builds, no missing page, no network needed."""

import importlib
import itertools
import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from types import ModuleType

import pytest

from docs.builders import api, pictures, tested
from lctrain.schemas import SCHEMAS
from tests.house.test_architecture import LEVELS
from tests.house.typecheck import ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


def test_the_site_builds_without_a_warning(site):
    assert (site / "index.html").is_file()


def test_every_local_link_and_image_leads_somewhere(site):
    missing = []
    for page in site.rglob("*.html"):
        for target in re.findall(r'(?:href|src)="([^"#?]+)', page.read_text()):
            elsewhere = "://" in target or target.startswith(("/", "data:", "mailto:"))
            if not elsewhere and not (page.parent / target).exists():
                missing.append((page.name, target))
    assert not missing


def test_the_site_opens_without_a_network(site):
    """No page loads a script, style sheet, font or image from another host."""
    loading = r'<(?:script|img)[^>]*src="https?:|<link[^>]*rel="stylesheet"[^>]*https?:'
    for page in site.rglob("*.html"):
        text = page.read_text()
        assert not re.search(loading, text), page.name
        assert 'class="mermaid"' not in text, page.name  # its script comes from another host


def test_the_configuration_reference_names_every_key(site):
    page = (site / "reference" / "configuration.html").read_text()
    for name, schema in SCHEMAS.items():
        for field in fields(schema):
            if field.name != "_target_":
                assert f"<code>{field.name}</code>" in page, f"{name}: {field.name}"


@pytest.mark.parametrize("package", api.packages())
def test_the_api_reference_has_every_public_name(site, package):
    page = (site / "reference" / "api" / f"{package}.html").read_text()
    module = importlib.import_module(package)
    for name in module.__all__:
        if isinstance(getattr(module, name), ModuleType):
            assert f"{package}.{name}.html" in page
        else:
            assert f'id="{api.definition(package, name)}"' in page, name


def test_the_api_reference_has_the_packages_that_users_import_from():
    known = {"lctrain", "lctrain.callbacks", "lctrain.data", "lctrain.eval", "lctrain.kernels"}
    assert known | {"lctrain.attention", "lctrain.loss", "lctrain.models"} <= {*api.packages()}


def test_the_pictures_are_those_that_the_builder_draws():
    drawn = {file.stem: file.read_text() for file in (ROOT / "docs" / "pictures").glob("*.svg")}
    assert drawn == {name: pictures.picture(name) for name in pictures.PICTURES}


def test_the_picture_of_the_packages_follows_the_levels_of_imports():
    rows = [[LEVELS[title] for title, _ in row] for row in pictures.PICTURES["packages"]]
    for above, below in itertools.pairwise(rows):
        assert min(above) > max(below)


def test_the_page_of_what_was_tested_follows_the_reports_and_pins():
    page = tested.tested_page()
    assert "| `varlen_fwd` | A100 (sm_80) | 3.6.0, 3.9.0 |" in page
    for file in tested.RECORDS.rglob("*.json"):
        listed = f"`{file.relative_to(tested.RECORDS)}`" in page
        assert listed == ("device" in json.loads(file.read_text()))
    project = (ROOT / "pyproject.toml").read_text()
    for name, versions in (("torch", r"2\.13\.0"), ("transformers", r".* \| 5\.17\.0, 5\.24\.0")):
        bounds = re.search(rf'"{name}(>=.*?)"', project)
        assert bounds is not None
        assert re.search(rf"\| {name} \| `{re.escape(bounds[1])}` \| {versions} \|", page)


def test_supported_ranges_are_those_of_the_package():
    """README and support matrix state pyproject.toml's bounds, whose upper bounds are exclusive."""
    project = (ROOT / "pyproject.toml").read_text()
    for name, title in (("torch", "PyTorch"), ("transformers", "transformers")):
        found = re.search(rf'"{name}>=(\d+)\.(\d+),<(\d+)\.(\d+)"', project)
        assert found is not None
        text = f"{found[1]}.{found[2]} to {found[3]}.{int(found[4]) - 1}"
        assert f"| {title} | {text} |" in (ROOT / "docs" / "support.md").read_text()
        assert f"{title} {text}" in (ROOT / "README.md").read_text()
