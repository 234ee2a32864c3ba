"""Tests resuming: a killed run gives the losses of an uninterrupted run, bit by bit."""

import json
import signal
from pathlib import Path

import pytest

from lctrain.data import SourceMix
from tests.data.train_recorded import Recorder, finished_batches, main, make_trainer, recorded
from tests.forked import run_forked

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]


class DiedError(Exception):
    """An error that stands for the death of the process."""


class MortalRecorder(Recorder):
    def die(self) -> None:
        raise DiedError


@pytest.fixture
def run(make_data, tmp_path):
    """Returns run(name, ...), which trains and returns the lines that the script recorded."""

    def train_toy(name, data=None, dies_at=None, resume=None, reads_estimate=True, **trainer):
        record = tmp_path / f"{name}-{resume}.txt"
        model = MortalRecorder(record, reads_estimate, dies_at)
        data = make_data(**(data or {}))
        try:
            trainer = make_trainer(tmp_path / name, **trainer)
            trainer.fit(model, data, ckpt_path=tmp_path / resume / "last.ckpt" if resume else None)
        except DiedError:
            assert dies_at is not None
        return record.read_text().splitlines()

    return train_toy


def check_resume(run, tmp_path, dies_at, data=None, **settings):
    """Compares a whole run with one that is killed and resumes from its last checkpoint."""
    whole = run("whole", data=data, **settings)
    dead = run("dead", data=data, dies_at=dies_at, **settings)
    assert dead == whole[: dies_at + 1]
    start = finished_batches(tmp_path / "dead" / "last.ckpt")
    assert 0 < start <= dies_at
    assert run("resumed", data=data, resume="dead", **settings) == whole[start:]
    return whole


@pytest.mark.parametrize(
    ("dies_at", "num_workers", "reads_estimate"),
    [(7, 0, True), (30, 2, True), (30, 0, False)],
    ids=["first-epoch", "second-epoch-workers", "second-epoch-plain"],
)
def test_resume_is_bit_equal(run, tmp_path, dies_at, num_workers, reads_estimate):
    data = {"num_workers": num_workers}
    whole = check_resume(run, tmp_path, dies_at, data=data, reads_estimate=reads_estimate)
    assert len({line.split()[1] for line in whole}) == 3


def test_resume_with_passkeys_in_short_documents(run, tmp_path):
    data = {"max_tokens": 512, "max_document_tokens": 200, "passkey_fraction": 0.4}
    check_resume(run, tmp_path, dies_at=30, data=data | {"num_workers": 1})


def test_resume_with_a_mix_of_sources(run, tmp_path, corpus):
    mix = SourceMix(
        sources=[
            {
                "kind": "text",
                "name": "a",
                "files": f"{corpus}/[0-2]*.txt",
                "weight": 2,
                "epochs": 2,
            },
            {"kind": "text", "name": "b", "files": f"{corpus}/[3-5]*.txt", "weight": 1},
        ]
    )
    check_resume(run, tmp_path, dies_at=30, data={"source": mix, "num_workers": 1})


@pytest.mark.parametrize(
    ("accumulate", "max_steps"), [(2, -1), (5, 12)], ids=["two-until-epochs", "five-until-steps"]
)
def test_resume_with_accumulation(run, tmp_path, accumulate, max_steps):
    check_resume(
        run,
        tmp_path,
        dies_at=4 * accumulate + 1,
        accumulate_grad_batches=accumulate,
        checkpoint_every=2,
        max_steps=max_steps,
    )


def test_resume_with_validation_in_mid_epoch(run, tmp_path):
    check_resume(run, tmp_path, dies_at=13, val_check_interval=5)


@pytest.mark.parametrize("every", ["epoch", "last-batch"])
def test_resume_from_the_end_of_an_epoch(run, tmp_path, make_data, every):
    data = make_data()
    data.setup()
    steps = data.packing_report.rows
    checkpoint_every = "epoch" if every == "epoch" else steps
    check_resume(run, tmp_path, dies_at=steps + 3, checkpoint_every=checkpoint_every)
    assert finished_batches(tmp_path / "dead" / "last.ckpt") == steps


def test_resume_with_limited_epochs_sees_every_row_before_any_repeats(run, tmp_path):
    whole = check_resume(run, tmp_path, dies_at=12, limit_train_batches=7)
    documents = [line.split()[2] for line in whole]
    assert len(documents) == len(set(documents)) == 21


def test_resume_twice(run, tmp_path):
    whole = run("whole")
    run("dead", dies_at=9)
    again = run("again", resume="dead", dies_at=30)
    assert again == whole[8:31]
    start = finished_batches(tmp_path / "again" / "last.ckpt")
    assert run("end", resume="again") == whole[start:]


def test_overfitting_repeats_the_same_batches(run):
    lines = run("overfit", overfit_batches=3)
    documents = [line.split()[2] for line in lines]
    assert documents == documents[:3] * 3


class Peek(Recorder):
    """A callback that reads training batches in hooks, as a check at the start of a run does."""

    def on_train_start(self) -> None:
        loader = self.trainer.train_dataloader
        iterator = iter(loader)
        assert next(iterator).names != next(iterator).names

    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx == 2:
            next(iter(self.trainer.train_dataloader))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_looking_at_batches_uses_none_up(run, make_data, tmp_path, num_workers):
    whole = run("whole")
    peek = Peek(tmp_path / "peek.txt")
    make_trainer(tmp_path / "peek").fit(peek, make_data(num_workers=num_workers))
    assert peek.record.read_text().splitlines() == whole


def test_resume_with_other_packing_is_an_error(run):
    run("dead", dies_at=7)
    with pytest.raises(ValueError, match="max_tokens was 256, is 128"):
        run("other", resume="dead", data={"max_tokens": 128})


def test_a_model_may_be_validated_on_other_data(run, make_data, tmp_path):
    run("dead", dies_at=7)
    trainer = make_trainer(tmp_path / "other")
    other = make_data(max_tokens=128)
    trainer.validate(
        Recorder(tmp_path / "x"), other, ckpt_path=tmp_path / "dead/last.ckpt", verbose=False
    )
    assert other.state_dict()["settings"]["max_tokens"] == 128


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_batches_pass_through_every_precision(make_data, tmp_path, precision):
    trainer = make_trainer(tmp_path, precision=precision, fast_dev_run=2)
    trainer.fit(Recorder(tmp_path / "record.txt"), make_data())
    assert trainer.global_step == 2


def check_killed(folder: Path, start: int, dead: dict[str, list[str]], ranks: int) -> None:
    """Checks the lines of a run that was killed at batch 13 and has resumed."""
    assert start == 8  # four optimizer steps of two batches
    both, whole = recorded(folder / "dead"), recorded(folder / "whole")
    assert len(whole) == ranks
    for rank, lines in whole.items():
        assert dead[rank] == lines[:14]
        assert both[rank] == dead[rank] + lines[start:]
    epochs = [line.split()[1:3] for lines in whole.values() for line in lines]
    first = [documents for epoch, documents in epochs if epoch == "0"]
    assert len(first) == len(set(first))  # ranks share the rows of an epoch


@pytest.mark.slow
def test_a_killed_process_resumes_bit_equal(corpus, tmp_path):
    (tmp_path / "whole").mkdir()
    (tmp_path / "dead").mkdir()
    flags = ("--corpus", str(corpus), "--workers", "2")
    dead = ("--folder", str(tmp_path / "dead"))
    main((*flags, "--folder", str(tmp_path / "whole")))
    done = run_forked("tests.data.train_recorded", *flags, *dead, "--dies-at", "13", check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    start = finished_batches(tmp_path / "dead" / "checkpoints" / "last.ckpt")
    lines = recorded(tmp_path / "dead")
    main((*flags, *dead, "--resume"))
    check_killed(tmp_path, start, lines, ranks=1)


@pytest.mark.slow
def test_killed_ranks_resume_bit_equal(corpus, tmp_path):
    run_forked("tests.data.killed_ranks", str(corpus), str(tmp_path), env={"NODE_RANK": "0"})
    check_killed(tmp_path, **json.loads((tmp_path / "found.json").read_text()), ranks=2)
