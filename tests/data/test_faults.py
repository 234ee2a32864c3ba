"""Tests sources on damaged files, foreign formats and odd encodings that lie beside good files."""

import bz2
import codecs
import gzip
import json
import logging
import lzma

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from lctrain.data import HubSource, JsonlSource, ParquetSource, TextSource
from lctrain.data.chat.readers import read_chat
from lctrain.data.documents import read_documents

LINES = b"".join(b'{"text": "line %d"}\n' % number for number in range(2000))


def zstd(content: bytes) -> bytes:
    return pa.Codec("zstd").compress(content, asbytes=True)


def write_lz4(path, content: bytes) -> str:
    with pa.OSFile(str(path), "wb") as file, pa.CompressedOutputStream(file, "lz4") as stream:
        stream.write(content)
    return str(path)


CODECS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstd}


@pytest.fixture
def write(tmp_path):
    """Returns a function that writes a file and returns its path as a string."""

    def write_file(name: str, content: str | bytes) -> str:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(tmp_path / name)

    return write_file


@pytest.fixture
def read(tmp_path):
    """Returns a function that reads a source and returns a list of (text, fault)."""

    def read_source(source) -> list[tuple[str | None, str | None]]:
        dataset = source.load(tmp_path / "cache")
        return list(zip(dataset["text"], dataset["fault"], strict=True))

    return read_source


def test_one_bad_file_of_each_kind_does_not_stop_the_others(write, read, caplog):
    files = [
        write("good.txt", "good"),
        write("mark.txt", b"\xef\xbb\xbfmark"),
        write("wide.txt", "wîde".encode("utf-16")),
        write("wider.txt", "wider".encode("utf-32")),
        write("packed.txt", gzip.compress(b"packed, without a suffix")),
        write("plain.gz", "plain, with a suffix"),
        write("latin.txt", "caf\xe9".encode("latin-1")),
        write("cut.txt.gz", gzip.compress(b"0123456789 " * 2**16)[:-20]),
        write("nothing.txt", ""),
        write("binary.txt", b"\x7fELF\x00\x00"),
        write("half.txt", "half".encode("utf-16-le")),
        write("table.txt", b"PAR1...."),
        write("archive.txt", b"PK\x03\x04...."),
    ]
    with caplog.at_level(logging.WARNING):
        rows = read(TextSource(files=files))
    texts = [text for text, _ in rows]
    assert texts[:6] == [
        "good", "mark", "wîde", "wider", "packed, without a suffix", "plain, with a suffix",
    ]  # fmt: skip
    assert texts[7].startswith("0123456789 ")
    assert texts[8] == ""
    assert [texts[i] for i in (6, 9, 10, 11, 12)] == [None] * 5
    faults = [fault for _, fault in rows]
    assert faults[:6] == [None] * 6
    for fault, name, words in [
        (faults[6], "latin.txt", "must be UTF-8 text, got"),
        (faults[6], "with byte 3 that is not", "data.encoding"),
        (faults[7], "cut.txt.gz", "damaged or truncated after"),
        (faults[8], "nothing.txt", "is empty"),
        (faults[9], "binary.txt", "zero bytes"),
        (faults[10], "half.txt", "data.encoding=utf-16-le"),
        (faults[11], "table.txt", "data=parquet"),
        (faults[12], "archive.txt", "Unpack it"),
    ]:
        assert name in fault
        assert words in fault
    (warning,) = [r.getMessage() for r in caplog.records if "could not be read" in r.getMessage()]
    assert warning.startswith("5 of 13 documents, lines or files could not be read, 2 are empty or")
    assert "latin.txt" in warning
    assert "and 2 more" in warning


def test_the_first_bad_file_stops_a_strict_run(write, read):
    files = [write("a.txt", "a"), write("empty.txt", ""), write("bad.txt", b"\xff")]
    with pytest.raises(ValueError, match=r"bad\.txt with byte 0 that is not"):
        read(TextSource(files=files, on_error="raise"))
    assert len(read(TextSource(files=files[:2], on_error="raise"))) == 2  # empty is no fault


def test_an_encoding_can_be_named(write, read):
    assert read(TextSource(files=write("a.txt", b"caf\xe9"), encoding="latin-1")) == [
        ("café", None)
    ]
    line = '{"text": "é"}\n'.encode("utf-16-le")
    assert read(JsonlSource(files=write("a.jsonl", line), encoding="utf-16-le")) == [("é", None)]
    with pytest.raises(ValueError, match="encoding must be one that Python knows, got 'base64'"):
        TextSource(files="x", encoding="base64")


@pytest.mark.parametrize("suffix", CODECS)
def test_compressed_lines_are_read_up_to_the_damage(write, read, suffix):
    whole = CODECS[suffix](LINES)
    rows = read(JsonlSource(files=write(f"whole.jsonl.{suffix}", whole)))
    assert rows == [(f"line {number}", None) for number in range(2000)]
    cut = write(f"cut.jsonl.{suffix}", whole[: -len(whole) // 3])
    good = write("good.jsonl", '{"text": "good"}')
    *lines, (text, fault), last = read(JsonlSource(files=[cut, good]))
    assert lines == rows[: len(lines)]
    assert text is None
    assert cut in fault
    assert f"truncated after line {len(lines)}" in fault
    assert last == ("good", None)
    with pytest.raises(ValueError, match="damaged or truncated"):
        read(JsonlSource(files=[cut, good], on_error="raise"))


def test_lz4_and_several_frames_are_read(write, read, tmp_path):
    two = write("a.zst", zstd(b'{"text": "1"}\n') + zstd(b'{"text": "2"}\n'))
    four = write_lz4(tmp_path / "b.lz4", b'{"text": "3"}\n')
    rows = read(JsonlSource(files=[two, four]))
    assert [text for text, _ in rows if text] == ["1", "2", "3"]


def test_bad_lines_are_counted_and_the_others_read(write, read, tmp_path):
    lines = [
        "\ufeff" + json.dumps({"text": "first"}),
        json.dumps({"text": None}),
        json.dumps({"text": "a\ud83db"}),
        json.dumps({"text": 3}),
        json.dumps({"body": "x"}),
        "{not json",
        "[" * 100_000,
        "",
        "\ufeff" + json.dumps({"text": "joined"}),
        json.dumps({"text": "\ud83d\ude00"}),
    ]
    path = write("a.jsonl", "\r\n".join(lines))
    source = JsonlSource(files=path)
    rows = read(source)
    assert [text for text, _ in rows] == [
        "first", None, "a\ufffdb", None, None, None, None, "joined", "😀",
    ]  # fmt: skip
    assert [fault is None for _, fault in rows] == [True, True, *[False] * 5, True, True]
    assert "a.jsonl:3: field 'text' must be Unicode text, got an unpaired surrogate" in rows[2][1]
    documents = read_documents(source.load(tmp_path / "cache"), "a")
    assert len(documents) == 4
    assert (documents.dropped_empty, documents.dropped_unreadable) == (1, 4)
    assert documents.repaired == 1


def test_lines_in_utf16_and_lines_that_are_not_utf8(write, read):
    wide = write("wide.jsonl", '{"text": "é"}\n{"text": "b"}\n'.encode("utf-16"))
    torn = write("torn.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n{"text": "c"}\n')
    blank = write("blank.jsonl", "\n\n")
    rows = read(JsonlSource(files=[wide, torn, blank]))
    assert [text for text, _ in rows] == ["é", "b", "a", None, "c", ""]
    assert "torn.jsonl:2" in rows[3][1]
    assert "which is empty" in rows[5][1]


@pytest.mark.parametrize("encoding", [None, "utf-16-le"])
def test_byte_order_marks_of_utf16_files_joined_into_one(write, read, encoding):
    part = codecs.BOM_UTF16_LE + '{"text": "é"}\n'.encode("utf-16-le")
    source = JsonlSource(files=write("joined.jsonl", part + part), encoding=encoding)
    assert read(source) == [("é", None), ("é", None)]


def test_nested_fields_and_nulls_on_the_way(write, read, tmp_path):
    records = [
        {"doc": {"text": "in"}}, {"doc": None}, {"doc": {"text": None}}, {"doc": [1]},
        {"doc": {}}, {"doc.text": "flat"},
    ]  # fmt: skip
    path = write("a.jsonl", "\n".join(map(json.dumps, records)))
    rows = read(JsonlSource(files=path, field="doc.text"))
    assert [text for text, _ in rows] == ["in", None, None, None, None, "flat"]
    assert [fault is None for _, fault in rows] == [True, True, True, False, False, True]
    structs = pa.array([{"text": "in"}, None, {"text": None}])
    pq.write_table(pa.table({"doc": structs}), tmp_path / "a.parquet")
    source = ParquetSource(files=str(tmp_path / "a.parquet"), field="doc.text")
    assert read(source) == [("in", None), (None, None), (None, None)]
    pq.write_table(pa.table({"doc.text": ["flat"]}), tmp_path / "b.parquet")
    assert read(ParquetSource(files=str(tmp_path / "b.parquet"), field="doc.text")) == [
        ("flat", None)
    ]


def test_nothing_to_read_at_all_names_the_first_fault(write, read):
    files = [write("a.jsonl", '{"body": 1}\n{"body": 2}'), write("b.jsonl", "")]
    with pytest.raises(
        ValueError, match=r"a\.jsonl:1: .*Set data\.field.*The data hold 2 more faults"
    ):
        read(JsonlSource(files=files))


def test_shards_of_mixed_types_and_one_that_is_damaged(tmp_path, read):
    columns = {
        "0_string": pa.array(["a", None]),
        "1_large": pa.array(["b"], pa.large_string()),
        "2_view": pa.array(["c"], pa.string_view()),
        "3_dictionary": pa.array(["d", "d"]).dictionary_encode(),
        "4_binary": pa.array([b"e", b"\xff"]),
        "5_null": pa.nulls(1),
        "6_number": pa.array([1]),
        "7_list": pa.array([["x"]]),
    }
    for name, column in columns.items():
        pq.write_table(pa.table({"text": column}), tmp_path / f"{name}.parquet")
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "8_other.parquet")
    (tmp_path / "9_zero.parquet").write_bytes(b"")
    (tmp_path / "9_junk.parquet").write_bytes(b"PAR1 junk")
    rows = read(ParquetSource(files=f"{tmp_path}/*.parquet"))
    assert [t for t, f in rows if f is None] == ["a", None, "b", "c", "d", "d", "e", None]
    faults = [fault for _, fault in rows if fault]
    expected = ["4_binary", "6_number", "7_list", "8_other", "9_junk", "9_zero"]
    for fault, name in zip(faults, expected, strict=True):
        assert name in fault
    with pytest.raises(ValueError, match=r"8_other\.parquet: field must be a column"):
        read(ParquetSource(files=str(tmp_path / "8_other.parquet"), on_error="raise"))


@pytest.mark.parametrize("source", [TextSource, JsonlSource, ParquetSource])
def test_a_pointer_of_git_lfs_is_no_text(source, write, read):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    path = write("a.parquet", pointer)
    with pytest.raises(ValueError, match=r"a\.parquet, which is a pointer of Git LFS.*lfs pull"):
        read(source(files=[path], on_error="raise"))
    (row,) = read_chat(((path, "a", 0, 0),))
    assert "a.parquet, which is a pointer of Git LFS" in row["fault"]


def test_another_file_type_among_parquet_files_has_its_remedy(write, read):
    for content, words in ((b"PK\x03\x04..", "Unpack it"), (b"PAR1 junk", "Restore the file")):
        path = write("b.parquet", content)
        with pytest.raises(ValueError, match=rf"must be Parquet files, got .*{words}"):
            read(ParquetSource(files=[path], on_error="raise"))


def test_a_damaged_row_group_is_left_out(tmp_path, read):
    path = tmp_path / "a.parquet"
    table = pa.table({"text": [f"row {number}" for number in range(40)]})
    pq.write_table(table, path, row_group_size=10, use_dictionary=False)
    place = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    content = bytearray(path.read_bytes())
    content[place : place + 30] = b"\xaa" * 30
    path.write_bytes(content)
    rows = read(ParquetSource(files=str(path)))
    assert [t for t, f in rows if f is None] == [f"row {n}" for n in (*range(10), *range(20, 40))]
    (fault,) = [fault for _, fault in rows if fault]
    assert "damaged in row group 1, which is left out" in fault


def test_folders_of_save_to_disk_are_read(tmp_path):
    Dataset.from_dict({"text": ["a", "b"]}).save_to_disk(tmp_path / "one")
    splits = {"train": [{"t": "a"}, None], "test": [{"t": "held out"}]}
    DatasetDict({n: Dataset.from_dict({"doc": rows}) for n, rows in splits.items()}).save_to_disk(
        tmp_path / "many"
    )
    one = HubSource(dataset=str(tmp_path / "one"))
    assert one.load(tmp_path)["text"][:] == ["a", "b"]
    part = HubSource(dataset=str(tmp_path / "one"), split="train[50%:]")
    assert part.load(tmp_path)["text"][:] == ["b"]
    many = HubSource(dataset=str(tmp_path / "many"), field="doc.t", held_out_split="test")
    assert many.load(tmp_path)["text"][:] == ["a", None]
    assert many.load_held_out(tmp_path)["text"][:] == ["held out"]
    with pytest.raises(ValueError, match=r"split must be one of \['test', 'train'\]"):
        HubSource(dataset=str(tmp_path / "many"), split="valid").load(tmp_path)
    with pytest.raises(ValueError, match="split must be train for"):
        HubSource(dataset=str(tmp_path / "one"), split="test").load(tmp_path)
    with pytest.raises(ValueError, match=r"save_to_disk, read it with data=hub data\.dataset="):
        TextSource(files=str(tmp_path / "one")).load(tmp_path)


def test_a_hub_column_of_bytes_is_read_value_by_value(tmp_path):
    Dataset.from_dict({"body": [b"a", b"\xff", None]}).save_to_disk(tmp_path / "bytes")
    dataset = HubSource(dataset=str(tmp_path / "bytes"), field="body").load(tmp_path)
    assert dataset["text"][:] == ["a", None, None]
    assert [fault is None for fault in dataset["fault"]] == [True, False, True]
    strict = HubSource(dataset=str(tmp_path / "bytes"), field="body", on_error="raise")
    with pytest.raises(ValueError, match="bytes:1: field 'body' must hold UTF-8"):
        strict.load(tmp_path)


def test_on_error_is_skip_or_raise():
    with pytest.raises(ValueError, match="on_error must be one of skip, raise, got 'ignore'"):
        TextSource(files="x", on_error="ignore")
