"""Tests the wheel: builds it, installs it in a clean environment, and uses it from another folder.

Nothing is downloaded. The clean environment finds this environment's dependencies on its path, but
not lctrain: Python reads an editable install's hooks only in a real site folder.
"""

import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.house.typecheck import ROOT, package_folders

pytestmark = pytest.mark.xdist_group("wheel")  # one process builds it
SHIPPED = ["lctrain", "kernels", "configs", "recipes", "pyproject.toml", "README.md", "LICENSE"]


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True)


def site_folders() -> list[str]:
    """Returns the folders of this environment's dependencies, including those of .pth files."""
    return [sysconfig.get_path("purelib"), *(p for p in sys.path if p.endswith("site-packages"))]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    source = tmp_path_factory.mktemp("source")
    for name in SHIPPED:
        if (ROOT / name).is_dir():
            ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(ROOT / name, source / name, ignore=ignore)
        else:
            shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    result = run(*pip, "--no-index", "--wheel-dir", "dist", ".", cwd=source)
    assert result.returncode == 0, result.stderr
    (built,) = (source / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def clean_bin(wheel, tmp_path_factory) -> Path:
    """The folder of executables of a new environment in which the wheel is installed."""
    environment = tmp_path_factory.mktemp("clean") / "venv"
    result = run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    folder = environment / ("Scripts" if sys.platform == "win32" else "bin")
    pip = [sys.executable, "-m", "pip", "--python", folder / "python", "install", "--quiet"]
    result = run(*pip, "--no-deps", "--no-index", wheel, cwd=environment)
    assert result.returncode == 0, result.stderr
    (site_packages,) = environment.glob("lib/python*/site-packages")
    (site_packages / "dependencies.pth").write_text("\n".join(site_folders()))
    return folder


def test_wheel_holds_every_source_file(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    missing = []
    for package, folder in package_folders().items():
        wanted = [*folder.glob("*.py"), *folder.glob("py.typed")]
        if package in ("lctrain.configs", "lctrain.recipes"):
            wanted += folder.rglob("*.yaml")
        if package == "lctrain.eval":
            wanted += folder.glob("shipped_model/*")
        inside = package.replace(".", "/")
        missing += [p for p in wanted if f"{inside}/{p.relative_to(folder)}" not in names]
    assert not missing


def test_wheel_says_that_both_packages_have_types(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"lctrain/py.typed", "lctrain_kernels/py.typed"} <= names


def test_wheel_holds_nothing_beside_lctrain(wheel):
    tops = {name.partition("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"lctrain", "lctrain_kernels"}


def test_installed_package_is_used_from_another_folder(clean_bin, tmp_path):
    code = """
import importlib.resources as resources
import torch
import lctrain
from lctrain.kernels import flash_attn_varlen_func

q = torch.randn(6, 2, 8)
cu = torch.tensor([0, 2, 6], dtype=torch.int32)
assert flash_attn_varlen_func(q, q, q, cu, cu, 4, 4, causal=True).shape == (6, 2, 8)
assert (resources.files("lctrain.configs") / "train.yaml").is_file()
assert list((resources.files("lctrain.recipes") / "experiment").iterdir())
assert lctrain.patch_model
print(lctrain.__file__)
"""
    result = run(clean_bin / "python", "-c", code, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()).is_relative_to(clean_bin.parent)


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("lctrain-train", "Groups, set by group=choice"),
        ("lctrain-eval", "Groups, set by group=choice"),
        ("lctrain-bench", "usage: lctrain-bench"),
        ("lctrain-push", "usage: lctrain-push"),
    ],
)
def test_console_scripts_say_what_they_take(clean_bin, tmp_path, script, words):
    result = run(clean_bin / script, "--help", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert words in result.stdout
