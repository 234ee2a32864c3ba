"""Tests runs that end at odd moments: after training, or before it because the disk is full."""

import os
import resource
import shutil
import signal
import sys

import pytest

from lctrain.train import train
from tests.run.test_life import SHORT, command
from tests.train.runs import config, rows

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
PLACES = {  # in the order of a run
    "tokenizer training": "lctrain.data.prepare.train_tokenizer",
    "packing": "lctrain.data.prepare.plan_rows",
    "export": "lctrain.export.export_model",
    "evaluation": "lctrain.closing.perplexity_by_length",
}
RESULTS = ("model/model.safetensors", "perplexity/perplexity_by_length.csv")


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("finished") / "1"
    train(config(*tiny, "trainer.max_steps=2", output_dir=folder))
    return folder


def test_signals_outside_of_training_end_at_once(tiny, tmp_path, monkeypatch, capfd, finished):
    """Each start goes on where the signal ended the one before, and ends with the same results."""
    folder = tmp_path / "1"
    arguments = [*tiny, "trainer.max_steps=2", f"data.cache_dir={tmp_path}/cache"]
    arguments.append(f"hydra.run.dir={folder}")

    def signalled(*given, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the handler did not act")

    for place, function in PLACES.items():
        with monkeypatch.context() as patched:
            patched.setattr(function, signalled)
            last = ["ckpt_path=last"] if place == "evaluation" else []
            assert command(patched, *arguments, *last) == 143, place
        errors = capfd.readouterr().err
        assert "Stopped by SIGTERM outside of training." in errors, place
        trained = place in ("export", "evaluation")
        expected = "goes on from" if trained else "There is no checkpoint to go on from."
        assert expected in errors, place
        assert (folder / "model").exists() == (place == "evaluation")
    assert command(monkeypatch, *arguments, "ckpt_path=last") == 0
    assert rows(folder)[-1]["val/loss"] == rows(finished)[-1]["val/loss"]
    for file in RESULTS:
        assert (folder / file).read_bytes() == (finished / file).read_bytes()


def test_a_half_written_export_is_written_again(tiny, tmp_path, monkeypatch, finished):
    """Leaves the files that a kill in the middle of the export leaves."""
    folder = tmp_path / "1"
    shutil.copytree(finished, folder, symlinks=True)
    shutil.rmtree(folder / "perplexity")
    (folder / "model" / "config.json").unlink()
    weights = folder / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    train(config(*tiny, "trainer.max_steps=2", "ckpt_path=last", output_dir=folder))
    for file in (
        "model/model.safetensors",
        "model/config.json",
        "perplexity/perplexity_by_length.csv",
    ):
        assert (folder / file).read_bytes() == (finished / file).read_bytes()


def test_a_disk_that_is_full_before_training_names_the_cache(tiny, tmp_path, monkeypatch, capsys):
    """A limit on the size of files simulates the full disk."""
    (tmp_path / "long.txt").write_text("def return class " * 2000)
    overrides = [*tiny, *SHORT, f"data.files=[{tmp_path}/long.txt]"]
    folders = [f"data.cache_dir={tmp_path}/cache", f"hydra.run.dir={tmp_path}/run"]
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # or the limit cuts off a .pyc file
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limit[1]))
    try:
        status = command(monkeypatch, *overrides, *folders)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    errors = capsys.readouterr().err
    assert status == 2, errors
    place = f"a file of the data could not be written to {tmp_path}/cache: File too large"
    assert errors.count(place) == 1, errors
    assert "Traceback" not in errors
    assert "Raise the limit on the size of a file (ulimit -f)" in errors
