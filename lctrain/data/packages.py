"""PackagesSource: documents from the Python packages that are installed on this machine."""

from __future__ import annotations

import hashlib
import site
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lctrain.data.limits import choose_by_hash
from lctrain.data.readers import File, Row, describe_files, read_text
from lctrain.data.sources import (
    NOT_STANDARD,
    Source,
    generate,
    python_files,
    standard_library,
)

if TYPE_CHECKING:
    from datasets import Dataset

FOLDER_NAMES = ("site-packages", "dist-packages")


@dataclass(frozen=True, kw_only=True)
class PackagesSource(Source):
    """Source of the Python files of all packages installed for the running interpreter.

    A text that occurs in several files is read once. With max_documents or max_bytes, the files are
    chosen by a hash of their path, which mixes the packages. Upgrading a package changes the data.

    Attributes:
        with_stdlib: Whether the files of the standard library are also read.
        min_file_bytes: Size of the smallest file that is read.
        max_file_bytes: Size of the largest file that is read. Larger files are mostly tables and
            generated code.
    """

    with_stdlib: bool = True
    min_file_bytes: int = 1
    max_file_bytes: int = 500_000

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.min_file_bytes <= self.max_file_bytes:
            raise ValueError(
                f"min_file_bytes must be in [0, max_file_bytes = {self.max_file_bytes}], got "
                f"{self.min_file_bytes}. Between the two there must be room for a file."
            )

    def load(self, cache_dir: Path) -> Dataset:
        """Returns the files as documents: see Source.

        Files that are not UTF-8 are counted without a warning.
        """
        named: dict[str, Path] = {}
        roots = package_folders()
        for root in roots:
            for path in python_files(root):
                named.setdefault(path.as_posix().removeprefix(f"{root.as_posix()}/"), path)
        if self.with_stdlib:
            root = standard_library()
            for path in python_files(root, without=NOT_STANDARD):
                named.setdefault(f"stdlib/{path.relative_to(root).as_posix()}", path)
        names = sorted(named)
        files = tuple(
            file
            for file in describe_files([named[name] for name in names], names)
            if self.min_file_bytes <= file[2] <= self.max_file_bytes
        )
        if not files:
            raise ValueError(
                f"the installed packages must have .py files of {self.min_file_bytes} to "
                f"{self.max_file_bytes} bytes, got none under {', '.join(map(str, roots))}. Change "
                "these limits, or use another data source, for example data=stdlib."
            )
        files = choose_by_hash(files, self.max_documents, self.max_bytes)
        return generate(read_distinct, cache_dir, self.on_error, files=files)


def package_folders() -> list[Path]:
    """Returns the existing folders that hold installed packages, each once.

    An environment may take packages from another one, by a .pth file or by PYTHONPATH. So folders
    of packages on the path of imports count too.
    """
    paths = sysconfig.get_paths()
    folders = [paths["purelib"], paths["platlib"], *site.getsitepackages()]
    folders += [folder for folder in sys.path if Path(folder).name in FOLDER_NAMES]
    found = dict.fromkeys(Path(folder).resolve() for folder in folders if Path(folder).is_dir())
    return list(found)


def read_distinct(files: tuple[File, ...]) -> Iterator[Row]:
    """Yields the documents of `read_text`, without those whose text was yielded before."""
    seen: set[bytes] = set()
    for row in read_text(files):
        digest = hashlib.blake2b((row["text"] or "").encode(), digest_size=16).digest()
        if digest not in seen or row["text"] is None:
            seen.add(digest)
            yield row
