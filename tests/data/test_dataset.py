"""Tests pack and RowOrder: a user's dataset in a plain DataLoader, resumable at any batch."""

from contextlib import nullcontext

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader

from lctrain.batch import PackedBatch
from lctrain.callbacks import ResumeOrder, StepCheckpoint
from lctrain.config import OptimConfig
from lctrain.data import PackCollator, PackedDataModule, RowOrder, pack
from lctrain.module import LongContextModule
from tests.callbacks.own_module import OwnModule
from tests.data import order_two_ranks
from tests.forked import run_forked
from tests.training import make_trainer

DOCUMENTS = [list(range(3, 3 + length)) for length in (9, 2, 14, 5, 5, 7, 3, 11, 4, 6)]
WITH_LABELS = [
    {"input_ids": ids, "labels": [-100, *ids[1:]], "name": f"d{i}"}
    for i, ids in enumerate(DOCUMENTS)
]


class Mapped(torch.utils.data.Dataset):
    def __len__(self):
        return len(DOCUMENTS)

    def __getitem__(self, index):
        if index >= len(DOCUMENTS):
            raise IndexError
        return {"input_ids": torch.tensor(DOCUMENTS[index])}


def arrow(rows):
    from datasets import Dataset

    return Dataset.from_list(rows)


def unpacked(rows):
    """Returns the documents of all rows."""
    found = []
    for batch in (rows[index] for index in range(len(rows))):
        found += [ids.tolist() for ids in batch.input_ids[0].split(list(batch.lengths))]
    return found


FORMS = {
    "lists": lambda: DOCUMENTS,
    "generator": lambda: (ids for ids in DOCUMENTS),
    "map-style": Mapped,
    "mappings": lambda: WITH_LABELS,
    "arrow": lambda: arrow([{"input_ids": ids} for ids in DOCUMENTS]),
    "arrow-selected": lambda: arrow(WITH_LABELS[::-1]).select(range(9, -1, -1)),
    "streamed": lambda: arrow(WITH_LABELS).to_iterable_dataset(),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_dataset(form):
    rows = pack(FORMS[form](), max_tokens=16)
    assert rows.report.tokens == sum(map(len, DOCUMENTS))
    assert all(isinstance(rows[i], PackedBatch) for i in range(len(rows)))
    assert sorted(unpacked(rows)) == sorted(DOCUMENTS)
    assert rows.report.fill > 0.8


@pytest.mark.parametrize("make", [list, arrow], ids=["list", "arrow"])
def test_labels_and_names_stay_with_their_tokens(make):
    labels = [-100, -100, 5, -100, 7, 8]
    one = {"input_ids": [3, 4, 5, 6, 7, 8], "labels": labels, "name": "one"}
    rows = pack(make([one]), max_tokens=4)
    batches = [rows[index] for index in range(len(rows))]
    assert [batch.labels[0].tolist() for batch in batches] == [[-100, 5, -100, -100], [8, -100]]
    assert batches[0].names == ("one[0:4]",)
    assert [int(batch.document_ids[0]) for batch in batches] == [0, 1]


def test_empty_documents_are_dropped_and_counted():
    rows = pack([[], [3, 4], [], [5]], max_tokens=4)
    assert rows.report.dropped_empty == 2
    assert unpacked(rows) == [[3, 4], [5]]
    assert rows[0].names == ("document 1", "document 3")


def test_options_of_packing():
    rows = pack(DOCUMENTS, max_tokens=16, max_document_tokens=8, overlong="drop")
    assert rows.report.dropped == 3
    assert max(map(len, unpacked(rows))) == 7


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ([], "must fill at least one row, got none"),
        ([[]], "must fill at least one row, got none"),
        ("text", r"must be documents of token ids, got a str\. Pass"),
        (7, r"must be map-style or iterable, got int\. Pass"),
        ([{"text": "x"}], r"a document must have 'input_ids', got document 0 with 'text'\. Tok"),
        ([[1, 2], [0.5]], r"must be a sequence of integers, got float64 .* in document 1\. Pass"),
        ([[[1, 2]]], r"got int64 of shape \(1, 2\) in document 0"),
        (
            [{"input_ids": [1, 2], "labels": [1]}],
            r"one entry per token in every document, got 1 for the 2 tokens of document 0\. Align",
        ),
        (
            [{"input_ids": [1, 2], "labels": [1, 2]}, {"input_ids": [1]}],
            "got none for the 1 token of document 1",
        ),
    ],
)
def test_wrong_datasets(dataset, message):
    with pytest.raises(ValueError, match=message):
        pack(dataset, max_tokens=8)


def test_wrong_columns():
    with pytest.raises(ValueError, match=r"must have the column 'input_ids', got 'text'\. Tokeniz"):
        pack(arrow([{"text": "x"}]), max_tokens=8)
    null = arrow([{"input_ids": [1, 2], "labels": [1, 2]}, {"input_ids": [1], "labels": None}])
    with pytest.raises(ValueError, match="got none for the 1 token of document 1"):
        pack(null, max_tokens=8)


def test_the_collator_in_a_loader_of_the_users():
    loader = DataLoader(WITH_LABELS, batch_size=3, collate_fn=PackCollator(), shuffle=False)
    batches = list(loader)
    assert [len(batch.lengths) for batch in batches] == [3, 3, 3, 1]
    assert batches[0].names == ("d0", "d1", "d2")
    with pytest.raises(ValueError, match=r"must be mappings with 'input_ids', got \['text'\]"):
        next(iter(DataLoader([{"text": "x"}], batch_size=1, collate_fn=PackCollator())))


def test_the_order_is_an_epochs_permutation():
    order = RowOrder(range(20), seed=3)
    first = list(order)
    assert sorted(first) == list(range(20))
    assert list(order) == first
    order.set_epoch(1)
    second = list(order)
    assert second != first
    order.follow(lambda: (0, 15))
    assert list(order) == first[15:]  # the short last batch gets no row of the next epoch
    order.follow(lambda: None)
    assert list(order) == second
    halves = [list(RowOrder(range(20), 3, num_replicas=2, rank=rank)) for rank in (0, 1)]
    assert sorted(halves[0] + halves[1]) == list(range(20))


def test_wrong_orders():
    with pytest.raises(ValueError, match="seed must be at least 0"):
        RowOrder(range(4), seed=-1)
    with pytest.raises(ValueError, match="must be given together"):
        RowOrder(range(4), rank=1)
    with pytest.raises(ValueError, match="at least one for each of 8 ranks, got 4"):
        list(RowOrder(range(4), num_replicas=8, rank=0))


class KilledError(Exception):
    """An error that stands for the death of the process."""


class Recorder(OwnModule):
    """Records the batches. It reads estimated_stepping_batches, so Lightning loads data early."""

    def __init__(self, model, estimate=False, dies_at=None):
        super().__init__(model)
        self.batches, self.estimate, self.dies_at = [], estimate, dies_at

    def training_step(self, batch, batch_idx):
        if len(self.batches) == self.dies_at:
            raise KilledError
        self.batches.append(tuple(batch.input_ids[0].tolist()))
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self):
        if self.estimate:
            _ = self.trainer.estimated_stepping_batches
        return super().configure_optimizers()


STEPS = 15


def run(tmp_path, module, loader, steps=STEPS, resume=None):
    callbacks = [ResumeOrder(), StepCheckpoint(tmp_path, every_n_steps=1)]
    settings = {"max_epochs": -1, "max_steps": steps, "enable_checkpointing": True}
    path = None if resume is None else tmp_path / resume
    make_trainer(tmp_path, callbacks, **settings).fit(module, loader, ckpt_path=path)


def make_loader(batch_size=None, workers=0, stateful=False, own_batches=False):
    rows = pack(DOCUMENTS, max_tokens=16) if batch_size is None else WITH_LABELS
    kind = DataLoader
    if stateful:
        kind = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader
    collate = {} if batch_size is None else {"collate_fn": PackCollator()}
    if own_batches:
        batches = BatchSampler(RowOrder(rows, 5), batch_size, drop_last=False)
        return kind(rows, batch_sampler=batches, **collate)
    return kind(
        rows, batch_size=batch_size, sampler=RowOrder(rows, 5), num_workers=workers, **collate
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"stop": 2},
        {"stop": 5},
        {"stop": 7, "dies": False},
        {"stop": 7, "estimate": True},
        {"stop": 7, "workers": 1, "estimate": True},
        {"stop": 5, "batch_size": 2},
        {"stop": 2, "batch_size": 4},
        {"stop": 5, "batch_size": 4, "own_batches": True},
        {"stop": 7, "stateful": True},
        {"stop": 7, "stateful": True, "workers": 1, "estimate": True},
    ],
    ids=lambda settings: "-".join(f"{k}{v}" for k, v in settings.items()),
)
def test_a_plain_loader_resumes_to_the_batch(tmp_path, make_llama, settings):
    settings = dict(settings)
    stop, estimate = settings.pop("stop"), settings.pop("estimate", False)
    dies = settings.pop("dies", True)
    whole = Recorder(make_llama(), estimate)
    run(tmp_path / "whole", whole, make_loader(**settings))
    begun = Recorder(make_llama(), estimate, stop if dies else None)
    with pytest.raises(KilledError) if dies else nullcontext():
        run(tmp_path / "dead", begun, make_loader(**settings), steps=STEPS if dies else stop)
    resumed = Recorder(make_llama(), estimate)
    run(tmp_path / "dead", resumed, make_loader(**settings), resume="last.ckpt")
    assert len(whole.batches) == STEPS
    assert begun.batches == whole.batches[:stop]
    assert resumed.batches == whole.batches[stop:]
    assert resumed.seen == whole.seen[stop:]


def test_two_ranks_share_the_order_and_resume(tmp_path):
    """Lightning keeps the sampler: each rank has its own rows, and the same ones after a resume."""
    run_forked("tests.data.order_two_ranks", str(tmp_path))
    rows = order_two_ranks.make_rows()
    steps = len(rows) // 2
    for rank in (0, 1):
        seen = torch.load(tmp_path / f"{rank}.pt")
        order = RowOrder(rows, 5, num_replicas=2, rank=rank)
        expected = []
        for epoch in (0, 1):
            order.set_epoch(epoch)
            expected += [rows[row].input_ids[0].tolist() for row in order]
        assert steps < order_two_ranks.STEPS < 2 * steps
        assert seen["whole"]["batches"] == expected[: order_two_ranks.STEPS]
        for what in ("batches", "losses"):
            assert seen["begun"][what] + seen["rest"][what] == seen["whole"][what]


def test_long_context_module_needs_no_callback(tmp_path, make_llama):
    seen = []

    class Seen(LongContextModule):
        def training_step(self, batch, batch_idx):
            seen.append(tuple(batch.input_ids[0].tolist()))
            return super().training_step(batch, batch_idx)

    for steps in (9, 4, 9):
        trainer = make_trainer(tmp_path, max_epochs=9, max_steps=steps)
        path = tmp_path / "x.ckpt" if len(seen) > 9 else None
        optim = OptimConfig(schedule="constant", warmup_fraction=0.0)
        module = Seen(make_llama(), optim)
        trainer.fit(module, make_loader(), ckpt_path=path, weights_only=False)
        trainer.save_checkpoint(tmp_path / "x.ckpt")
    assert seen[:9] == seen[9:]


@pytest.mark.parametrize("form", ["lists", "arrow", "rows"])
def test_the_data_module_takes_datasets(tmp_path, make_llama, form):
    if form == "rows":
        data = PackedDataModule(pack(DOCUMENTS, 16), held_out=pack(DOCUMENTS[:3], 16))
    else:
        data = PackedDataModule(FORMS[form](), max_tokens=16, held_out_fraction=0.3)
    module = Recorder(make_llama())
    trainer = make_trainer(tmp_path, max_steps=4, max_epochs=-1)
    trainer.fit(module, data)
    trainer.test(module, data, verbose=False)
    assert len(module.batches) == 4
    held_out = [document.input_ids.tolist() for document in data.held_out_documents()]
    train = unpacked(data._ready.train_rows)
    assert len(held_out) in (3, 4)  # two documents are equal: both are held out, or neither
    assert sorted(train + ([] if form == "rows" else held_out)) == sorted(DOCUMENTS)
    again = PackedDataModule(FORMS["lists"](), max_tokens=16, held_out_fraction=0.3)
    again.setup()
    if form != "rows":
        assert again.fingerprint == data.fingerprint


def test_the_data_module_takes_texts(tmp_path):
    texts = [f"text number {i} of some words" for i in range(20)]
    settings = {"max_tokens": 32, "vocab_size": 300, "cache_dir": tmp_path}
    reports = []
    for dataset in (texts, arrow([{"text": text} for text in texts])):
        data = PackedDataModule(dataset, held_out=["held out text"], **settings)
        data.setup()
        assert len(data.held_out_documents()) == 1
        reports.append(data.packing_report)
    assert reports[0] == reports[1]
    assert reports[0].documents == 20


def test_wrong_settings_of_the_data_module():
    with pytest.raises(ValueError, match="held_out must come with a dataset, got it with a Source"):
        PackedDataModule(held_out=DOCUMENTS)
    with pytest.raises(ValueError, match=r"must be left out for token ids, got 0.1 and 'text'"):
        PackedDataModule(DOCUMENTS, passkey_fraction=0.1)
    with pytest.raises(ValueError, match=r"held_out_fraction must be in \[0, 1\), got 1.5"):
        PackedDataModule(DOCUMENTS, held_out_fraction=1.5)
    data = PackedDataModule(DOCUMENTS, max_tokens=16)
    data.setup()
    with pytest.raises(ValueError, match="tokenizer must be given to know vocab_size"):
        _ = data.vocab_size


def test_other_documents_are_an_error_at_resume(tmp_path, make_llama):
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.fit(OwnModule(make_llama()), PackedDataModule(DOCUMENTS, max_tokens=16))
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    other = PackedDataModule([ids[::-1] for ids in DOCUMENTS], max_tokens=16)
    with pytest.raises(ValueError, match="training_documents was"):
        make_trainer(tmp_path, max_steps=2).fit(
            OwnModule(make_llama()), other, ckpt_path=tmp_path / "x.ckpt"
        )
