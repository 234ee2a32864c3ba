"""The documentation site builds without a warning, and names every setting."""

import os
import subprocess
import sys
from dataclasses import fields

import pytest

from lctrain.schemas import SCHEMAS
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


def test_the_configuration_reference_names_every_key(site):
    page = (site / "reference" / "configuration.html").read_text()
    for name, schema in SCHEMAS.items():
        for field in fields(schema):
            if field.name != "_target_":
                assert f"<code>{field.name}</code>" in page, f"{name}: {field.name}"


def test_the_api_reference_shows_signatures(site):
    page = (site / "reference" / "api.html").read_text()
    assert "patch_model" in page
    assert "PackedBatch" in page
