"""Tests which files the repository may hold."""

import re
import subprocess

import pytest

from lctrain_kernels.bench import report
from tests.house.typecheck import ROOT

LONGEST = 450  # lines of a module: one noun or verb has room in 60 to 250
RESULTS = ROOT / "kernels" / "lctrain_kernels" / "bench" / "results"
HOME_OF_SOMEONE = re.compile(rb"(?<![\w./])/(?:work|root|home|Users)/\w")


def tracked_files() -> list[str]:
    result = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    return [name for name in result.stdout.split("\0") if name and (ROOT / name).is_file()]


FILES = tracked_files()


@pytest.mark.skipif(not FILES, reason="not a git checkout")
def test_no_file_names_a_path_of_one_machine():
    named = {
        name: match.group().decode()
        for name in FILES
        if (match := HOME_OF_SOMEONE.search((ROOT / name).read_bytes()))
    }
    assert not named


@pytest.mark.skipif(not FILES, reason="not a git checkout")
def test_no_large_file():
    assert not [name for name in FILES if (ROOT / name).stat().st_size > 1_000_000]


@pytest.mark.skipif(not FILES, reason="not a git checkout")
def test_no_output_of_a_run():
    """No commit may contain weights or checkpoints, except the small model of the wheel."""
    suffixes = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
    weights = [name for name in FILES if name.endswith(suffixes)]
    assert weights == ["lctrain/eval/shipped_model/model.safetensors"]


@pytest.mark.skipif(not FILES, reason="not a git checkout")
def test_no_long_module():
    sources = [name for name in FILES if name.endswith(".py")]
    assert not [name for name in sources if len((ROOT / name).read_text().splitlines()) > LONGEST]


@pytest.mark.skipif(not FILES, reason="not a git checkout")
def test_no_record_is_ignored():
    """A record that git ignores would be in the documents, and not in the commit."""
    folders = [RESULTS / kind for kind in (*report.KINDS, *report.SERIES)]
    folders += [path.parent / "results" for path in (ROOT / "recipes").glob("*/__init__.py")]
    files = [str((folder / "new.json").relative_to(ROOT)) for folder in folders]
    command = ["git", "check-ignore", "--no-index", *files]
    ignored = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert not ignored.stdout
