"""Tests checks of a command before torch is imported that have no test on the command line."""

from types import SimpleNamespace

import pytest

from lctrain.preflight import check_logger_folders


@pytest.mark.parametrize("url", ["s3://bucket/runs", "memory://runs", "file:///runs"])
@pytest.mark.parametrize("own", [False, True], ids=["a logger of lctrain", "a logger of the user"])
def test_the_url_of_a_logger_is_left_to_the_logger(tmp_path, monkeypatch, url, own):
    """A URL is no local folder: the check neither creates one nor refuses it."""
    monkeypatch.chdir(tmp_path)
    logger = {"save_dir": url} if own else SimpleNamespace(save_dir=url)
    check_logger_folders({"csv": logger, "off": None}, str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_the_local_folder_of_a_logger_is_checked(tmp_path):
    (tmp_path / "file").write_text("")
    folder = str(tmp_path / "file" / "logs")
    with pytest.raises(
        ValueError, match=r"logger\.mine.save_dir must be a folder that can be writ"
    ):
        check_logger_folders({"mine": {"save_dir": folder}}, str(tmp_path / "out"))
    check_logger_folders({"mine": {"save_dir": str(tmp_path / "new")}}, str(tmp_path / "out"))
    assert (tmp_path / "new").is_dir()
