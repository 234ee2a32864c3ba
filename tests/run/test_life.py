"""Tests a run from the outside: signals, resuming in its folder, and one file of metrics."""

import json
import os
import signal
import sys

import pytest
import torch

from lctrain.train import main, train
from tests.train.runs import assert_same_run, config, rows, run_command, train_losses

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")

SHORT = ["evaluation.enabled=false", "export=false", "trainer.limit_val_batches=1"]


def at(step, number):
    """Makes the run send a signal to itself at the end of a step."""
    return f"+callbacks.stop={{_target_: tests.training.KillAt, step: {step}, number: {number}}}"


def command(monkeypatch, *arguments):
    """Runs lctrain-train in this process, and returns the exit status."""
    monkeypatch.setattr(sys, "argv", ["lctrain-train", *arguments])
    try:
        main()
    except SystemExit as end:
        return end.code
    return 0


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """The folder of an uninterrupted run of six steps."""
    folder = tmp_path_factory.mktemp("whole") / "1"
    train(config(*tiny, *SHORT, "trainer.validate_every_n_steps=2", output_dir=folder))
    return folder


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_ends_the_step_saves_and_the_run_goes_on(tiny, tmp_path, whole, number, capfd):
    """The run resumes in its folder with the same bits; metrics and validations have no gap."""
    folder = tmp_path / "1"
    overrides = [*tiny, *SHORT, "trainer.validate_every_n_steps=2"]
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as end:
        train(config(*overrides, at(3, int(number)), output_dir=folder))
    assert end.value.code == 128 + number
    assert signal.getsignal(number) == before
    name = signal.Signals(number).name
    errors = capfd.readouterr().err
    assert f"{name}: ending this step and saving a checkpoint. Once more" in errors
    assert f"Stopped by {name} at step 3. The same command with ckpt_path=last goes on" in errors
    assert [path.name for path in (folder / "checkpoints").glob("step-*")] == ["step-00000003.ckpt"]
    assert list(train_losses(folder)) == ["0", "1", "2"]
    train(config(*overrides, "ckpt_path=last", output_dir=folder))
    assert_same_run(whole, folder)
    assert [row["step"] for row in rows(folder)] == [row["step"] for row in rows(whole)]
    assert [row["val/loss"] for row in rows(folder)] == [row["val/loss"] for row in rows(whole)]


def test_a_signal_in_the_last_step(tiny, tmp_path, whole):
    """Training is complete, so resuming adds only the last validation and keeps every row."""
    folder = tmp_path / "1"
    overrides = [*tiny, *SHORT, "trainer.validate_every_n_steps=2"]
    with pytest.raises(SystemExit):
        train(config(*overrides, at(6, int(signal.SIGTERM)), output_dir=folder))
    assert (folder / "checkpoints" / "step-00000006.ckpt").is_file()
    train(config(*overrides, "ckpt_path=last", output_dir=folder))
    assert_same_run(whole, folder)
    for column in ("step", "epoch", "val/loss"):
        assert [row[column] for row in rows(folder)] == [row[column] for row in rows(whole)]


def test_a_signal_before_training_ends_at_once(tiny, tmp_path, monkeypatch, capfd):
    def signalled(self):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the handler did not act")

    monkeypatch.setattr("lctrain.data.prepare.Preparation.run", signalled)
    with pytest.raises(SystemExit) as end:
        train(config(*tiny, output_dir=tmp_path / "1"))
    assert end.value.code == 143
    assert (
        "Stopped by SIGTERM outside of training. There is no checkpoint" in capfd.readouterr().err
    )


def test_a_second_signal_ends_at_once(tiny, tmp_path):
    """The second signal arrives in the same step, so no checkpoint is saved."""
    twice = [at(3, 2), at(3, 15).replace("callbacks.stop", "callbacks.again")]
    result = run_command([*tiny, *SHORT, *twice], tmp_path / "1", check=False)
    assert result.returncode == 143, result.stderr
    assert "SIGTERM again: ending at once." in result.stderr
    assert not [*(tmp_path / "1" / "checkpoints").glob("step-*")]


def test_last_goes_on_in_the_folder(tiny, tmp_path, monkeypatch, whole):
    """Resuming makes no new folder, keeps at most `keep` checkpoints, and extends metrics.csv."""
    arguments = [*tiny, *SHORT, f"paths.root={tmp_path}", "trainer.validate_every_n_steps=2"]
    assert command(monkeypatch, *arguments, at(5, 15)) == 143
    assert command(monkeypatch, *arguments, "ckpt_path=last") == 0
    folders = [*(tmp_path / "default").iterdir()]
    assert len(folders) == 1
    assert_same_run(whole, folders[0])
    assert len([*folders[0].glob("checkpoints/step-*")]) == 2
    record = json.loads((folders[0] / "run.json").read_text())
    assert len(record["resumed"]) == 1
    assert command(monkeypatch, *arguments, "ckpt_path=last", "trainer.max_steps=7") == 0
    assert list(train_losses(folders[0])) == [*"0123456"]
    assert len([*(tmp_path / "default").iterdir()]) == 1
    log = (folders[0] / "train.log").read_text()
    assert log.count(f"Run {record['id']} in {folders[0]}") == 3
    assert (folders[0] / "report.txt").read_text().rstrip() in log
    assert json.loads((folders[0] / "report.json").read_text())["steps"] == 7
    assert "max_steps: 7" in (folders[0] / "hparams.yaml").read_text()


def test_a_resumed_run_names_its_folder_and_says_that_nothing_is_left(
    tiny, tmp_path, monkeypatch, capfd
):
    """It says both before the data are prepared."""
    arguments = [*tiny, *SHORT, f"paths.root={tmp_path}"]
    assert command(monkeypatch, *arguments, "trainer.max_steps=2") == 0
    (folder,) = (tmp_path / "default").iterdir()
    printed = capfd.readouterr()
    assert f"The run writes to {folder}\n" in printed.out + printed.err

    def prepare(self):
        raise ValueError("no data")

    monkeypatch.setattr("lctrain.data.prepare.Preparation.run", prepare)
    assert command(monkeypatch, *arguments, "trainer.max_steps=2", "ckpt_path=last") == 1
    printed = capfd.readouterr()
    text = printed.out + printed.err
    assert f"The run goes on in {folder}\n" in text
    assert "The run writes to" not in text
    assert "step-00000002.ckpt has taken the 2 steps of trainer.max_steps." in text
    assert command(monkeypatch, *arguments, "trainer.max_steps=1", "ckpt_path=last") == 2
    assert "trainer.max_steps must be at least 2, the steps that" in capfd.readouterr().err
    assert [*(tmp_path / "default").iterdir()] == [folder]


def test_another_experiment_s_checkpoint_is_not_taken(tiny, tmp_path, monkeypatch, capfd):
    arguments = [*tiny, *SHORT, f"paths.root={tmp_path}", "trainer.max_steps=1"]
    assert command(monkeypatch, *arguments) == 0
    other = ["attention=dual_chunk", "ckpt_path=last"]
    assert command(monkeypatch, *arguments, *other) == 2
    message = "differs: attention.name was 'flash', is 'dual_chunk'"
    assert message in capfd.readouterr().err
    assert len([*(tmp_path / "default").iterdir()]) == 1
    checkpoint = next((tmp_path / "default").glob("*/checkpoints/step-*.ckpt"))
    assert command(monkeypatch, *arguments, other[0], f"ckpt_path={checkpoint}") == 2


def test_a_path_goes_on_in_its_run_s_folder_unless_one_is_named(tiny, tmp_path, monkeypatch):
    arguments = [*tiny, *SHORT, f"paths.root={tmp_path}"]
    assert command(monkeypatch, *arguments, "trainer.max_steps=4") == 0
    folder = next((tmp_path / "default").iterdir())
    checkpoint = folder / "checkpoints" / "step-00000004.ckpt"
    longer = [*arguments, f"ckpt_path={checkpoint}", "trainer.max_steps=5"]
    other = tmp_path / "branch"
    assert command(monkeypatch, *longer, f"hydra.run.dir={other}") == 0
    assert list(train_losses(other)) == [*"01234"]
    assert list(train_losses(folder)) == [*"0123"]
    assert command(monkeypatch, *longer) == 0
    assert list(train_losses(folder)) == [*"01234"]
    assert len([*(tmp_path / "default").iterdir()]) == 1


def test_a_finished_folder_is_not_written_again(tiny, tmp_path, monkeypatch, capfd):
    arguments = [*tiny, *SHORT, "trainer.max_steps=1", f"hydra.run.dir={tmp_path / '1'}"]
    assert command(monkeypatch, *arguments) == 0
    written = (tmp_path / "1" / "metrics.csv").read_bytes()
    assert command(monkeypatch, *arguments, "seed=3") == 2
    assert "which holds run.json. Go on with that run by ckpt_path=last" in capfd.readouterr().err
    assert (tmp_path / "1" / "metrics.csv").read_bytes() == written


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("name=../../x", "name must be a folder's name without .., got '../../x'"),
        ("name=/tmp/x", "name must be a folder's name"),
        ("paths.root=s3://bucket/x", "paths.root must be a folder or file of this machine"),
        ("paths.output_dir=memory://x", "must be a folder or file of this machine, got"),
        ("ckpt_path=s3://bucket/last.ckpt", "ckpt_path must be a folder or file of this machine"),
        ("callbacks.checkpoint.directory=gs://b/c", "callbacks.checkpoint.directory must be"),
        ("logger.csv.save_dir=s3://b/c", "logger.csv.save_dir must be a folder or file"),
        ("data.cache_dir=s3://b/c", "data.cache_dir must be a folder or file"),
    ],
)
def test_folders_elsewhere_are_refused(tiny, tmp_path, monkeypatch, capfd, override, message):
    monkeypatch.chdir(tmp_path)
    assert command(monkeypatch, *tiny, override) == 2
    assert message in capfd.readouterr().err
    assert {path.name for path in tmp_path.rglob("*")} <= {"outputs", "default"}
    assert not (tmp_path.parent / "x").exists()


def test_evil_checkpoint(tiny, tmp_path, monkeypatch, capfd):
    """Loading a checkpoint in training must never run its code."""
    trace = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {trace}",)

    torch.save({"state_dict": {}, "x": Evil()}, tmp_path / "evil.ckpt")
    assert command(monkeypatch, *tiny, f"ckpt_path={tmp_path}/evil.ckpt") == 2
    assert "tensors and plain values only" in capfd.readouterr().err
    assert not trace.exists()


def test_an_evaluation_has_its_folder_alone(tiny, tmp_path, monkeypatch, capfd, whole):
    from lctrain.evaluate import main as evaluate

    train(config(*tiny, "trainer.max_steps=1", *SHORT[:1], output_dir=tmp_path / "run"))
    arguments = [word for word in tiny if word.startswith("data") and "=text" not in word]
    arguments = [f"model={tmp_path}/run/model", "data=text", *arguments, "lengths=[16]"]
    arguments = [word for word in arguments if "max_tokens" not in word and "vocab" not in word]

    def status(*more):
        monkeypatch.setattr(sys, "argv", ["lctrain-eval", *arguments, "documents=2", *more])
        try:
            evaluate()
        except SystemExit as end:
            return end.code
        return 0

    for name in ("one", "two"):
        assert status(f"paths.root={tmp_path}/evals", f"name={name}") == 0
    folders = [*(tmp_path / "evals").glob("*/*")]
    assert len(folders) == 2
    assert all((folder / "run.json").exists() for folder in folders)
    capfd.readouterr()
    for folder, what in ((whole, "a run"), (folders[0], "an evaluation")):
        assert status(f"hydra.run.dir={folder}") == 2
        assert f"must be a folder without {what}" in capfd.readouterr().err
    assert status("name=../x") == 2
