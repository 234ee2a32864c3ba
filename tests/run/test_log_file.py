"""Tests train.log: it holds log lines, warnings, and the error that ended the run."""

import logging
import warnings

import pytest

from lctrain.run.log_file import log_file, log_to_file
from lctrain.warn import begin_warnings, warn_once


def test_holds_what_was_logged_warned_of_and_raised(tmp_path, capsys):
    path = tmp_path / "train.log"

    def run():
        with log_file(path):
            logging.getLogger("lctrain.somewhere").info("started")
            logging.getLogger("other").setLevel(logging.WARNING)
            logging.getLogger("other").info("chatter")
            logging.getLogger("other").warning("beware")
            warnings.warn("look out", UserWarning, stacklevel=1)
            log_to_file("the report")
            raise ValueError("seed must be right")

    shown = warnings.showwarning
    with pytest.warns(UserWarning, match="look out"), pytest.raises(ValueError, match="seed"):
        run()
    text = path.read_text()
    for part in ("started", "beware", "look out", "the report", "ValueError: seed must be right"):
        assert text.count(part) == (2 if part == "look out" else 1), part
    assert "chatter" not in text
    assert "the report" not in capsys.readouterr().out
    assert warnings.showwarning is shown
    logging.getLogger("lctrain.somewhere").warning("after the end")
    assert "after the end" not in path.read_text()


def test_other_ranks_write_nothing(tmp_path):
    with log_file(tmp_path / "train.log", writes=False):
        logging.getLogger("lctrain").warning("x")
    assert not (tmp_path / "train.log").exists()


def test_every_run_of_a_process_has_its_own_warnings(tmp_path, monkeypatch):
    """As the jobs of one --multirun, which is one command."""
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    begin_warnings()
    texts = []
    for run in ("first", "second"):
        path = tmp_path / run
        with warnings.catch_warnings(), log_file(path):
            warnings.simplefilter("always")
            for _ in range(2):
                warn_once(logging.getLogger("lctrain.somewhere"), "too %s", "long")
                warnings.warn("look out", UserWarning, stacklevel=1)
        texts.append(path.read_text())
    for text in texts:
        assert text.count("too long") == text.count("UserWarning: look out") == 1
