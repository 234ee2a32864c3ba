"""Tests PackedDataModule: its settings, its attributes after setup, and its errors."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn
from transformers import PreTrainedTokenizerFast

from lctrain.data import JsonlSource, PackedDataModule, TextSource
from lctrain.data.tokenizer import END_TOKEN


def as_rank(data: PackedDataModule, rank: int, world_size: int) -> PackedDataModule:
    """Attaches the trainer attributes that the data module reads outside of fit."""
    data.trainer = SimpleNamespace(
        world_size=world_size, global_rank=rank, state=SimpleNamespace(fn=TrainerFn.VALIDATING)
    )
    return data


def batches(loader) -> list[tuple[int, ...]]:
    return [tuple(batch.document_ids.tolist()) for batch in loader]


@pytest.fixture
def data(make_data) -> PackedDataModule:
    module = make_data()
    module.setup()
    return module


def test_offers_tokenizer_report_and_fingerprint(data):
    assert data.vocab_size == len(data.tokenizer) == 300
    report = data.packing_report
    assert report.documents + data.held_out_report.documents == 60
    assert report.rows == len(data.train_dataloader())
    assert report.fill > 0.9
    assert len(data.fingerprint) == 16


def test_an_epoch_holds_every_piece_once_and_the_next_in_another_order(data):
    loader = data.train_dataloader()
    first, second = batches(loader), batches(loader)
    assert sorted(first) == sorted(second)
    assert first != second
    pieces = [piece for row in first for piece in row]
    assert sorted(pieces) == list(range(data.packing_report.pieces))


def test_batches_are_valid_packs(data):
    for batch in data.train_dataloader():
        assert batch.num_tokens <= 256
        assert batch.cu_seqlens[-1] == batch.num_tokens
        ends = batch.cu_seqlens[1:].long() - 1
        assert bool((batch.labels[0, ends] == -100).all())


def test_the_same_seed_gives_the_same_batches_and_another_seed_others(make_data):
    def first_epoch(seed: int) -> list[tuple[int, ...]]:
        module = make_data(seed=seed)
        module.setup()
        return batches(module.train_dataloader())

    assert first_epoch(1) == first_epoch(1) != first_epoch(2)


def test_workers_change_nothing(make_data, data):
    module = make_data(num_workers=2)
    module.setup()
    assert batches(module.train_dataloader()) == batches(data.train_dataloader())


def test_loading_draws_nothing_from_the_global_random_numbers(data):
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    batches(data.train_dataloader())
    assert torch.equal(torch.rand(1), expected)


def test_looking_at_a_batch_outside_of_fit_and_state_without_a_trainer(make_data, data):
    loader = data.train_dataloader()
    epoch = batches(loader)
    restored = make_data()
    restored.setup()
    loader = restored.train_dataloader()
    for _, seen in zip(range(4), loader, strict=False):
        assert tuple(seen.document_ids.tolist()) in epoch
    state = json.loads(json.dumps(restored.state_dict()))  # plain values
    assert state["batches"] == 4
    resumed = make_data()
    resumed.load_state_dict(state)
    resumed.setup()
    assert batches(resumed.train_dataloader())[: len(epoch) - 4] == epoch[4:]


def test_held_out_documents_are_whole_and_not_in_training(data):
    documents = data.held_out_documents()
    assert len(documents) == data.held_out_report.documents >= 1
    assert [document.document_id for document in documents] == list(range(len(documents)))
    for document in documents:
        assert document.input_ids.dtype == np.int64
        assert document.input_ids[-1] == data.tokenizer.eos_token_id
    training = {n.split("[")[0] for batch in data.train_dataloader() for n in batch.names}
    assert not training & {document.name for document in documents}


def test_held_out_batches_come_in_order_every_time(data):
    loader = data.val_dataloader()
    first = batches(loader)
    assert first == batches(loader)
    assert sum(len(row) for row in first) == data.held_out_report.pieces


def test_without_held_out_documents_there_is_no_validation(make_data):
    module = make_data(held_out_fraction=0.0)
    module.setup()
    assert module.val_dataloader() == []
    assert module.held_out_documents() == []


def test_held_out_files_of_the_source_are_used(make_data, corpus):
    source = TextSource(files=f"{corpus}/[0-4]*.txt", held_out_files=f"{corpus}/5*.txt")
    module = make_data(source=source)
    module.setup()
    assert len(module.held_out_documents()) == 10
    assert module.packing_report.documents == 50


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_an_epoch_without_overlap(make_data, world_size):
    modules = [as_rank(make_data(), rank, world_size) for rank in range(world_size)]
    for module in modules:
        module.setup()
    epochs = [batches(module.train_dataloader()) for module in modules]
    steps = modules[0].packing_report.rows // world_size
    assert [len(epoch) for epoch in epochs] == [steps] * world_size
    pieces = [piece for epoch in epochs for row in epoch for piece in row]
    assert len(pieces) == len(set(pieces))


def test_ranks_take_equally_many_held_out_steps_and_every_target_once(make_data):
    modules = [as_rank(make_data(held_out_fraction=0.3), rank, 3) for rank in range(3)]
    targets, steps = 0, set()
    for module in modules:
        module.setup()
        loader = list(module.val_dataloader())
        targets += sum(batch.num_valid_tokens for batch in loader)
        steps.add(len(loader))
    report = modules[0].held_out_report
    assert report.rows % 3 != 0
    assert steps == {-(-report.rows // 3)}
    assert targets == report.tokens - report.pieces


def test_fewer_rows_than_ranks_is_an_error(make_data):
    module = as_rank(make_data(), 0, 1000)
    module.setup()
    with pytest.raises(ValueError, match=r"each rank, got \d+ for 1000\. Use more data"):
        module.train_dataloader()


def test_empty_documents_are_dropped_and_counted(make_data, tmp_path):
    texts = ["first text", "", "  ", "second text", "third text"]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    module = make_data(source=JsonlSource(files=str(tmp_path / "a.jsonl")), held_out_fraction=0.0)
    module.setup()
    assert module.packing_report.documents == 3
    assert module.packing_report.dropped_empty == 2


def test_data_without_text_is_an_error(make_data, tmp_path):
    (tmp_path / "a.txt").write_text(" \n")
    module = make_data(source=TextSource(files=str(tmp_path / "a.txt")))
    with pytest.raises(
        ValueError, match=r"at least one document with text, got none .*\(1 empty\)"
    ):
        module.setup()


def test_dropping_every_document_is_an_error(make_data):
    module = make_data(max_tokens=2, overlong="drop")
    with pytest.raises(ValueError, match=r"at least one row, got none: .*overlong=split"):
        module.setup()


def test_a_tokenizer_object_is_used(make_data, data):
    module = make_data(tokenizer=data.tokenizer)
    module.setup()
    assert module.fingerprint == data.fingerprint


def test_a_tokenizer_without_an_end_token_is_used_with_a_warning(make_data, data, caplog):
    bare = PreTrainedTokenizerFast(tokenizer_object=data.tokenizer.backend_tokenizer)
    module = make_data(tokenizer=bare, passkey_fraction=0.5)
    module.setup()
    assert "has no end token: documents end without one" in caplog.text
    batch = next(iter(module.train_dataloader()))
    assert any(name.startswith("passkey") for name in batch.names)
    assert module.fingerprint != data.fingerprint


def test_texts_of_special_tokens_are_counted_in_the_report(make_data, data, tmp_path):
    (tmp_path / "a.txt").write_text(f"one {END_TOKEN} two {END_TOKEN}")
    source = TextSource(files=str(tmp_path / "a.txt"))
    for mode, ends in (("text", 1), ("token", 2)):
        module = make_data(
            source=source, tokenizer=data.tokenizer, held_out_fraction=0.0, special_tokens=mode
        )
        module.setup()
        assert "2 texts of special tokens" in str(module.packing_report)
        batch = next(iter(module.train_dataloader()))
        assert (batch.input_ids == data.tokenizer.eos_token_id).sum() == ends
        assert module.settings.get("special_tokens", "text") == mode


def test_a_tokenizer_path_is_used(make_data, data, tmp_path):
    data.tokenizer.save_pretrained(tmp_path / "tokenizer")
    module = make_data(tokenizer=str(tmp_path / "tokenizer"))
    module.setup()
    assert module.fingerprint == data.fingerprint


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_tokens": 1}, "max_tokens must be at least 2, got 1"),
        ({"special_tokens": "x"}, "special_tokens must be one of text, token, got 'x'"),
        ({"overlong": "cut"}, "overlong must be one of split, truncate, drop, got 'cut'. split"),
        ({"held_out_fraction": 1.0}, r"held_out_fraction must be in \[0, 1\), got 1.0"),
        ({"packing_window": 0}, "packing_window must be at least 1, got 0"),
        ({"balance_window": 0}, "balance_window must be at least 1, got 0"),
        ({"passkey_fraction": 1.0}, r"passkey_fraction must be in \[0, 1\), got 1.0"),
        ({"max_document_tokens": 300}, r"max_document_tokens must be in \[2, max_tokens = 256\]"),
        ({"num_proc": 0}, r"num_proc must be at least 1, got 0. Use None \(null\)"),
        ({"num_workers": -1}, "num_workers must be at least 0, got -1"),
        ({"seed": -1}, r"seed must be in \[0, \d+\], got -1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_settings_are_an_error_before_anything_is_read(make_data, settings, message):
    with pytest.raises(ValueError, match=message):
        make_data(**settings)


def test_asking_for_batches_before_setup_is_an_error(make_data):
    with pytest.raises(RuntimeError, match=r"setup\(\) must run first"):
        make_data().train_dataloader()
    assert make_data().state_dict() == {}


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"max_tokens": 128}, ["max_tokens was 256, is 128"]),
        ({"overlong": "drop", "seed": 7}, ["overlong was 'split', is 'drop'", "seed was 0, is 7"]),
        ({"packing_window": 10}, ["packing_window was 100000, is 10"]),
        ({"balance_window": 8}, ["balance_window was 256, is 8"]),
        ({"vocab_size": 310}, ["tokenizer was"]),
        (
            {"held_out_fraction": 0.4},
            ["held_out_fraction was 0.05, is 0.4", "training_documents was", "tokenizer was"],
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_resuming_with_other_settings_is_an_error_that_names_them(make_data, data, settings, names):
    other = make_data(**settings)
    other.setup()
    with pytest.raises(ValueError, match="a resumed run must have the data and packing") as error:
        other.load_state_dict(data.state_dict())
    assert all(name in str(error.value) for name in names)
    message = str(error.value).partition("; source was")[0]
    assert message.count(" was ") == len(names)


def test_resuming_with_other_settings_is_noticed_at_setup_too(make_data, data):
    other = make_data(max_tokens=128)
    other.load_state_dict(data.state_dict())
    with pytest.raises(ValueError, match="max_tokens was 256, is 128"):
        other.setup()


def test_resuming_with_other_packs_per_step_is_an_error(make_data, data):
    other = make_data()
    other.load_state_dict(data.state_dict())
    with pytest.raises(ValueError, match="others: packs_per_step was 1, is 2"):
        as_rank(other, 0, 2).setup()


def test_the_packs_of_a_step_do_not_depend_on_the_ranks(make_data):
    """4 packs per step, by ranks and packs that each rank accumulates."""
    steps = {}
    for ranks, accumulated in ((1, 4), (2, 2), (4, 1)):
        modules = [as_rank(make_data(), rank, ranks) for rank in range(ranks)]
        for module in modules:
            module.trainer.accumulate_grad_batches = accumulated
            module.setup()
        assert modules[0].settings["packs_per_step"] == 4
        epochs = [
            [tuple(batch.document_ids.tolist()) for batch in module.train_dataloader()]
            for module in modules
        ]
        batches = list(zip(*epochs, strict=True))
        assert len(batches) == modules[0].packing_report.rows // 4 * accumulated
        steps[ranks] = [
            {pack for micro in batches[first : first + accumulated] for pack in micro}
            for first in range(0, len(batches), accumulated)
        ]
    assert steps[1] == steps[2] == steps[4]
    assert len(steps[1]) >= 2


def test_another_module_must_accumulate_as_before(make_data, data):
    """Only LongContextModule converts Lightning's counts to another number of packs per rank."""
    state = data.state_dict() | {"accumulated": 3}
    other = as_rank(make_data(), 0, 1)
    other.trainer.state.fn = TrainerFn.FITTING
    other.trainer.fit_loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=object()))
    with pytest.raises(ValueError, match="accumulate_grad_batches must be 3, as in the checkpoint"):
        other.load_state_dict(state)


def as_saved_before(state, ranks):
    """Returns a state as it was when rows were ordered by ranks, not by the packs of a step."""
    settings = {name: v for name, v in state["settings"].items() if name != "packs_per_step"}
    return {"settings": settings | {"world_size": ranks}, "batches": state["batches"]}


def test_a_checkpoint_that_names_ranks_resumes_without_accumulation(make_data, data):
    make_data().load_state_dict(as_saved_before(data.state_dict(), 1))  # before setup
    data.load_state_dict(as_saved_before(data.state_dict(), 1))
    with pytest.raises(ValueError, match="others: packs_per_step was 2, is 1"):
        data.load_state_dict(as_saved_before(data.state_dict(), 2))


def test_a_checkpoint_that_names_ranks_does_not_resume_with_accumulation(make_data, data):
    other = make_data()
    other.load_state_dict(as_saved_before(data.state_dict(), 1))
    as_rank(other, 0, 1).trainer.accumulate_grad_batches = 2
    with pytest.raises(ValueError, match="accumulate_grad_batches must be 1 to resume from a"):
        other.setup()


def test_epochs_shorter_than_a_step_keep_ranks_and_accumulation(make_data):
    """Their micro-batches do not form whole steps, so their number cannot be converted."""

    def of_ranks(ranks, accumulated):
        module = make_data()
        module.load_state_dict(state)
        as_rank(module, 0, ranks).trainer.accumulate_grad_batches = accumulated
        module.setup()
        return module

    first = as_rank(make_data(), 0, 1)
    first.trainer.accumulate_grad_batches = 1000
    first.setup()
    state = first.state_dict() | {"accumulated": 1}  # which a module without a trainer has
    assert of_ranks(1, 1000).settings == state["settings"]
    with pytest.raises(ValueError, match="world_size was 1, is 2; accumulated was 1000, is 500"):
        of_ranks(2, 500)


def test_resuming_with_other_documents_names_both_sources(make_data, data, corpus):
    other = make_data(source=TextSource(files=f"{corpus}/[0-3]*.txt"))
    other.setup()
    with pytest.raises(ValueError, match=r"source was TextSource\(.*\), is TextSource\(.*0-3"):
        other.load_state_dict(data.state_dict())


def test_resuming_with_moved_files_is_fine(make_data, data, corpus, tmp_path):
    for path in corpus.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    moved = make_data(source=TextSource(files=f"{tmp_path}/*.txt"))
    moved.setup()
    moved.load_state_dict(data.state_dict())


def test_a_damaged_cache_is_named(corpus, tmp_path):
    """Cuts, empties or overwrites each file of a cache: it is named, or written again."""

    def prepare(cache):
        files = (f"{corpus}/*.txt",)
        return PackedDataModule(
            TextSource(files=files), max_tokens=256, vocab_size=300, cache_dir=cache
        ).preparation.run()

    prepare(tmp_path / "whole")
    files = [path for path in (tmp_path / "whole").rglob("*") if path.suffix in (".arrow", ".json")]
    cache, messages = tmp_path / "damaged", []
    for path in files:
        for damage in (lambda data: data[:100], lambda data: b"", lambda data: b"\xff" * len(data)):
            shutil.rmtree(cache, ignore_errors=True)
            shutil.copytree(tmp_path / "whole", cache)
            place = cache / path.relative_to(tmp_path / "whole")
            place.write_bytes(damage(place.read_bytes()))
            try:
                prepare(cache)
            except ValueError as error:
                messages.append(str(error))
    named = f"data.cache_dir must hold intact files, got {cache} with a damaged one ("
    assert len(messages) >= len(files)
    assert all(message.startswith(named) for message in messages), messages


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("LCTRAIN_CACHE", str(tmp_path / "own"))
    assert PackedDataModule().preparation.cache_dir == tmp_path / "own"
    monkeypatch.delenv("LCTRAIN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert PackedDataModule().preparation.cache_dir == tmp_path / "lctrain"


@pytest.mark.gpu
def test_pinned_batches_arrive_on_the_device(make_data):
    module = make_data(pin_memory=True, num_workers=1)
    module.setup()
    batch = next(iter(module.train_dataloader()))
    assert batch.input_ids.is_pinned()
    assert batch.schedule.q_tiles.is_pinned()
    moved = module.transfer_batch_to_device(batch, torch.device("cuda"), 0)
    assert moved.labels.is_cuda
    assert torch.equal(moved.labels.cpu(), batch.labels)


def test_tokens_outside_of_the_vocabulary_are_an_error():
    from types import SimpleNamespace

    import torch

    from lctrain.batch import PackedBatch
    from lctrain.data.datamodule import check_vocabulary

    model = SimpleNamespace(get_input_embeddings=lambda: torch.nn.Embedding(97, 4))
    module = SimpleNamespace(model=model)
    check_vocabulary(PackedBatch.from_documents([[3, 96]]), module)
    with pytest.raises(ValueError, match=r"tokens below the model's vocabulary of 97, got 97"):
        check_vocabulary(PackedBatch.from_documents([[3, 97]]), module)
