"""`lctrain-push`: uploads an exported model to the Hugging Face hub.

    lctrain-push outputs/RUN/model OWNER/NAME             prints what it would upload
    lctrain-push outputs/RUN/model OWNER/NAME --upload    uploads it

Without `--upload`, it needs no network and no login.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lctrain.limits import require

WEIGHTS = ("*.safetensors", "*.bin")
CONFIGS = ("config.json", "adapter_config.json")
SKIPPED = ("*.ckpt", "*.tmp", ".*")
"""Patterns of file and folder names that are not uploaded."""
TEXTS = (".json", ".md", ".yaml", ".txt", ".html")
"""Suffixes of the files in which paths of this machine are looked for."""
MOST_TEXT = 2**20
"""Bytes of the largest such file: vocabularies are larger."""
_PATH = re.compile(r"(?<![\w.:/])/[^/\s\"'`<>()\\]+(?:/[^/\s\"'`<>()\\]+)+")


@dataclass(frozen=True)
class Upload:
    """An upload of a model's folder.

    Attributes:
        folder: Folder of an exported model.
        repository: Name on the hub, as owner/name.
        branch: Branch to upload to.
        private: Whether a new repository is private.
    """

    folder: Path
    repository: str
    branch: str = "main"
    private: bool = False

    def files(self) -> list[Path]:
        """Returns the files to upload, sorted.

        Raises:
            ValueError: if the folder holds no exported model, or the repository has no valid name.
        """
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id

        try:
            validate_repo_id(self.repository)
        except HFValidationError as error:
            raise ValueError(
                f"the repository must be named owner/name, got {self.repository!r}: {error}"
            ) from error
        require(
            self.repository.count("/") == 1,
            f"the repository must be named owner/name, got {self.repository!r}. Name your account.",
        )
        require(
            self.folder.is_dir(),
            f"the folder must hold an exported model, got {str(self.folder)!r}, which is not a "
            "folder. lctrain-train writes one: RUN/model.",
        )
        found = [path for path in sorted(self.folder.rglob("*")) if self._is_uploaded(path)]
        for what, patterns in (("configuration", CONFIGS), ("weights", WEIGHTS)):
            require(
                any(
                    path.parent == self.folder and path.match(p) for path in found for p in patterns
                ),
                f"the folder must hold an exported model, got {str(self.folder)!r} without "
                f"{what} ({' or '.join(patterns)}). lctrain-train writes one: RUN/model.",
            )
        return found

    def describe(self) -> str:
        """Returns what the upload would send, as text."""
        files = self.files()
        sizes = [path.stat().st_size for path in files]
        names = [path.relative_to(self.folder).as_posix() for path in files]
        lines = [
            f"Model repository {self.repository}, branch {self.branch}; created as "
            f"{'private' if self.private else 'public'} if it does not exist",
            *(f"{size:>15,} bytes  {name}" for name, size in zip(names, sizes, strict=True)),
            f"{sum(sizes):>15,} bytes in {len(files)} files",
        ]
        missing = {
            "model card (README.md)": "README.md" not in names,
            "tokenizer (tokenizer_config.json)": "tokenizer_config.json" not in names,
        }
        lines += [f"warning: no {what}" for what, absent in missing.items() if absent]
        base = self._base_folder()
        if base is not None:
            lines.append(
                f"warning: the adapters need the model in {base}, a folder that others do not "
                "have. Upload that model, and write its name on the hub into adapter_config.json "
                "(base_model_name_or_path) and README.md; or train with adapter.merge=true."
            )
        for name, path in zip(names, files, strict=True):
            for named in sorted(self._places_named_in(path) - {base}):
                lines.append(
                    f"warning: {name} names {named}, a place on this machine. Remove it from the "
                    "file, or write a public name."
                )
        return "\n".join(lines)

    def send(self) -> str:
        """Creates the repository if needed, uploads the files, and returns the address.

        Raises:
            ValueError: if the folder holds no exported model, or the hub refuses the upload or
                cannot be reached.
        """
        from huggingface_hub import HfApi

        files = self.files()
        hub = HfApi()
        try:
            hub.create_repo(self.repository, private=self.private, exist_ok=True)
            if self.branch != "main":
                hub.create_branch(self.repository, branch=self.branch, exist_ok=True)
            sent = hub.upload_folder(
                repo_id=self.repository,
                folder_path=self.folder,
                revision=self.branch,
                allow_patterns=[path.relative_to(self.folder).as_posix() for path in files],
                commit_message="Upload a model trained with lctrain",
            )
        except Exception as error:
            if not _comes_from_the_hub(error):
                raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(
                f"the hub must accept the upload to {self.repository}, got {type(error).__name__}: "
                f"{reason}. Log in with `hf auth login`, check the network and the name, and "
                "repeat the command."
            ) from error
        return str(sent)

    def _base_folder(self) -> str | None:
        """Returns the folder of the adapters' base model; None without adapters or for a name."""
        path = self.folder / "adapter_config.json"
        if not path.is_file():
            return None
        try:
            base = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(
                f"adapter_config.json must be JSON with base_model_name_or_path, got {str(path)!r} "
                f"({type(error).__name__}: {error}). Export the adapters again."
            ) from error
        is_folder = isinstance(base, str) and (Path(base).is_absolute() or Path(base).is_dir())
        return base if is_folder else None

    def _places_named_in(self, path: Path) -> set[str]:
        """Returns the absolute paths of files and folders of this machine that a text names."""
        if path.suffix not in TEXTS or path.stat().st_size > MOST_TEXT:
            return set()
        text = path.read_text(encoding="utf-8", errors="replace")
        return {found for found in _PATH.findall(text) if _exists(found)}

    def _is_uploaded(self, path: Path) -> bool:
        parts = [Path(part) for part in path.relative_to(self.folder).parts]
        skipped = any(part.match(pattern) for part in parts for pattern in SKIPPED)
        return path.is_file() and not skipped


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except OSError:  # such as a name that is too long
        return False


def _comes_from_the_hub(error: Exception) -> bool:
    """Whether an error comes from the network, from the login, or from the hub's answer."""
    library = type(error).__module__.partition(".")[0]
    return isinstance(error, OSError) or library.startswith(
        ("huggingface_hub", "httpx", "httpcore")
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the upload, and performs it with `--upload`.

    Args:
        arguments: Command line; None takes that of the process.

    Returns:
        The exit status: 2 after an expected error.
    """
    parser = argparse.ArgumentParser("lctrain-push", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="folder of an exported model, such as RUN/model")
    parser.add_argument("repository", help="name on the Hugging Face hub, as owner/name")
    parser.add_argument("--branch", default="main", help="branch to upload to (main)")
    parser.add_argument("--private", action="store_true", help="create a private repository")
    parser.add_argument("--upload", action="store_true", help="upload; without it, only print")
    given = parser.parse_args(arguments)
    upload = Upload(given.folder.expanduser(), given.repository, given.branch, given.private)
    try:
        print(upload.describe(), flush=True)
        if given.upload:
            print(f"Uploaded: {upload.send()}")
        else:
            print("Nothing was uploaded. Add --upload to do it.")
    except ValueError as error:
        print(f"lctrain-push: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
