"""Tests signals to a run with several ranks, and to a SLURM job."""

import os
import subprocess
import sys

import pytest

from tests.run.test_life import SHORT, at
from tests.train.runs import PYTHONPATH, assert_same_run, rows, train_losses

LAUNCHERS = {
    "lightning": [],
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
}
FALSE_WARNING = "It is recommended to use `self.log("


def start(overrides, folder=None, launcher="lightning", **variables):
    """Starts the command in a process group of its own, as a terminal does."""
    named = [] if folder is None else [f"hydra.run.dir={folder}"]
    return subprocess.run(
        [sys.executable, *LAUNCHERS[launcher], "-m", "lctrain.train", *overrides, *named],
        env=os.environ | {"PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"} | variables,
        capture_output=True,
        text=True,
        start_new_session=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def two_ranks(tiny):
    return [*tiny, *SHORT, "trainer.strategy=ddp", "trainer.devices=2"]


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
@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize(
    ("name", "number", "to"), [("SIGINT", 2, "group"), ("SIGTERM", 15, "launcher")]
)
def test_a_signal_stops_all_ranks_once(request, two_ranks, tmp_path, launcher, name, number, to):
    """The run gives one message and one checkpoint; from either launcher's, it resumes exactly."""
    folder = tmp_path / "1"
    signal_at = f"{{_target_: tests.training.SignalAt, step: 3, number: {number}, to: {to}}}"
    done = start([*two_ranks, f"+callbacks.signal={signal_at}"], folder, launcher)
    # torchrun has a status of its own, and a traceback of its own, for a signal to itself.
    assert done.returncode == (1 if launcher == "torchrun" else 128 + number), done.stderr
    assert done.stderr.count(f"{name}: ending this step and saving a checkpoint.") == 1
    assert done.stderr.count(f"Stopped by {name} at step 3.") == 1
    assert "ending at once" not in done.stderr
    assert list(train_losses(folder)) == ["0", "1", "2"]
    assert [path.name for path in (folder / "checkpoints").glob("step-*")] == ["step-00000003.ckpt"]
    if name == "SIGINT":
        return  # resuming depends on the checkpoint, which SIGTERM leaves as well
    done = start([*two_ranks, "ckpt_path=last"], folder, launcher)
    assert done.returncode == 0, done.stderr
    whole = request.getfixturevalue("whole")
    assert_same_run(whole, folder)
    assert [row["step"] for row in rows(folder)] == [row["step"] for row in rows(whole)]


@pytest.mark.slow
def test_slurm_queues_the_job_again_once(tiny, tmp_path):
    """SIGUSR1 arrives before the job's time limit; the requeued job resumes in its folder."""
    calls = tmp_path / "calls"
    (tmp_path / "bin").mkdir()
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {calls}\n')
    scontrol.chmod(0o755)
    job = {
        "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NAME": "train",
        "SLURM_NTASKS": "1",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "0",
        "SLURM_JOB_NUM_NODES": "1",
    }
    overrides = [*tiny, *SHORT]
    whole = start(overrides, tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    command = [*overrides, f"paths.root={tmp_path}/runs"]
    first = start([*command, at(3, 10)], **job)
    assert first.returncode == 128 + 10, first.stderr
    assert calls.read_text().splitlines() == ["requeue 77"]
    (folder,) = (tmp_path / "runs" / "default").iterdir()
    assert (folder / "checkpoints" / "step-00000003.ckpt").exists()
    again = start(command, **job, SLURM_RESTART_COUNT="1")
    assert again.returncode == 0, again.stderr
    assert [*(tmp_path / "runs" / "default").iterdir()] == [folder]
    assert_same_run(tmp_path / "whole", folder)
    # The closing validation is that of the trained weights, not of those before the requeue.
    assert rows(folder)[-1]["val/loss"] == rows(tmp_path / "whole")[-1]["val/loss"]
    assert not [*folder.glob("hpc_ckpt*")]
    assert calls.read_text().splitlines() == ["requeue 77"]
