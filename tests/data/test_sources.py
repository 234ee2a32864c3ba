"""Tests the sources: the documents they read, their limits, and their errors about bad files."""

import gzip
import json
import os

import pytest
from datasets import Dataset, DatasetDict

from lctrain.data import HubSource, JsonlSource, ParquetSource, StdlibSource, TextSource
from lctrain.data.documents import read_documents
from lctrain.data.sources import python_files


@pytest.fixture
def write(tmp_path):
    """Returns a function that writes a file and returns its path as a string."""

    def write_file(name: str, content: str | bytes) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write_file


def texts(source, cache_dir) -> list[str | None]:
    return list(source.load(cache_dir)["text"])


def test_stdlib_reads_source_files_and_no_installed_packages(tmp_path):
    dataset = StdlibSource(max_documents=20).load(tmp_path)
    names = dataset["name"]
    assert len(names) == 20
    assert names[:] == sorted(names)
    assert all(name.endswith(".py") and "site-packages" not in name for name in names)
    assert sum(text is not None and "import" in text for text in dataset["text"]) > 10


def test_stdlib_limit_by_bytes_chooses_a_stable_mixture(tmp_path):
    small = StdlibSource(max_bytes=200_000).load(tmp_path)
    large = StdlibSource(max_bytes=400_000).load(tmp_path)
    size = sum(len((text or "").encode()) for text in small["text"])
    assert 100_000 < size <= 200_000
    assert set(small["name"]) < set(large["name"])


def test_stdlib_counts_files_that_are_not_utf8(tmp_path, monkeypatch, write):
    write("lib/good.py", "x = 1\n")
    write("lib/bad.py", b"# \xff\xfe\n")
    write("lib/site-packages/other.py", "y = 2\n")
    write("lib/empty/__init__.py", "")
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path / "lib")})
    documents = read_documents(StdlibSource().load(tmp_path), "stdlib")
    assert list(documents.names) == ["good.py"]
    assert (documents.dropped_empty, documents.dropped_unreadable) == (1, 1)


def test_stdlib_without_files_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(ValueError, match=r"must have \.py files.*data=text"):
        StdlibSource().load(tmp_path)


def test_text_reads_one_document_per_file_in_the_order_given(tmp_path, write):
    first, second = write("z/a.txt", "one"), write("a/b.txt", "two\nlines")
    source = TextSource(files=[first, f"{tmp_path}/**/*.txt"])
    assert texts(source, tmp_path) == ["one", "two\nlines"]
    assert source.load(tmp_path)["name"][:] == [first, second]


def test_a_single_string_is_one_file(tmp_path, write):
    assert texts(TextSource(files=write("a[1].txt", "one")), tmp_path) == ["one"]


def test_text_notices_that_a_file_has_changed(tmp_path, write):
    path = write("a.txt", "one")
    assert texts(TextSource(files=path), tmp_path) == ["one"]
    write("a.txt", "another")
    assert texts(TextSource(files=path), tmp_path) == ["another"]


@pytest.mark.parametrize("source", [TextSource, JsonlSource, ParquetSource])
def test_a_glob_without_a_match_is_an_error(source, tmp_path):
    with pytest.raises(ValueError, match=r"must match at least one file, got .*nothing\*.*Check"):
        source(files=f"{tmp_path}/nothing*").load(tmp_path)


def test_a_folder_is_an_error_that_shows_the_glob(tmp_path):
    with pytest.raises(ValueError, match=r"it is a folder, append /\*\*/\*\.txt"):
        TextSource(files=str(tmp_path)).load(tmp_path)


def test_no_files_at_all_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"at least one file or glob, got none\. Set data\.files"):
        TextSource().load(tmp_path)


def test_text_that_is_not_utf8_is_an_error(tmp_path, write):
    path = write("bad.txt", b"abc\xff")
    with pytest.raises(ValueError, match=r"must be UTF-8 text, got .*bad\.txt with byte 3"):
        TextSource(files=path).load(tmp_path)


def test_jsonl_reads_the_field_and_skips_blank_lines(tmp_path, write):
    lines = "\n".join([json.dumps({"body": "one"}), "", json.dumps({"body": "zwei ü"}), ""])
    plain = write("a.jsonl", lines)
    packed = write("b.jsonl.gz", gzip.compress(lines.encode()))
    dataset = JsonlSource(files=[plain, packed], field="body").load(tmp_path)
    assert dataset["text"][:] == ["one", "zwei ü"] * 2
    assert dataset["name"][:] == [f"{plain}:1", f"{plain}:3", f"{packed}:1", f"{packed}:3"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'text': 1}", r"bad\.jsonl:2: a line must be JSON, got \"\{'text': 1\}\""),
        ('{"body": "x"}', r"bad\.jsonl:2: .* object with field 'text', got fields \['body'\]"),
        ('["x"]', r"bad\.jsonl:2: .* object with field 'text', got list"),
        ('{"text": 3}', r"bad\.jsonl:2: field 'text' must be a string, got int"),
    ],
    ids=["not-json", "no-field", "no-object", "number"],
)
def test_a_bad_jsonl_line_is_an_error_with_file_and_line(tmp_path, write, line, message):
    path = write("bad.jsonl", f'{{"text": "good"}}\n{line}\n')
    with pytest.raises(ValueError, match=message):
        JsonlSource(files=path, on_error="raise").load(tmp_path)


def test_parquet_reads_the_column(tmp_path):
    Dataset.from_dict({"body": ["a", "bb", "ccc"], "other": [1, 2, 3]}).to_parquet(
        tmp_path / "a.parquet"
    )
    source = ParquetSource(files=f"{tmp_path}/*.parquet", field="body")
    assert texts(source, tmp_path) == ["a", "bb", "ccc"]


@pytest.mark.parametrize(
    ("field", "message"),
    [("text", r"a\.parquet: field must be .* got 'text'; it has \['n'\]"), ("n", "hold strings")],
)
def test_parquet_without_a_text_column_is_an_error(tmp_path, field, message):
    Dataset.from_dict({"n": [1]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=message):
        ParquetSource(files=f"{tmp_path}/a.parquet", field=field).load(tmp_path)


@pytest.fixture
def hub(tmp_path) -> str:
    """A folder with the layout of a dataset repository on the hub."""
    splits = {"train": ["a", "bb", None, "dddd"], "test": ["held out"]}
    for name, rows in splits.items():
        (tmp_path / "repository").mkdir(exist_ok=True)
        Dataset.from_dict({"body": rows}).to_parquet(
            tmp_path / "repository" / f"{name}-00000-of-00001.parquet"
        )
    return str(tmp_path / "repository")


def test_hub_loads_splits(tmp_path, hub):
    source = HubSource(dataset=hub, field="body", held_out_split="test")
    assert texts(source, tmp_path) == ["a", "bb", None, "dddd"]
    assert source.load_held_out(tmp_path)["text"][:] == ["held out"]
    assert HubSource(dataset=hub, field="body").load_held_out(tmp_path) is None


def test_hub_streams_the_first_documents(tmp_path, hub):
    source = HubSource(dataset=hub, field="body", streaming=True, max_documents=2)
    assert texts(source, tmp_path) == ["a", "bb"]
    by_bytes = HubSource(dataset=hub, field="body", streaming=True, max_bytes=3)
    assert texts(by_bytes, tmp_path) == ["a", "bb", None]


def test_hub_passes_its_address_to_load_dataset(tmp_path, monkeypatch):
    seen = {}

    def load_dataset(**keywords):
        seen.update(keywords)
        return DatasetDict(train=Dataset.from_dict({"text": ["x"]}))["train"]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    HubSource(dataset="owner/name", config="en", split="train[:1%]", revision="v1").load(tmp_path)
    assert {k: seen[k] for k in ("path", "name", "split", "revision")} == {
        "path": "owner/name",
        "name": "en",
        "split": "train[:1%]",
        "revision": "v1",
    }


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_without_the_column_is_an_error(tmp_path, hub, streaming):
    source = HubSource(dataset=hub, streaming=streaming, max_documents=1)
    with pytest.raises(ValueError, match=r"got 'text'; it has \['body'\]\. Set data\.field"):
        source.load(tmp_path)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({}, "dataset must be a name on the hub"),
        ({"dataset": "x", "window_bytes": 0}, "window_bytes must be at least 1"),
        ({"dataset": "x", "max_documents": 0}, "max_documents must be at least 1, got 0"),
    ],
    ids=["no-name", "endless-stream", "no-documents"],
)
def test_bad_hub_settings_are_an_error(keywords, message):
    with pytest.raises(ValueError, match=message):
        HubSource(**keywords)


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"max_documents": 2}, 2),
        ({"max_documents": 9}, 4),
        ({"max_bytes": 3}, 2),
        ({"max_bytes": 1000}, 4),
        ({"max_bytes": 6, "max_documents": 1}, 1),
    ],
    ids=str,
)
def test_limits_keep_the_first_documents(tmp_path, write, limits, expected):
    lines = [json.dumps({"text": text}) for text in ("a", "bb", "ccc", "dddd")]
    source = JsonlSource(files=write("a.jsonl", "\n".join(lines)), **limits)
    assert texts(source, tmp_path) == ["a", "bb", "ccc", "dddd"][:expected]


def test_a_first_document_beyond_max_bytes_is_used_anyway(tmp_path, write):
    assert texts(TextSource(files=write("a.txt", "long"), max_bytes=1), tmp_path) == ["long"]


def test_python_files_below_a_folder(tmp_path, monkeypatch):
    """They are sorted by folder, as paths are; links to files count, and broken ones do not."""
    for name in ("a/b.py", "a-b/c.py", "a.py", "left/out.py", "a/left/d.py", "x.py/y.py", "z.pyi"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "link.py").symlink_to("a.py")
    (tmp_path / "broken.py").symlink_to("none.py")
    found = python_files(tmp_path, without={"left"})
    assert found == sorted(found)
    names = [path.relative_to(tmp_path).as_posix() for path in found]
    assert names == ["a/b.py", "a-b/c.py", "a.py", "link.py", "x.py/y.py"]
    listed = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(str(path)) or scandir(path))
    python_files(tmp_path, without={"left"})
    assert not [path for path in listed if "left" in path]
