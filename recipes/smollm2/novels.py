"""Writes the novels of the Debian package as text files."""

from __future__ import annotations

from pathlib import Path

from lctrain.limits import require
from lctrain.recipes.smollm2.debian_package import read_files
from lctrain.recipes.smollm2.r_data import read_objects

DATA = "usr/lib/R/site-library/janeaustenr/data/Rdata"
HELD_OUT = "persuasion"
NOVELS = (
    *("emma", "mansfieldpark", "northangerabbey"),
    *(HELD_OUT, "prideprejudice", "sensesensibility"),
)


def write_novels(package: Path, folder: Path) -> None:
    """Writes a text file for each novel.

    Args:
        package: The package r-cran-janeaustenr, a `.deb` file.
        folder: Folder for the files, which must not exist.

    Raises:
        ValueError: if the package is damaged, or lacks a novel.
    """
    places, objects = read_files(package, [f"{DATA}.rdx", f"{DATA}.rdb"])
    found = read_objects(places, objects)
    for name in NOVELS:
        lines = found.get(name)
        require(
            isinstance(lines, list) and all(isinstance(line, str) for line in lines),
            f"package must hold the lines of {name}, got {package} with {', '.join(found)}. Fetch "
            "the version of the package that the recipe names.",
        )
    folder.mkdir(parents=True)
    for name in NOVELS:
        (folder / f"{name}.txt").write_text("\n".join(found[name]) + "\n", encoding="utf-8")
