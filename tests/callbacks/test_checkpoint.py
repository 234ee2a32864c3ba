"""Tests StepCheckpoint: when it saves, what it keeps, and that it writes files atomically."""

import errno
import logging
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from lctrain.callbacks import AtomicCheckpointIO, StepCheckpoint
from lctrain.callbacks.checkpoint import check_writable
from lctrain.config import OptimConfig
from lctrain.distributed import Topology
from lctrain.module import LongContextModule
from lctrain.run.resume import find_checkpoint
from lctrain.run.storage import StorageError
from tests.training import loader, make_batch, make_trainer

PACKS = [make_batch([12, 5], i) for i in range(7)]


def fit(tmp_path, make_llama, checkpoint, **settings):
    trainer = make_trainer(
        tmp_path,
        [checkpoint],
        enable_checkpointing=True,
        plugins=[AtomicCheckpointIO()],
        **settings,
    )
    trainer.fit(LongContextModule(make_llama(), OptimConfig()), loader(PACKS))
    return trainer


def test_saves_every_n_steps_and_the_end(tmp_path, make_llama):
    checkpoint = StepCheckpoint(tmp_path / "c", every_n_steps=2, keep=2)
    fit(tmp_path, make_llama, checkpoint)
    names = sorted(path.name for path in (tmp_path / "c").iterdir())
    assert names == ["last.ckpt", "step-00000006.ckpt", "step-00000007.ckpt"]
    assert checkpoint.last_path.resolve().name == "step-00000007.ckpt"
    assert torch.load(checkpoint.last_path, weights_only=False)["global_step"] == 7


def test_counts_optimizer_steps_not_micro_batches(tmp_path, make_llama):
    checkpoint = StepCheckpoint(tmp_path / "c", every_n_steps=2, keep=9)
    fit(tmp_path, make_llama, checkpoint, accumulate_grad_batches=3)
    names = sorted(path.name for path in (tmp_path / "c").glob("step-*"))
    assert names == ["step-00000002.ckpt", "step-00000003.ckpt"]


def test_last_step_of_max_steps_is_saved_in_the_middle_of_the_epoch(tmp_path, make_llama):
    """A run resumed with more steps can then finish the epoch."""
    checkpoint = StepCheckpoint(tmp_path / "c", every_n_steps=100)
    fit(tmp_path, make_llama, checkpoint, max_steps=3, max_epochs=-1)
    loops = torch.load(checkpoint.last_path, weights_only=False)["loops"]["fit_loop"]
    assert loops["epoch_loop.batch_progress"]["total"]["processed"] == 3
    assert loops["epoch_progress"]["total"]["processed"] == 0


@pytest.mark.parametrize("name", ["every_n_steps", "keep"])
def test_numbers_below_one(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        StepCheckpoint(tmp_path, **{name: 0})


def test_unwritable_directory_is_an_error_before_training(tmp_path, make_llama):
    """A file stands at the folder's path, so nobody can write into it, not even root."""
    (tmp_path / "file").write_text("")
    module = LongContextModule(make_llama(), OptimConfig())
    trainer = make_trainer(
        tmp_path, [StepCheckpoint(tmp_path / "file" / "c")], enable_checkpointing=True
    )
    with pytest.raises(ValueError, match="checkpoint directory must be writable"):
        trainer.fit(module, loader(PACKS))
    assert trainer.global_step == 0


def test_two_for_one_directory_are_an_error_before_training(tmp_path, make_llama):
    module = LongContextModule(make_llama(), OptimConfig())
    (tmp_path / "c").mkdir()
    twins = [StepCheckpoint(tmp_path / "c"), StepCheckpoint(tmp_path / "a" / ".." / "c")]
    trainer = make_trainer(tmp_path, twins, enable_checkpointing=True)
    with pytest.raises(ValueError, match=r"one StepCheckpoint per directory, got two for .*/c\. "):
        trainer.fit(module, loader(PACKS))
    assert trainer.global_step == 0
    apart = [StepCheckpoint(tmp_path / name, every_n_steps=2) for name in "ab"]
    make_trainer(tmp_path, apart, enable_checkpointing=True).fit(module, loader(PACKS))
    assert [path.name for path in (tmp_path / "a").iterdir()] == [
        path.name for path in (tmp_path / "b").iterdir()
    ]


def test_check_writable_leaves_nothing(tmp_path):
    check_writable(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


@pytest.mark.parametrize("old", ["file", "folder", "nothing"])
@pytest.mark.parametrize("new", ["file", "folder"])
def test_a_checkpoint_replaces_one_of_the_other_kind(tmp_path, old, new):
    """A run that went back, with another strategy, writes files where folders were, and so on."""

    def write(path, kind):
        if kind == "folder":
            path.mkdir()
            (path / "manifest.json").write_text("{}")
        elif kind == "file":
            path.write_bytes(b"x")

    checkpoint = StepCheckpoint(tmp_path)
    final, pending = (tmp_path / f"step-00000200.ckpt{end}" for end in ("", ".tmp"))
    write(final, old)
    write(pending, new)
    checkpoint._pending = pending
    checkpoint.complete(make_trainer(tmp_path))
    assert final.is_dir() == (new == "folder")
    assert not pending.exists()
    assert checkpoint.last_path.resolve() == final


def test_interrupted_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.ckpt"
    plugin = AtomicCheckpointIO()
    plugin.save_checkpoint({"step": 1}, path)

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        plugin.save_checkpoint({"step": 2}, path)
    assert plugin.load_checkpoint(path) == {"step": 1}


def test_next_start_deletes_what_a_killed_write_left(tmp_path, make_llama, caplog):
    """SIGKILL lets no handler run, so the temporary file stays until the next start."""
    folder = tmp_path / "c"
    fit(tmp_path, make_llama, StepCheckpoint(folder, every_n_steps=2), max_steps=2, max_epochs=-1)
    (folder / "step-00000004.ckpt.tmp").write_bytes(b"half a checkpoint")
    (folder / "mine.tmp").write_text("")
    caplog.set_level(logging.INFO, "lctrain.run.folder")
    fit(tmp_path, make_llama, StepCheckpoint(folder, every_n_steps=2), max_steps=2, max_epochs=-1)
    left = folder / "step-00000004.ckpt.tmp"
    assert caplog.messages.count(f"Deleted {left}, which a killed run left.") == 1
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["last.ckpt", "mine.tmp", "step-00000002.ckpt"]


class FullDisk(AtomicCheckpointIO):
    """A callback that raises the error of a full disk from a given step on."""

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        if checkpoint["global_step"] >= 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().save_checkpoint(checkpoint, path)


def test_a_full_disk_says_so(tmp_path, make_llama):
    checkpoint = StepCheckpoint(tmp_path / "c", every_n_steps=2)
    trainer = make_trainer(tmp_path, [checkpoint], enable_checkpointing=True, plugins=[FullDisk()])
    message = (
        r"^the checkpoint of step 4 could not be written to .*/c: No space left on device "
        r"\(.* GiB free\)\. Free some space, then go on from step-00000002.ckpt "
        r"with ckpt_path=last\.$"
    )
    with pytest.raises(StorageError, match=message):
        trainer.fit(LongContextModule(make_llama(), OptimConfig()), loader(PACKS))
    names = sorted(path.name for path in (tmp_path / "c").iterdir())
    assert names == ["last.ckpt", "step-00000002.ckpt"]


@pytest.mark.parametrize("is_first", [True, False])
def test_a_checkpoint_that_cannot_be_renamed_stops_every_rank(tmp_path, monkeypatch, is_first):
    """The other ranks would wait for the first one until the time limit of their collectives."""
    sent = []

    def of_first(error):
        sent.append(error)
        return error if is_first else (errno.EROFS, "Read-only file system")

    def refuse(old, new):
        raise OSError(errno.EROFS, "Read-only file system")

    ranks = SimpleNamespace(is_first=is_first, of_first=of_first)
    monkeypatch.setattr(Topology, "of", lambda trainer: ranks)
    monkeypatch.setattr(os, "replace", refuse)
    checkpoint = StepCheckpoint(tmp_path)
    checkpoint._pending = tmp_path / "step-00000200.ckpt.tmp"
    with pytest.raises(StorageError, match=r"^the checkpoint of step 200 could not be written to"):
        checkpoint.complete(make_trainer(tmp_path))
    assert [error is not None for error in sent] == [is_first]
    checkpoint.complete(make_trainer(tmp_path))  # there is nothing left to complete


def test_a_file_system_without_links(tmp_path, make_llama, monkeypatch, caplog):
    def no_links(self, target):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(Path, "symlink_to", no_links)
    checkpoint = StepCheckpoint(tmp_path / "c", every_n_steps=2, keep=2)
    fit(tmp_path, make_llama, checkpoint)
    names = sorted(path.name for path in (tmp_path / "c").iterdir())
    assert names == ["step-00000006.ckpt", "step-00000007.ckpt"]
    assert checkpoint.last_path.name == "step-00000007.ckpt"
    assert find_checkpoint("last", [tmp_path / "c"], tmp_path).name == "step-00000007.ckpt"
    assert caplog.text.count("has no links") == 1


def test_a_checkpoint_gets_its_name_once_its_step_is_logged(tmp_path, make_llama):
    """A SIGKILL before a step is logged leaves its checkpoint under the temporary name."""
    seen = {}

    class Look(CSVLogger):
        def log_metrics(self, metrics, step=None):
            seen[step] = sorted(path.name for path in (tmp_path / "c").glob("step-*"))

    trainer = make_trainer(
        tmp_path,
        [StepCheckpoint(tmp_path / "c", every_n_steps=2)],
        enable_checkpointing=True,
        logger=Look(tmp_path),
    )
    trainer.fit(LongContextModule(make_llama(), OptimConfig()), loader(PACKS))
    assert seen[1] == ["step-00000002.ckpt.tmp"]
    assert seen[2] == ["step-00000002.ckpt"]
    assert seen[3] == ["step-00000002.ckpt", "step-00000004.ckpt.tmp"]


def test_later_checkpoints_go_when_a_run_went_back(tmp_path, make_llama):
    folder = tmp_path / "c"
    fit(tmp_path, make_llama, StepCheckpoint(folder, every_n_steps=2, keep=9))
    trainer = make_trainer(
        tmp_path,
        [StepCheckpoint(folder, every_n_steps=1, keep=9)],
        enable_checkpointing=True,
        max_steps=3,
        max_epochs=-1,
    )
    module = LongContextModule(make_llama(), OptimConfig())
    trainer.fit(module, loader(PACKS), ckpt_path=folder / "step-00000002.ckpt")
    assert sorted(path.name for path in folder.glob("step-*")) == [
        "step-00000002.ckpt",
        "step-00000003.ckpt",
    ]
    assert (folder / "last.ckpt").resolve().name == "step-00000003.ckpt"
