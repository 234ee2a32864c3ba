"""Tests that the recipe `smollm2` reads R's data and Debian packages, and refuses damaged ones."""

import gzip

import pytest

from lctrain.recipes.smollm2.debian_package import read_files
from lctrain.recipes.smollm2.novels import NOVELS, write_novels
from lctrain.recipes.smollm2.r_data import parse, read_objects
from tests.recipes import r_package as r


@pytest.mark.parametrize("version", [2, 3])
def test_vectors_and_lists_are_read(version):
    body = r.named_list(
        texts=r.vector(["Größe", "", None]), numbers=r.vector([3, -1]), real=r.vector([0.5])
    )
    expected = {"texts": ["Größe", "", None], "numbers": [3, -1], "real": [0.5]}
    assert parse(r.serialized(body, version)) == expected


def test_a_symbol_is_written_once_and_referred_to_later():
    again = r.integers(0x402, 0x1FF) + r.vector(["c", "d"]) + r.integers(0xFE)
    later = r.integers(0x213, 2) + r.vector([1]) + r.vector([2]) + again
    body = r.integers(19, 2) + r.named_list(a=r.vector([7]), b=r.vector([8])) + later
    assert parse(r.serialized(body)) == [{"a": [7], "b": [8]}, {"c": [1], "d": [2]}]
    with pytest.raises(ValueError, match=r"got a reference to the symbol 1 of 0\. Fetch"):
        parse(r.serialized(later))


def test_the_objects_of_a_package_are_read_by_name():
    objects = {"one": r.vector(["a", "b"]), "two": r.vector([])}
    assert read_objects(*r.r_objects(objects)) == {"one": ["a", "b"], "two": []}


def test_damaged_data_is_refused():
    places, objects = r.r_objects({"one": r.vector(["a", "b"])})
    damaged = [
        (places[:-9], objects),
        (places, objects[:-3]),
        (places, objects[:3] + b"\x00" + objects[4:]),
        (gzip.compress(r.serialized(r.vector([1]))), objects),
        (gzip.compress(r.serialized(r.named_list(variables=r.vector([1])))), objects),
        (gzip.compress(r.serialized(r.vector([1]))[:-2]), objects),
        (gzip.compress(r.serialized(r.vector([1])) + b"more"), objects),
        r.r_objects({"one": r.vector(["a"]).replace(b"a", b"\xff")}),
        r.r_objects({"one": r.integers(0x213, 0) + r.names("a")}),
        r.r_objects({"one": r.integers(19, 1) * 3000}),
        (gzip.compress(r.serialized(r.compressed(variables=r.vector([1])))), objects),
        (gzip.compress(r.serialized(r.compressed(variables=r.named_list(a=r.vector([1]))))), b""),
    ]
    for content in damaged:
        with pytest.raises(ValueError, match=r"must be whole, got .* Fetch the package again\."):
            read_objects(*content)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"A\n", r"the form b'A\\n'"),
        (r.serialized(r.integers(3)), "the type 3"),
    ],
)
def test_other_data_of_r_is_refused(content, what):
    with pytest.raises(ValueError, match=rf"got {what}. Fetch the version"):
        parse(content)


def test_another_compression_is_refused():
    with pytest.raises(ValueError, match=r"got the compression \[3\]"):
        read_objects(*r.r_objects({"one": r.vector([1])}, compressed=3))


@pytest.mark.parametrize("compression", ["xz", "gz", "bz2"])
def test_files_of_a_debian_package_are_read(tmp_path, compression):
    package = tmp_path / "some.deb"
    package.write_bytes(r.debian_package({"usr/a": b"abc", "usr/b": b""}, compression))
    assert read_files(package, ["usr/b", "usr/a"]) == [b"", b"abc"]
    with pytest.raises(ValueError, match=r"package must hold usr/c, got .*some.deb"):
        read_files(package, ["usr/a", "usr/c"])


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"PK\x03\x04", "which is no ar archive"),
        (r.debian_package({"usr/a": b"abc"})[:-40], "which is cut off"),
        (b"!<arch>\n" + r.member("debian-binary", b"2.0\n"), "without data.tar"),
        (b"!<arch>\n\xff" + r.member("data.tar.xz", b"")[1:], "without data.tar"),
        (b"!<arch>\n" + r.member("data.tar.xz", b"no archive"), "whose data.tar.xz is damaged"),
    ],
)
def test_what_is_no_whole_package_is_refused(tmp_path, content, what):
    package = tmp_path / "some.deb"
    package.write_bytes(content)
    with pytest.raises(ValueError, match=rf"got .*some.deb,? {what}. Fetch it again"):
        read_files(package, ["usr/a"])


def test_each_novel_becomes_a_text_file(tmp_path):
    package = tmp_path / "novels.deb"
    texts = {name: f"{name.upper()}\n\nIt is a truth, naïvely.\n" for name in NOVELS}
    package.write_bytes(r.novel_package(texts))
    write_novels(package, tmp_path / "novels")
    written = {path.stem: path.read_text("utf-8") for path in (tmp_path / "novels").iterdir()}
    assert written == texts


def test_a_package_without_a_novel_is_refused(tmp_path):
    package = tmp_path / "novels.deb"
    package.write_bytes(r.novel_package(dict.fromkeys(NOVELS[:-1], "a\n")))
    with pytest.raises(ValueError, match=r"must hold the lines of sensesensibility, got .* emma"):
        write_novels(package, tmp_path / "novels")
    assert not (tmp_path / "novels").exists()
