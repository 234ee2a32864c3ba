"""Runs mypy on lctrain as pyproject.toml maps it: `python tests/house/typecheck.py`.

`lctrain.configs` lives in `configs`, `lctrain.recipes` in `recipes`: no type checker can see that
from the folders, and none reads setuptools' editable hooks. So this lays out a folder of links
in the shape of the installed package, checks that, and prints the real paths.
"""

import shutil
import subprocess
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]


def package_folders() -> dict[str, Path]:
    """Maps every package that pyproject.toml lists to its folder, longest mapped prefix first."""
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {}
    for package in setuptools["packages"]:
        prefix = package
        while prefix not in setuptools["package-dir"]:
            prefix = prefix.rpartition(".")[0]
        rest = package[len(prefix) :].strip(".").replace(".", "/")
        folders[package] = ROOT / setuptools["package-dir"][prefix] / rest
    return folders


def link_packages(tree: Path) -> dict[str, str]:
    """Fills `tree` with links in the installed shape; returns link path -> source path, as text."""
    shutil.rmtree(tree, ignore_errors=True)
    sources = {}
    for package, folder in package_folders().items():
        target = tree / package.replace(".", "/")
        target.mkdir(parents=True, exist_ok=True)
        for file in [*folder.glob("*.py"), *folder.glob("py.typed")]:
            link = target / file.name
            link.symlink_to(file)
            sources[str(link.relative_to(ROOT))] = str(file.relative_to(ROOT))
    return sources


def main() -> int:
    """Checks the whole package and returns mypy's exit code."""
    tree = ROOT / "build" / "typecheck"
    sources = link_packages(tree)
    result = subprocess.run(
        [
            *(sys.executable, "-m", "mypy", "--config-file", "pyproject.toml"),
            *(str(tree / name) for name in ("lctrain", "lctrain_kernels")),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    report = result.stdout + result.stderr
    for link, source in sources.items():
        report = report.replace(link, source)
    print(report, end="")
    return result.returncode


if __name__ == "__main__":
    sys.exit(main())
