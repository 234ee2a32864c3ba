"""Tests signals to a run with several ranks, and to a SLURM job."""

import json
import os

import pytest

from lctrain.train import train
from tests.forked import run_forked
from tests.run.test_life import SHORT, at, command
from tests.train.runs import PYTHONPATH, assert_same_run, config, rows, train_losses

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")

LAUNCHERS = {
    "lightning": ["lctrain.train"],
    "torchrun": [
        *("torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
        *("-m", "lctrain.train"),
    ],
}
STOPS = (  # launcher, signal, its number, and which processes get it
    ("lightning", "SIGINT", 2, "group"),
    ("torchrun", "SIGTERM", 15, "launcher"),
    ("lightning", "SIGTERM", 15, "launcher"),
    ("torchrun", "SIGINT", 2, "group"),
)
JOB = {
    "SLURM_JOB_ID": "77",
    "SLURM_JOB_NAME": "train",
    "SLURM_NTASKS": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_JOB_NUM_NODES": "1",
}
FALSE_WARNING = "It is recommended to use `self.log("


def start(overrides, folder, launcher="lightning"):
    """Runs the command in a process group of its own, as a terminal does."""
    command = [*LAUNCHERS[launcher], *overrides, f"hydra.run.dir={folder}"]
    return run_forked(*command, env={"PYTHONPATH": PYTHONPATH}, check=False, ranks=2)


@pytest.fixture(scope="module")
def two_ranks(tiny):
    several_epochs = ["trainer.max_steps=9", "trainer.accumulate_grad_batches=2"]
    ranks = ["trainer.strategy=ddp", "trainer.devices=2"]
    return [*tiny, *SHORT, *several_epochs, *ranks, "attention.dropout=0.2"]


@pytest.fixture(scope="module")
def whole(two_ranks, tmp_path_factory):
    """The folder of an uninterrupted run on two ranks."""
    folder = tmp_path_factory.mktemp("whole") / "1"
    done = start(two_ranks, folder)
    assert done.returncode == 0, done.stderr
    assert FALSE_WARNING not in done.stderr
    assert done.stdout.count("\nRun ") == 1
    return folder


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_interrupted_ranks_resume_bit_equal(two_ranks, whole, tmp_path):
    """Each signal gives one message and one checkpoint, from which the other launcher resumes.

    Then SIGKILL ends both processes, two steps after a checkpoint.
    """
    folder = tmp_path / "1"
    last = []
    for step, (launcher, name, number, to) in enumerate(STOPS, start=1):
        signal_at = (
            f"{{_target_: tests.training.SignalAt, step: {step}, number: {number}, to: {to}}}"
        )
        done = start([*two_ranks, *last, f"+callbacks.signal={signal_at}"], folder, launcher)
        # torchrun has a status of its own, and a traceback of its own, for a signal to itself.
        assert done.returncode == (1 if launcher == "torchrun" else 128 + number), done.stderr
        assert done.stderr.count(f"{name}: ending this step and saving a checkpoint.") == 1
        assert done.stderr.count(f"Stopped by {name} at step {step}.") == 1
        assert "ending at once" not in done.stderr
        assert list(train_losses(folder)) == [str(earlier) for earlier in range(step)]
        last = ["ckpt_path=last"]
        saved = {path.name for path in (folder / "checkpoints").glob("step-*")}
        assert saved == {f"step-{kept:08d}.ckpt" for kept in (step - 1, step) if kept}
    kill = "+callbacks.kill={_target_: tests.training.KillAt, step: 6}"
    assert start([*two_ranks, *last, kill], folder).returncode != 0
    assert (folder / "checkpoints" / "last.ckpt").resolve().name == "step-00000004.ckpt"
    done = start([*two_ranks, *last], folder)
    assert done.returncode == 0, done.stderr
    assert_same_run(whole, folder)
    assert [row["step"] for row in rows(folder)] == [row["step"] for row in rows(whole)]
    assert len(train_losses(folder)) == 9
    assert 1.0 <= json.loads((whole / "report.json").read_text())["imbalance"] < 2.0


def test_slurm_queues_the_job_again_once(tiny, tmp_path, monkeypatch):
    """SIGUSR1 arrives before the job's time limit; the requeued job resumes in its folder."""
    overrides = [*tiny, *SHORT]
    whole = tmp_path / "whole"
    train(config(*overrides, output_dir=whole))
    calls = tmp_path / "calls"
    (tmp_path / "bin").mkdir()
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {calls}\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    for name, value in JOB.items():
        monkeypatch.setenv(name, value)
    arguments = [*overrides, f"paths.root={tmp_path}/runs"]
    assert command(monkeypatch, *arguments, at(3, 10)) == 128 + 10
    assert calls.read_text().splitlines() == ["requeue 77"]
    (folder,) = (tmp_path / "runs" / "default").iterdir()
    assert (folder / "checkpoints" / "step-00000003.ckpt").exists()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert command(monkeypatch, *arguments) == 0
    assert [*(tmp_path / "runs" / "default").iterdir()] == [folder]
    assert_same_run(whole, folder)
    # The closing validation is that of the trained weights, not of those before the requeue.
    assert rows(folder)[-1]["val/loss"] == rows(whole)[-1]["val/loss"]
    assert not [*folder.glob("hpc_ckpt*")]
    assert calls.read_text().splitlines() == ["requeue 77"]
