"""Runs mypy on both packages: `python tests/house/typecheck.py`."""

import subprocess
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]


def package_folders() -> dict[str, Path]:
    """Returns the folder of every package that pyproject.toml lists, by its dotted name."""
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {}
    for package in setuptools["packages"]:
        prefix = package
        while prefix not in setuptools["package-dir"]:
            prefix = prefix.rpartition(".")[0]
        rest = package[len(prefix) :].strip(".").replace(".", "/")
        folders[package] = ROOT / setuptools["package-dir"][prefix] / rest
    return folders


def main() -> int:
    """Type-checks both packages, and returns mypy's exit code."""
    mypy = (sys.executable, "-m", "mypy", "--config-file", "pyproject.toml")
    return subprocess.run([*mypy, "lctrain", "kernels/lctrain_kernels"], cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
