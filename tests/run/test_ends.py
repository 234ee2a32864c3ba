"""Tests runs that end at odd moments: after training, or before it because the disk is full."""

import os
import shutil
import signal

import pytest

from lctrain.train import train
from tests.run.test_life import SHORT, command
from tests.train.runs import config, rows

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
PLACES = {
    "tokenizer training": "lctrain.data.prepare.train_tokenizer",
    "packing": "lctrain.data.prepare.plan_rows",
    "export": "lctrain.export.export_model",
    "evaluation": "lctrain.closing.perplexity_by_length",
}
RESULTS = ("model/model.safetensors", "perplexity/perplexity_by_length.csv")
TRAINED = ("export", "evaluation")


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("finished") / "1"
    train(config(*tiny, "trainer.max_steps=2", output_dir=folder))
    return folder


@pytest.mark.parametrize("place", PLACES)
def test_a_signal_outside_of_training_ends_at_once(
    tiny, tmp_path, monkeypatch, capfd, finished, place
):
    """The same command then completes the run, with the same results."""
    folder = tmp_path / "1"
    arguments = [*tiny, "trainer.max_steps=2", f"data.cache_dir={tmp_path}/cache"]

    def signalled(*given, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the handler did not act")

    with monkeypatch.context() as patched:
        patched.setattr(PLACES[place], signalled)
        assert command(patched, *arguments, f"hydra.run.dir={folder}") == 143
    errors = capfd.readouterr().err
    last = ["ckpt_path=last"] if place in TRAINED else []
    expected = "goes on from" if last else "There is no checkpoint to go on from."
    assert "Stopped by SIGTERM outside of training." in errors
    assert expected in errors
    assert command(monkeypatch, *arguments, *last, f"hydra.run.dir={folder}") == 0
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


def test_a_disk_that_is_full_before_training_names_the_cache(tiny, tmp_path):
    """RLIMIT_FSIZE simulates the full disk, in a process of its own."""
    import resource
    import subprocess
    import sys

    from tests.train.runs import PYTHONPATH

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))

    (tmp_path / "long.txt").write_text("def return class " * 2000)
    overrides = [*tiny, *SHORT, f"data.files=[{tmp_path}/long.txt]"]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "lctrain.train", *overrides),
            *(f"data.cache_dir={tmp_path}/cache", f"hydra.run.dir={tmp_path}/run"),
        ],
        env=os.environ | {"PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        preexec_fn=limit,
    )
    assert done.returncode == 2, done.stderr
    place = f"a file of the data could not be written to {tmp_path}/cache: File too large"
    assert done.stderr.count(place) == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "Raise the limit on the size of a file (ulimit -f)" in done.stderr
