"""Tests the collator: it turns documents, or the rows of a plan, into a PackedBatch."""

import numpy as np
import pytest
import torch

from lctrain.data import PackCollator


def test_packs_documents_with_their_ids_names_and_labels():
    batch = PackCollator(max_tokens=8)(
        [
            {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "document_id": 3, "name": "a"},
            {"input_ids": [8, 9], "labels": [8, 9], "document_id": 1, "name": "b"},
        ]
    )
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9]]
    assert batch.labels.tolist() == [[6, 7, -100, 9, -100]]
    assert batch.document_ids.tolist() == [3, 1]
    assert batch.names == ("a", "b")


def test_works_as_collate_fn_of_a_plain_dataloader():
    documents = [{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5]}]
    loader = torch.utils.data.DataLoader(documents, batch_size=2, collate_fn=PackCollator())
    assert next(iter(loader)).lengths == (3, 2)


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([{"input_ids": [1, 2, 3, 4, 5]}], "at most max_tokens = 4 tokens, got 5"),
        ([{"input_ids": [1, 2], "labels": [1]}], r"labels\[0\] must be as long as its document"),
        ([{"input_ids": []}], "got an empty one"),
        ([], "at least one document"),
        ([{"text": "a"}], r"must be mappings with 'input_ids', got \['text'\] for number 0"),
        (["text"], "must be mappings with 'input_ids', got str for number 0"),
        (
            [{"input_ids": [1], "name": "a"}, {"input_ids": [2]}],
            "'name' must be in all documents of a row or in none, got 1 of 2",
        ),
    ],
    ids=["too-long", "labels", "empty", "none", "no-ids", "text", "names"],
)
def test_bad_documents_are_an_error(documents, message):
    with pytest.raises(ValueError, match=message):
        PackCollator(max_tokens=4)(documents)


def test_max_tokens_below_two_is_an_error():
    with pytest.raises(ValueError, match="max_tokens must be at least 2, got 1"):
        PackCollator(max_tokens=1)


@pytest.fixture
def rows(make_data):
    data = make_data(max_tokens=64)
    data.setup()
    return data.train_dataloader()._dataloader.dataset


def test_rows_hold_every_token_of_every_document_once(rows):
    pieces = {}
    for row in range(len(rows)):
        batch = rows[row]
        parts = batch.input_ids[0].split(list(batch.lengths))
        pieces.update(zip(batch.document_ids.tolist(), parts, strict=True))
    plan, store = rows.plan, rows.store
    for document in range(len(store)):
        own = np.flatnonzero(plan.documents == document)
        tokens = torch.cat([pieces[piece] for piece in own])
        assert tokens.tolist() == store.tokens(document).tolist()


def test_names_say_which_part_of_a_document(rows):
    names = [name for row in range(len(rows)) for name in rows[row].names]
    assert any(name.endswith(".txt[64:128]") for name in names)
    assert any(name.endswith(".txt") for name in names)


def test_a_complemented_row_has_no_targets(rows):
    assert torch.equal(rows[~1].input_ids, rows[1].input_ids)
    assert rows[~1].num_valid_tokens == 0


def test_a_row_beyond_the_end_is_an_index_error(rows):
    with pytest.raises(IndexError):
        rows[len(rows)]


def test_padded_documents_are_refused():
    collate = PackCollator()
    plain = {"input_ids": [4, 5, 6], "attention_mask": [1, 1, 1]}
    assert collate([plain, plain]).lengths == (3, 3)
    for mask in ([1, 1, 0], torch.tensor([1, 1, 2])):
        with pytest.raises(
            ValueError, match=r"without padding, .* number 1. Tokenize with padding"
        ):
            collate([plain, plain | {"attention_mask": mask}])
