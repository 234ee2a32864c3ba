"""Tests the source `packages` on two folders that stand for site-packages."""

from pathlib import Path

import pytest

from lctrain.data import PackagesSource, packages
from lctrain.data.documents import read_documents


@pytest.fixture
def installed(tmp_path, monkeypatch) -> Path:
    """Two folders with seven Python files, two of them with the same text."""
    files = {
        "site/one/__init__.py": b"",
        "site/one/a.py": b"import one\n",
        "site/two/copy.py": b"import one\n",
        "site/two/b.py": b"x = 2\n" * 10,
        "site/two/data.json": b"{}",
        "site/one/__pycache__/a.py": b"stale\n",
        "plat/three.py": b"y = 3\n",
        "plat/latin.py": b"# \xe9\n",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    folders = [tmp_path / "site", tmp_path / "plat"]
    monkeypatch.setattr(packages, "package_folders", lambda: folders)
    return tmp_path


def test_reads_every_text_once_in_the_order_of_names(installed):
    dataset = PackagesSource(with_stdlib=False).load(installed / "cache")
    assert dataset["name"][:] == ["latin.py", "one/a.py", "three.py", "two/b.py"]
    documents = read_documents(dataset, "packages")
    assert documents.texts["text"][:] == ["import one\n", "y = 3\n", "x = 2\n" * 10]
    assert documents.dropped_unreadable == 1


def test_the_standard_library_comes_with_it(installed):
    names = PackagesSource(max_documents=40).load(installed / "cache")["name"]
    assert sum(name.startswith("stdlib/") for name in names) > 30
    assert not any("site-packages" in name or "__pycache__" in name for name in names)


def test_files_of_other_sizes_are_left_out(installed):
    source = PackagesSource(with_stdlib=False, min_file_bytes=7, max_file_bytes=59)
    assert source.load(installed / "cache")["name"][:] == ["one/a.py"]


def test_limits_choose_a_mixture(installed):
    names = PackagesSource(with_stdlib=False, max_documents=3).load(installed / "cache")["name"]
    assert names[:] == sorted(names)
    assert 2 <= len(names) <= 3


def test_the_folders_are_those_of_this_interpreter():
    folders = packages.package_folders()
    assert any((folder / "torch").is_dir() for folder in folders)
    assert len(folders) == len(set(folders))


def test_sizes_that_leave_nothing_are_an_error(installed):
    with pytest.raises(ValueError, match=r"must have .py files of 5000 to 6000 bytes, got none"):
        PackagesSource(with_stdlib=False, min_file_bytes=5000, max_file_bytes=6000).load(installed)
    with pytest.raises(ValueError, match=r"min_file_bytes must be in \[0, max_file_bytes = 5\]"):
        PackagesSource(min_file_bytes=6, max_file_bytes=5)


def test_packages_of_another_environment_on_the_path_of_imports_count(tmp_path, monkeypatch):
    """As with a .pth file that names the site-packages of another environment."""
    other, project = tmp_path / "other" / "site-packages", tmp_path / "project"
    for folder in (other, project):
        folder.mkdir(parents=True)
    monkeypatch.setattr("sys.path", [str(project), str(other), str(other / ".." / "site-packages")])
    folders = packages.package_folders()
    assert folders.count(other) == 1
    assert project not in folders
