"""Tests run folders: each belongs to one run, is locked, and is reopened only to resume."""

import copy
import os
import signal
import subprocess
import sys
import time

import pytest

from lctrain.local_paths import check_run_name, local_path
from lctrain.run.folder import RunFolder, read_record, remove_orphans
from lctrain.run.lock import FolderInUseError
from lctrain.run.new_folder import begin_command, new_run_folder
from lctrain.run.rank import is_launched_by_lightning, is_rank_zero
from lctrain.run.resume import checkpoints_in

HOLD = """
import sys, os, time
from pathlib import Path
from lctrain.run.folder import RunFolder
folder = RunFolder.create(Path(sys.argv[1]), "train", {})
if len(sys.argv) > 2 and os.fork() == 0:  # as a worker process of a data loader
    time.sleep(60)
print(folder.id, flush=True)
time.sleep(600)
"""


def hold(folder, *arguments):
    """Starts a process that locks a folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), *arguments], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    return process


def test_one_run_has_the_folder_and_its_record_says_which(tmp_path):
    with RunFolder.create(tmp_path / "1", "train", {"seed": 3}) as folder:
        assert read_record(folder.path)["identity"] == {"seed": 3}
        assert read_record(folder.path)["process"] == os.getpid()
        with pytest.raises(FolderInUseError, match=r"a folder that no other run uses, got .*/1"):
            RunFolder.create(tmp_path / "1", "train", {})
        with pytest.raises(FolderInUseError, match=r"this process uses"):
            RunFolder.reopen(tmp_path / "1", "train", {})
    with pytest.raises(ValueError, match=r"without a run, got .*holds run.json. Move it"):
        RunFolder.create(tmp_path / "1", "train", {})
    with RunFolder.reopen(tmp_path / "1", "train", {}) as again:
        assert again.id == folder.id
        assert len(read_record(again.path)["resumed"]) == 1


@pytest.mark.parametrize("result", [None, "metrics.csv", "checkpoints/step-00000002.ckpt"])
def test_a_folder_without_a_checkpoint_is_free_after_a_failure(tmp_path, result):
    """The failed run's metrics are kept under another name."""

    def fail():
        with RunFolder.create(tmp_path, "train", {}):
            if result:
                (tmp_path / result).parent.mkdir(exist_ok=True)
                (tmp_path / result).write_text("")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    if result == "checkpoints/step-00000002.ckpt":
        with pytest.raises(ValueError, match="Go on with that run by ckpt_path=last"):
            RunFolder.create(tmp_path, "train", {})
        return
    assert len([*tmp_path.glob("metrics_*_failed.csv")]) == (result is not None)
    RunFolder.create(tmp_path, "train", {}).close()
    for kind in ("train", "eval"):
        with pytest.raises(ValueError, match=r"Move it, or choose another folder\.$"):
            RunFolder.create(tmp_path, kind, {})


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"id": "1", "resumed": {}}', "\ufffd"])
def test_a_damaged_record_is_replaced(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    (tmp_path / "config.yaml").write_bytes(b"\xff\0")
    assert read_record(tmp_path) is None
    with RunFolder.reopen(tmp_path, "train", {"seed": 1}) as folder:
        folder.save_options({"seed": 1})
    assert read_record(tmp_path)["identity"] == {"seed": 1}
    assert (tmp_path / "config.yaml").read_text() == "seed: 1\n"


@pytest.mark.parametrize("trace", ["metrics.csv", "checkpoints/step-00000002.ckpt"])
def test_traces_of_an_older_run_are_a_run(tmp_path, trace):
    (tmp_path / trace).parent.mkdir(exist_ok=True)
    (tmp_path / trace).write_text("")
    with pytest.raises(ValueError, match=rf"which holds {trace}"):
        RunFolder.create(tmp_path, "train", {})


def test_another_process_holds_it_until_it_is_killed(tmp_path):
    """The killed process leaves a forked worker, which does not hold the lock."""
    process = hold(tmp_path / "1", "fork")
    try:
        message = rf"which process {process.pid} on \S+ uses"
        for make in (RunFolder.create, RunFolder.reopen):
            with pytest.raises(FolderInUseError, match=message):
                make(tmp_path / "1", "train", {})
        with (
            RunFolder.create(tmp_path / "2", "train", {}) as other,
            pytest.raises(FolderInUseError),
        ):
            other.hold(tmp_path / "1")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    RunFolder.reopen(tmp_path / "1", "train", {}).close()


def test_of_three_at_once_one_gets_the_folder(tmp_path):
    script = HOLD.replace("time.sleep(600)", "sys.stdin.read()")
    started = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path / "1")],
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        for _ in range(3)
    ]
    while sum(process.poll() is not None for process in started) < 2:
        time.sleep(0.1)
    for process in started:
        process.communicate()  # whoever has the folder holds it until now
    assert sorted(process.returncode for process in started) == [0, 1, 1]


def test_orphans_of_dead_runs_are_deleted(tmp_path):
    for run in ("dead", "multirun/0", "alive"):
        checkpoints = tmp_path / run / "checkpoints"
        checkpoints.mkdir(parents=True)
        for name in ("step-00000004.ckpt.tmp", "step-00000004.ckpt", "mine.tmp"):
            (checkpoints / name).write_text("")
        shards = checkpoints / "step-00000006.ckpt.tmp.writing"  # ranks were killed while writing
        shards.mkdir()
        (shards / "__0_0.distcp").write_text("")
        assert checkpoints_in(checkpoints) == [checkpoints / "step-00000004.ckpt"]
    with RunFolder.reopen(tmp_path / "alive", "train", {}):
        remove_orphans(tmp_path)
    left = {str(p.parent.parent.relative_to(tmp_path)) for p in tmp_path.glob("**/*.ckpt.tmp")}
    assert left == {"alive"}
    assert [path.parts[-3] for path in tmp_path.glob("**/*.writing")] == ["alive"]
    assert len([*tmp_path.glob("**/step-00000004.ckpt")]) == 3
    assert len([*tmp_path.glob("**/mine.tmp")]) == 3


def test_options_of_every_start_are_kept(tmp_path):
    with RunFolder.create(tmp_path, "train", {}) as folder:
        folder.save_options({"seed": 1})
        folder.save_options({"seed": 1})
        folder.save_options({"seed": 2})
    assert (tmp_path / "config.yaml").read_text() == "seed: 2\n"
    assert (tmp_path / "config_0.yaml").read_text() == "seed: 1\n"
    assert not (tmp_path / "config_1.yaml").exists()


@pytest.mark.parametrize("name", ["a", "a/b", "dual-chunk_2", "v1.5", "Größe 3", "..a"])
def test_names_of_runs(name):
    assert check_run_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "../../x",
        "/tmp/x",
        "a/../b",
        "",
        ".",
        "..",
        "~/x",
        "a//b",
        "a/",
        "s3://b",
        "a\nb",
        "a\\b",
        " a",
    ],
)
def test_names_that_lead_elsewhere(name, tmp_path):
    with pytest.raises(ValueError, match=r"name must be a folder's name without .., got "):
        check_run_name(name)
    with pytest.raises(ValueError, match=r"name must be"):
        new_run_folder(str(tmp_path), name, "now")


@pytest.mark.parametrize("path", ["s3://bucket/x", "gs://b", "memory://x", "https://h/x", "s3:/b"])
def test_urls_are_refused(path):
    with pytest.raises(
        ValueError, match=r"paths.root must be a folder or file of this machine, got"
    ):
        local_path("paths.root", path)


def test_home_is_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local_path("paths.root", "~/runs") == str(tmp_path / "runs")
    with pytest.raises(ValueError, match=r"paths.root must be a path"):
        local_path("paths.root", " ")


def test_the_rank_is_read_from_a_copied_environment(monkeypatch):
    # `Dataset.map` with several processes assigns a copy to `os.environ`.
    monkeypatch.setattr(os, "environ", copy.deepcopy(os.environ))
    monkeypatch.setenv("RANK", "1")
    assert not is_rank_zero()
    monkeypatch.delenv("RANK")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert is_launched_by_lightning()


def test_two_commands_of_one_process_and_second_get_two_folders(tmp_path):
    first = new_run_folder(str(tmp_path), "a", "now")
    assert new_run_folder(str(tmp_path), "a", "now") == first
    begin_command()
    assert new_run_folder(str(tmp_path), "a", "now") != first


def test_other_ranks_get_no_folder_of_the_run(tmp_path, monkeypatch):
    assert new_run_folder(str(tmp_path), "a", "now").startswith(str(tmp_path / "a" / "now_"))
    monkeypatch.setenv("RANK", "1")
    assert not new_run_folder(str(tmp_path / "root"), "a", "now").startswith(str(tmp_path / "root"))
    with RunFolder.create(tmp_path / "1", "train", {}):
        assert not (tmp_path / "1").exists()
