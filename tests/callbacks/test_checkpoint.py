"""StepCheckpoint, its atomic files, and where `ckpt_path` is looked for."""

import os

import pytest
import torch

from lctrain.callbacks import AtomicCheckpointIO, StepCheckpoint
from lctrain.callbacks.checkpoint import check_writable, find_checkpoint
from lctrain.config import OptimConfig
from lctrain.module import LongContextModule
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
    """So that a longer run can go on with the rest of the epoch."""
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
    """A file where the folder should be: not writable for any user, root included."""
    (tmp_path / "file").write_text("")
    module = LongContextModule(make_llama(), OptimConfig())
    trainer = make_trainer(
        tmp_path, [StepCheckpoint(tmp_path / "file" / "c")], enable_checkpointing=True
    )
    with pytest.raises(ValueError, match="checkpoint directory must be writable"):
        trainer.fit(module, loader(PACKS))
    assert trainer.global_step == 0


def test_check_writable_leaves_nothing(tmp_path):
    check_writable(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


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


def test_next_start_deletes_what_a_killed_write_left(tmp_path, make_llama):
    """As after a SIGKILL: no handler runs, the temporary file stays."""
    folder = tmp_path / "c"
    fit(tmp_path, make_llama, StepCheckpoint(folder, every_n_steps=2), max_steps=2, max_epochs=-1)
    (folder / "step-00000004.ckpt.tmp").write_bytes(b"half a checkpoint")
    (folder / "mine.tmp").write_text("")
    fit(tmp_path, make_llama, StepCheckpoint(folder, every_n_steps=2), max_steps=2, max_epochs=-1)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["last.ckpt", "mine.tmp", "step-00000002.ckpt"]


def test_find_checkpoint(tmp_path):
    runs = tmp_path / "runs"
    own = StepCheckpoint(runs / "3" / "checkpoints")
    assert find_checkpoint(None, [own], runs) is None
    with pytest.raises(ValueError, match="ckpt_path=last needs an earlier checkpoint"):
        find_checkpoint("last", [own], runs)
    with pytest.raises(
        ValueError, match=r"must be a checkpoint file or last, got '/no/where.ckpt'"
    ):
        find_checkpoint("/no/where.ckpt", [own], runs)
    for number, run in enumerate(("1", "2")):
        folder = runs / run / "checkpoints"
        folder.mkdir(parents=True)
        (folder / "step-00000004.ckpt").write_text("")
        (folder / "last.ckpt").symlink_to("step-00000004.ckpt")
        os.utime(folder / "step-00000004.ckpt", (number, number))
    newest = runs / "2" / "checkpoints" / "step-00000004.ckpt"
    assert find_checkpoint("last", [own], runs) == newest
    assert find_checkpoint(str(newest), [own], runs) == newest
    own.directory.mkdir(parents=True)
    own.last_path.write_text("")
    assert find_checkpoint("last", [own], runs) == own.last_path
