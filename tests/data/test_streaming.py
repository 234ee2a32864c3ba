"""Tests streaming: bounded disk use, and the same batches after a resume and on every rank."""

import json
import random
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
from lightning.pytorch.trainer.states import TrainerFn

from lctrain.data import HubSource, PackedDataModule
from lctrain.train import train
from tests.train.runs import assert_same_run, config, train_losses

WORDS = ("def", "return", "class", "self", "None", "for", "in", "while", "yield", "lambda")
WINDOW = 10_000  # bytes
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


class Stream:
    """Replaces `load_dataset(..., streaming=True)`: it generates records and counts their bytes."""

    def __init__(self, records=None):
        self.records, self.bytes, self.first = records, 0, 0
        self.changed_from = None  # the record from which on the texts are others, of equal length

    def __call__(self, **where):
        assert where["streaming"] is True
        self.first = 0
        return self

    def skip(self, count):
        self.first = count
        return self

    def __iter__(self):
        number = self.first
        while self.records is None or number < self.records:
            numbers = random.Random(number)
            text = f"{number} " + " ".join(numbers.choices(WORDS, k=numbers.randrange(50, 400)))
            if self.changed_from is not None and number >= self.changed_from:
                text = text.replace("return", "retour")
            self.bytes += len(text)
            yield {"text": text}
            number += 1


@pytest.fixture
def stream(monkeypatch):
    """Returns stream(records=None), which installs a Stream of `records` records; None: endless."""

    def install(records=None):
        made = Stream(records)
        monkeypatch.setattr("datasets.load_dataset", made)
        return made

    return install


def module(folder, rank=0, world_size=1, **settings):
    data = PackedDataModule(
        HubSource(dataset="some/stream", streaming=True, window_bytes=WINDOW),
        max_tokens=128,
        vocab_size=300,
        held_out_fraction=0.2,
        cache_dir=folder,
        **settings,
    )
    data.setup()
    trainer = type("Ranks", (), {"world_size": world_size, "global_rank": rank, "state": None})
    trainer.state = type("State", (), {"fn": None})
    data.trainer = trainer
    return data


def batches(data, first, count):
    """Returns the token ids and the dropout keys of some batches."""
    data._cursor.batches = first
    found = []
    for batch in data.train_dataloader():
        found.append((batch.input_ids.tolist(), batch.document_ids.tolist()))
        if len(found) == count:
            return found


def size_of(folder):
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


class SizeAfterOneStep(pl.Callback):
    """Measures a folder in bytes after the first optimizer step."""

    size = 0

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step == 1:
            SizeAfterOneStep.size = size_of(self.folder)


OVERRIDES = [
    "data=hub",
    "data.dataset=some/stream",
    "data.streaming=true",
    f"data.window_bytes={WINDOW}",
    "data.max_tokens=128",
    "data.vocab_size=300",
    "data.held_out_fraction=0.2",
    "model=tiny",
    "trainer.accelerator=cpu",
    "trainer.log_every_n_steps=1",
    "trainer.limit_val_batches=1",
    "trainer.enable_progress_bar=false",
    "callbacks.checkpoint.every_n_steps=10",
    "callbacks.checkpoint.keep=1",
    "evaluation.enabled=false",
    "export=false",
]


def test_a_run_streams_more_than_the_disk_may_hold_and_resumes(stream, tmp_path, monkeypatch):
    """A run that is stopped and resumed gives the same bits, and the cache does not grow."""
    monkeypatch.setenv("TMPDIR", str(tmp_path / "cache"))
    overrides = [*OVERRIDES, f"data.cache_dir={tmp_path}/cache"]
    read = stream()
    measured = (
        f"+callbacks.size={{_target_: {__name__}.SizeAfterOneStep, folder: {tmp_path}/cache}}"
    )
    train(config(*overrides, "trainer.max_steps=40", measured, output_dir=tmp_path / "whole"))
    limit = SizeAfterOneStep.size + 5_000  # bytes on disk: what one step needs, and the counts
    assert read.bytes > limit
    assert size_of(tmp_path / "cache") < limit
    kill = "+callbacks.stop={_target_: tests.training.KillAt, step: 23, number: 15}"
    stopped = [*overrides, "trainer.max_steps=40"]
    with pytest.raises(SystemExit):
        train(config(*stopped, kill, output_dir=tmp_path / "stopped"))
    train(config(*stopped, "ckpt_path=last", output_dir=tmp_path / "stopped"))
    assert len(train_losses(tmp_path / "whole")) == 40
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.parametrize("workers", [0, 2])
def test_any_batch_is_the_same_wherever_one_begins(stream, tmp_path, workers):
    stream()
    whole = batches(module(tmp_path / "1"), 0, 60)
    late = module(tmp_path / "1", num_workers=workers)
    assert batches(late, 45, 15) == whole[45:]
    assert batches(module(tmp_path / "2"), 45, 15) == whole[45:]  # without a journal
    keys = [key for _, document_ids in whole for key in document_ids]
    assert len(set(keys)) == len(keys)


def test_a_late_start_tokenizes_nothing_that_came_before(stream, tmp_path, monkeypatch):
    from lctrain.data import streaming

    stream()
    batches(module(tmp_path), 0, 60)
    calls = []
    tokenize = streaming.tokenize_window

    def counted(*arguments):
        calls.append(1)
        return tokenize(*arguments)

    monkeypatch.setattr(streaming, "tokenize_window", counted)
    batches(module(tmp_path), 59, 1)
    assert len(calls) == 1


def test_ranks_share_every_window(stream, tmp_path):
    stream()
    first, second = (batches(module(tmp_path, rank, 2), 0, 20) for rank in (0, 1))
    rows = [json.dumps(row) for row, _ in first + second]
    assert len(set(rows)) == len(rows)


def test_a_stream_that_ends_begins_again_in_another_order(stream, tmp_path):
    stream(records=12)
    found = batches(module(tmp_path), 0, 200)
    rows = [json.dumps(row) for row, _ in found]
    again = rows.index(rows[0], 1)
    assert set(rows[again:]) <= set(rows[:again])
    assert rows[again : again + 5] != rows[:5]


def test_a_later_run_crosses_the_end_of_the_stream_with_a_journal(stream, tmp_path):
    stream(records=25)
    whole = batches(module(tmp_path), 0, 100)
    assert len(json.loads(next(tmp_path.glob("streams/*.json")).read_text())) > 4  # epochs, too
    assert batches(module(tmp_path), 0, 100) == whole
    assert batches(module(tmp_path), 15, 85) == whole[15:]


def test_held_out_documents_are_never_trained_on(stream, tmp_path):
    stream(records=40)
    data = module(tmp_path)
    held_out = {tuple(document.input_ids) for document in data.held_out_documents()}
    assert held_out
    tokens = [
        tuple(batch.input_ids[0, batch.cu_seqlens[i] : batch.cu_seqlens[i + 1]].tolist())
        for batch, _ in zip(data.train_dataloader(), range(150), strict=False)
        for i in range(len(batch.cu_seqlens) - 1)
    ]
    begins = {document[:40] for document in held_out}
    assert not begins & {document[:40] for document in tokens}


def test_another_stream_is_refused_in_a_resumed_run(stream, tmp_path, monkeypatch):
    stream()
    batches(module(tmp_path), 0, 60)
    data = module(tmp_path)
    monkeypatch.setattr("tests.data.test_streaming.WORDS", ("other",))
    with pytest.raises(ValueError, match=r"must read the stream that it was trained on, got"):
        batches(data, 40, 10)


def stopped_after(folder, count):
    """The state of a data module that has given out some batches, as a checkpoint holds it."""
    data = module(folder)
    batches(data, 0, count)
    return data.state_dict()


def going_on(folder, state):
    data = module(folder)
    data.trainer, trainer = None, data.trainer
    data.load_state_dict(state)
    data.trainer = trainer
    return data


@pytest.mark.parametrize("left", [0, 2])  # rows of the checkpoint's window, not trained on yet
@pytest.mark.parametrize("rewritten", [True, False])
def test_a_place_is_compared_without_trust_in_the_journal(stream, tmp_path, left, rewritten):
    """The stream changes after its first window, and another run may rewrite the journal."""
    read = stream()
    whole = batches(module(tmp_path / "whole"), 0, 60)
    journal = json.loads(next(tmp_path.glob("whole/streams/*.json")).read_text())
    count = sum(window[3] for window in journal[:3]) - left
    state = stopped_after(tmp_path / "run", count)
    read.changed_from = journal[0][4]
    if rewritten:
        batches(module(tmp_path / "run"), 0, count)
    with pytest.raises(ValueError, match=r"must read the stream that it was trained on, got"):
        batches(going_on(tmp_path / "run", state), count, 1)
    read.changed_from = None
    assert batches(going_on(tmp_path / "run", state), count, 4) == whole[count : count + 4]


@pytest.mark.parametrize("workers", [0, 1])
def test_the_place_is_that_of_the_last_batch(stream, tmp_path, workers):
    stream()
    data = module(tmp_path, num_workers=workers)
    loader = data.train_dataloader()
    numbers = [data.state_dict()["place"]["number"] for _ in zip(loader, range(25), strict=False)]
    journal = json.loads(next(tmp_path.glob("streams/*.json")).read_text())
    rows = [window[3] for window in journal]
    assert numbers == [number for number, count in enumerate(rows) for _ in range(count)][:25]
    assert len(set(numbers)) > 1
    assert data.state_dict()["place"]["digest"] == journal[numbers[-1]][-1]


def test_a_disk_that_refuses_the_counts_ends_no_run(stream, tmp_path, monkeypatch, caplog):
    stream()
    whole = batches(module(tmp_path / "1"), 0, 20)

    def refuse(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lctrain.data.streaming.os.replace", refuse)
    assert batches(module(tmp_path / "2"), 0, 20) == whole
    assert "No space left on device" in caplog.text
    assert not list(tmp_path.glob("2/streams/*"))


def test_what_a_stream_cannot_do_is_named(stream, tmp_path):
    source = HubSource(dataset="some/stream", streaming=True, window_bytes=10)
    with pytest.raises(ValueError, match=r"passkey_fraction must be 0 for a stream"):
        PackedDataModule(source, passkey_fraction=0.5, cache_dir=tmp_path)
    with pytest.raises(ValueError, match=r"window_bytes must be at least 1, got 0"):
        HubSource(dataset="x", streaming=True, window_bytes=0)
    with pytest.raises(ValueError, match=r"trainer.max_steps must be set for a stream"):
        config(*OVERRIDES, "trainer.max_epochs=1", "trainer.max_steps=-1", output_dir=tmp_path)
    stream(records=3)
    small = module(tmp_path, world_size=10_000)
    with pytest.raises(ValueError, match=r"at least one row for each of 10,000 ranks in a window"):
        next(iter(small.train_dataloader()))


def test_a_resumed_stream_accumulates_as_before(stream, tmp_path):
    """Its packs have an order by micro-batches, whose number is not converted."""
    stream()

    def resumed(state, accumulated):
        data = module(tmp_path / "a")
        data.trainer.accumulate_grad_batches = accumulated
        data.trainer.state.fn = TrainerFn.FITTING
        data.trainer.fit_loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=object()))
        data.trainer.lightning_module = SimpleNamespace(converts_progress=True)
        data.load_state_dict(state)
        return data._cursor.batches

    state = module(tmp_path / "a").state_dict() | {"batches": 3}
    assert resumed(state, 1) == 3
    older = {n: v for n, v in state["settings"].items() if n != "accumulated"}
    for saved in (state, state | {"settings": older}):
        with pytest.raises(ValueError, match="others: accumulated was 1, is 4"):
            resumed(saved, 4)
    assert resumed({"settings": older, "batches": 3}, 1) == 3
