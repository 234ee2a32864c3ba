"""Tests that ranks of a launcher that differ from the trainer's are an error with a remedy."""

import pytest

from lctrain.run.launch import check_launch, launch_of
from lctrain.train import check_before_loading
from tests.train.runs import config


def torchrun(tasks, local):
    return {"TORCHELASTIC_RUN_ID": "a", "WORLD_SIZE": str(tasks), "LOCAL_WORLD_SIZE": str(local)}


def srun(tasks, machines, per_machine, **others):
    counts = {"SLURM_NTASKS": str(tasks), "SLURM_NNODES": str(machines)}
    return counts | {"SLURM_TASKS_PER_NODE": per_machine} | others


@pytest.mark.parametrize(
    ("devices", "machines", "environment"),
    [
        (8, 2, torchrun(16, 8)),
        (None, 2, torchrun(16, 8)),
        (8, 2, srun(16, 2, "8(x2)")),
        (1, 1, srun(1, 1, "1")),
        (8, 1, srun(1, 1, "1", SLURM_JOB_NAME="bash")),  # a shell in which Lightning starts ranks
        (8, 2, {"WORLD_SIZE": "3"}),
    ],
)
def test_ranks_that_fit(devices, machines, environment):
    check_launch(devices, machines, environment)


@pytest.mark.parametrize(
    ("devices", "machines", "environment", "message"),
    [
        (1, 1, torchrun(8, 8), r"got 1 and 8 by the .*devices=8, or start it with --nproc-per-n"),
        (8, 1, torchrun(16, 8), r"got 1 and 2 by the .*num_nodes=2, or start it with --nnodes=1"),
        (8, 2, srun(2, 2, "1(x2)"), r"got 8 and 1 by .*=1, or start it with --ntasks-per-node=8"),
        (8, 1, srun(16, 2, "8(x2)"), r"machines, got 1 and 2 .*num_nodes=2, or .* --nodes=1"),
        (8, 2, srun(12, 2, "8,4"), r"same number of ranks, got 12 on 2 .*--ntasks-per-node=8"),
        (8, 2, torchrun(12, 8), r"same number of ranks, got 12 on 1 .*--nproc-per-node=8"),
        (None, 1, torchrun(16, 8), r"trainer.num_nodes must be the number of machines, got 1 and"),
    ],
)
def test_ranks_that_do_not_fit(devices, machines, environment, message):
    with pytest.raises(ValueError, match=message):
        check_launch(devices, machines, environment)


def test_without_a_launcher():
    assert launch_of({}) is None


def test_the_command_compares_them_first(tmp_path, monkeypatch):
    for name, value in torchrun(8, 8).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"trainer.devices must be the ranks per machine, got 2"):
        check_before_loading(config("trainer.devices=2", output_dir=tmp_path / "run"))
