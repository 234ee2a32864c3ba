"""Tests that TensorBoard and Weights & Biases show a resumed run as one run."""

import json
import signal
import struct

import pytest

from lctrain.train import train
from tests.run.test_life import SHORT, at
from tests.train.runs import config, run_command, wandb_files

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")

OPTIONS = ("weight_decay", "held_out_fraction", "accumulate_grad_batches")


def tensorboard_of(folder):
    """Returns a run's scalars as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return events


def steps_of(folder, tag):
    """Returns the steps of one scalar as TensorBoard shows them."""
    return [event.step for event in tensorboard_of(folder).Scalars(tag)]


def wandb_records(folder):
    """Returns (steps with a training loss, options) from the records of all parts of a run."""
    from wandb.proto.wandb_internal_pb2 import Record

    steps, options = [], set()
    for path in wandb_files(folder):
        for data in log_records(path.read_bytes()):
            record = Record()
            record.ParseFromString(data)
            row = {
                "/".join(item.nested_key) or item.key: item.value_json
                for item in record.history.item
            }
            if "train/loss" in row:
                steps.append(int(json.loads(row["trainer/global_step"])))
            for update in (record.config, record.run.config):
                options |= {item.key or item.nested_key[0] for item in update.update}
                options |= {name for item in update.update for name in _names(item.value_json)}
    return steps, options


def log_records(data, header=7, block=2**15):
    """Returns the records of a W&B file: a header, then the log format of LevelDB."""
    place, parts = header, []
    while place < len(data):
        left = block - place % block
        if left < 7:  # the rest of a block is padding
            place += left
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        parts.append(data[place + 7 : place + 7 + length])
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield b"".join(parts)
            parts = []


def _names(text):
    value = json.loads(text)
    return list(value) if isinstance(value, dict) else []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["stopped", "killed"])
def test_tensorboard_shows_every_step_once(tiny, tmp_path, number):
    """The run is killed at step 5 and resumes from step 4."""
    folder = tmp_path / "1"
    overrides = [*tiny, *SHORT, "logger=tensorboard", "trainer.validate_every_n_steps=2"]
    run_command([*overrides, at(5, int(number))], folder, check=False)
    assert (folder / "checkpoints" / "last.ckpt").exists()
    train(config(*overrides, "ckpt_path=last", output_dir=folder))
    assert steps_of(folder, "train/loss") == [0, 1, 2, 3, 4, 5]
    assert steps_of(folder, "val/loss") == sorted(set(steps_of(folder, "val/loss")))
    assert [path.name for path in tmp_path.rglob("tensorboard")] == ["tensorboard"]
    assert not [path for path in (folder / "tensorboard").iterdir() if path.is_dir()]
    shown = tensorboard_of(folder).Tensors("options/text_summary")[-1]
    for text in (
        shown.tensor_proto.string_val[0].decode(),
        (folder / "tensorboard" / "hparams.yaml").read_text(),
        (folder / "hparams.yaml").read_text(),
    ):
        assert all(option in text for option in OPTIONS)


@pytest.mark.filterwarnings("ignore")
def test_wandb_has_every_step_once(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = tmp_path / "1"
    overrides = [*tiny, *SHORT, "logger=wandb"]
    with pytest.raises(SystemExit):
        train(config(*overrides, at(3, int(signal.SIGTERM)), output_dir=folder))
    train(config(*overrides, "ckpt_path=last", output_dir=folder))
    run_id = json.loads((folder / "run.json").read_text())["id"]
    parts = [path.name for path in wandb_files(folder)]
    assert parts == [f"run-{run_id}.wandb"] * 2
    steps, options = wandb_records(folder)
    assert steps == [0, 1, 2, 3, 4, 5]
    assert set(OPTIONS) <= options
