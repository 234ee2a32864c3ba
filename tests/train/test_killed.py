"""Tests runs that a signal ends and that are then resumed."""

import signal

import pytest

from lctrain.train import train
from tests.train.runs import assert_same_run, config, run_command, train_losses

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


KILLED = [
    "trainer.max_steps=14",  # several epochs
    "trainer.accumulate_grad_batches=2",
    "data.num_workers=2",
    "attention.dropout=0.2",
    "evaluation.enabled=false",
    "export=false",
]


def test_killed_run_resumes_bit_equal(tiny, tmp_path):
    """SIGKILL arrives inside an epoch, two steps after a checkpoint; the folder is kept."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(config(*tiny, *KILLED, output_dir=whole))
    kill = "+callbacks.kill={_target_: tests.training.KillAt, step: 10}"
    result = run_command([*tiny, *KILLED, kill], killed, check=False)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert (killed / "checkpoints" / "last.ckpt").resolve().name == "step-00000008.ckpt"
    assert len(train_losses(killed)) >= 9
    train(config(*tiny, *KILLED, "ckpt_path=last", output_dir=killed))
    assert_same_run(whole, killed)
    assert len(train_losses(killed)) == 14


def test_sigterm_is_no_success(tiny, tmp_path):
    """Schedulers stop jobs by SIGTERM; exit status and message must say so."""
    stop = f"+callbacks.stop={{_target_: tests.training.KillAt, step: 5, number: {signal.SIGTERM}}}"
    result = run_command([*tiny, stop], tmp_path / "stopped", check=False)
    assert result.returncode == 128 + signal.SIGTERM, result.stderr
    assert "Stopped by SIGTERM at step 5" in result.stderr
    assert "ckpt_path=last" in result.stderr
    assert (tmp_path / "stopped" / "checkpoints" / "last.ckpt").exists()
