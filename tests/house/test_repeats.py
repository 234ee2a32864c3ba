"""Measures repeated source lines; `python -m tests.house.test_repeats` prints shares by folder."""

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from tests.house.typecheck import ROOT

RUN = 6  # lines, without blank ones, comments and imports
MOST = 0.10


def lines_of(path: Path) -> list[str]:
    """Returns a file's lines without blank lines, comments, imports and indentation."""
    lines = (line.strip() for line in path.read_text().splitlines())
    return [line for line in lines if line and not line.startswith(("#", "import ", "from "))]


def repeated_share(paths: Iterable[Path]) -> float:
    """Returns the share of lines that lie in a sequence of RUN lines found in several places."""
    files = {path: lines_of(path) for path in paths}
    places = defaultdict(list)
    for path, lines in files.items():
        for start in range(len(lines) - RUN + 1):
            places[tuple(lines[start : start + RUN])].append((path, start))
    repeated = {
        (path, start + offset)
        for found in places.values()
        if len(found) > 1
        for path, start in found
        for offset in range(RUN)
    }
    return len(repeated) / sum(map(len, files.values()))


def sources(*folders: str) -> list[Path]:
    """Returns all Python files below some folders of the repository."""
    return [path for folder in folders for path in (ROOT / folder).rglob("*.py")]


def test_the_source_repeats_itself_little():
    assert repeated_share(sources("lctrain", "kernels", "recipes")) <= MOST


def test_a_repeated_run_is_counted(tmp_path):
    text = "\n".join(f"value_{i} = {i}" for i in range(RUN))
    for name, more in (("a.py", ""), ("b.py", "\nother = 1\nlast = 2")):
        (tmp_path / name).write_text(f"import os\n\n{text}{more}\n")
    assert repeated_share(tmp_path.glob("*.py")) == 2 * RUN / (2 * RUN + 2)
    assert repeated_share([tmp_path / "a.py"]) == 0.0


if __name__ == "__main__":
    for folder in ("lctrain", "kernels", "recipes", "tests"):
        print(f"{folder}: {repeated_share(sources(folder)):.1%}")
