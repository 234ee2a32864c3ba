"""Tests the loggers: an interrupted and resumed run has one file, or one curve."""

import csv
import logging
import time
from contextlib import nullcontext

import pytest
import torch

from lctrain.loggers import MetricsCSV, closing, tensorboard_logger, wandb_logger


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_columns_may_come_later(tmp_path):
    logger = MetricsCSV(str(tmp_path / "run"))
    logger.log_metrics({"loss": torch.tensor(2.0)}, 0)
    logger.log_metrics({"speed": 3.0, "loss": 1.5}, 1)
    logger.log_metrics({"loss": 1.0}, 2)
    assert rows(logger.path) == [
        {"step": "0", "loss": "2.0", "speed": ""},
        {"step": "1", "loss": "1.5", "speed": "3.0"},
        {"step": "2", "loss": "1.0", "speed": ""},
    ]


def test_a_resumed_run_continues_the_file(tmp_path):
    """The run is killed while it writes the row of step 4, and resumes from step 2."""
    first = MetricsCSV(str(tmp_path))
    for step in range(4):
        first.log_metrics({"loss": float(step), "speed": 9.0}, step)
    with first.path.open("a") as file:
        file.write("4,4")
    second = MetricsCSV(str(tmp_path))
    second.log_metrics({"loss": 20.0}, 2)
    second.log_metrics({"loss": 30.0}, 3)
    assert [row["loss"] for row in rows(second.path)] == ["0.0", "1.0", "20.0", "30.0"]
    assert [row["speed"] for row in rows(second.path)] == ["9.0", "9.0", "", ""]


def test_damaged_rows_are_left_out(tmp_path):
    logger = MetricsCSV(str(tmp_path))
    for step in range(3):
        logger.log_metrics({"loss": float(step)}, step)
    lines = logger.path.read_bytes().splitlines(keepends=True)
    lines[2] = b"\xff\xfe\0\0" + lines[2][4:]
    logger.path.write_bytes(b"".join(lines))
    MetricsCSV(str(tmp_path)).log_metrics({"loss": 3.0}, 3)
    assert [row["step"] for row in rows(logger.path)] == ["0", "2", "3"]


def test_nothing_is_lost_before_the_first_row(tmp_path):
    MetricsCSV(str(tmp_path)).log_metrics({"loss": 1.0}, 0)
    again = MetricsCSV(str(tmp_path))
    again.log_hyperparams({"a": 1})
    assert len(rows(again.path)) == 1


@pytest.mark.parametrize("fails", [False, True], ids=["finished", "failed"])
def test_the_wandb_run_ends_with_its_job(tmp_path, monkeypatch, fails):
    import wandb

    def job(logger):
        with closing([MetricsCSV(str(tmp_path)), logger]):
            assert logger.experiment is wandb.run
            if fails:
                raise RuntimeError("stopped")

    monkeypatch.setenv("WANDB_SILENT", "true")
    with pytest.raises(RuntimeError, match="stopped") if fails else nullcontext():
        job(wandb_logger(str(tmp_path)))
    assert wandb.run is None


def event_files(folder):
    return sorted(path.name for path in (folder / "tensorboard").glob("events.out.tfevents.*"))


def test_a_new_event_file_is_read_last(tmp_path):
    """Whatever the second's other files are called."""
    (tmp_path / "tensorboard").mkdir()
    earlier = f"events.out.tfevents.{int(time.time()) + 1}.~.9.9"
    (tmp_path / "tensorboard" / earlier).touch()
    logger = tensorboard_logger(str(tmp_path))
    with closing([logger]):
        logger.log_metrics({"loss": 1.0}, 0)
    names = event_files(tmp_path)
    assert len(names) == 2
    assert names[0] == earlier


def test_a_logger_has_one_event_file_for_all_phases(tmp_path):
    """A validation comes before fit; each ends with finalize, which leaves all points on disk."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = tensorboard_logger(str(tmp_path))
    with closing([logger]):
        for step in range(3):
            logger.log_metrics({"loss": 1.0}, step)
            logger.finalize("success")
            events = EventAccumulator(str(tmp_path / "tensorboard"))
            events.Reload()
            assert [event.step for event in events.Scalars("loss")] == [*range(step + 1)]
    assert len(event_files(tmp_path)) == 1


def test_event_files_far_ahead_of_the_clock_are_named(tmp_path, caplog):
    (tmp_path / "tensorboard").mkdir()
    ahead = f"events.out.tfevents.{int(time.time()) + 10**6}.host.1.0"
    (tmp_path / "tensorboard" / ahead).touch()
    logger = tensorboard_logger(str(tmp_path))
    with caplog.at_level(logging.WARNING, "lctrain.loggers"), closing([logger]):
        logger.log_metrics({"loss": 1.0}, 0)
    assert "ahead of this machine's clock" in caplog.text
