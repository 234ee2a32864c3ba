"""Tests PackedBatch: layout, shifted labels, device transfer, and every error message."""

import dataclasses
import pickle

import numpy as np
import pytest
import torch
from lightning_utilities.core.apply_func import apply_to_collection

from lctrain.batch import PackedBatch

DOCUMENTS = [[5, 6, 7], [8], [9, 10]]


@pytest.fixture
def batch() -> PackedBatch:
    return PackedBatch.from_documents(
        DOCUMENTS, document_ids=[4, 2, 9], names=["a", "b", "c"], max_tokens=6
    )


def test_layout_has_no_padding_and_shifted_labels(batch):
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 10]]
    assert batch.labels.tolist() == [[6, 7, -100, -100, 10, -100]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 0, 1]]
    assert batch.cu_seqlens.tolist() == [0, 3, 4, 6]
    assert batch.document_ids.tolist() == [4, 2, 9]
    assert (batch.max_seqlen, batch.num_tokens, batch.num_valid_tokens) == (3, 6, 3)
    assert batch.lengths == (3, 1, 2)
    assert batch.names == ("a", "b", "c")


def test_dtypes_and_schedule(batch):
    for name in ("input_ids", "labels", "position_ids"):
        assert getattr(batch, name).dtype == torch.int64
    assert batch.cu_seqlens.dtype == batch.document_ids.dtype == torch.int32
    assert type(batch.max_seqlen) is int
    assert batch.schedule.total_q == 6


@pytest.mark.parametrize("convert", [np.array, torch.tensor, list], ids=["numpy", "torch", "list"])
def test_accepts_numpy_torch_and_lists(batch, convert):
    other = PackedBatch.from_documents([convert(tokens) for tokens in DOCUMENTS])
    assert torch.equal(other.input_ids, batch.input_ids)
    assert other.document_ids.tolist() == [0, 1, 2]


def test_read_only_array_is_copied_without_a_warning(recwarn):
    tokens = np.arange(3)
    tokens.flags.writeable = False
    assert PackedBatch.from_documents([tokens]).num_tokens == 3
    assert not recwarn.list


def test_from_packed_equals_from_documents(batch):
    other = PackedBatch.from_packed(batch.input_ids, batch.cu_seqlens, document_ids=[4, 2, 9])
    assert torch.equal(other.labels, batch.labels)
    assert torch.equal(other.position_ids, batch.position_ids)


def test_zero_length_document_in_cu_seqlens_is_kept():
    batch = PackedBatch.from_packed([1, 2, 3], torch.tensor([0, 0, 2, 3, 3], dtype=torch.int32))
    assert batch.lengths == (0, 2, 1, 0)
    assert batch.labels.tolist() == [[2, -100, -100]]


def test_given_labels_are_shifted_and_keep_their_mask():
    batch = PackedBatch.from_documents([[5, 6, 7], [8, 9]], labels=[[-100, -100, 7], [8, 9]])
    assert batch.labels.tolist() == [[-100, 7, -100, 9, -100]]
    assert batch.num_valid_tokens == 2


@pytest.mark.parametrize(
    ("documents", "labels", "names", "message"),
    [
        ([[1, 2], [3, 4, -7]], None, None, "token ids of at least 0, got -7 at position 2 of doc"),
        ([[-100]], None, ["a"], r"got -100 at position 0 of document 0 \(a\)\. Remove padding"),
        ([[1], [2, 3]], [[1], [-100, -1]], ["a", "b"], r"got -1 at position 1 of document 1 \(b\)"),
        ([[1, 2]], [[-101, 2]], None, "labels must be token ids, or -100 for .* Set it to -100"),
    ],
    ids=["token", "placeholder", "label", "other label"],
)
def test_negative_ids_are_refused_with_document_and_position(documents, labels, names, message):
    with pytest.raises(ValueError, match=message):
        PackedBatch.from_documents(documents, labels=labels, names=names)


def test_a_negative_id_after_an_empty_document_is_that_of_the_next_one():
    boundaries = torch.tensor([0, 0, 2, 2, 4, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match="got -5 at position 0 of document 3"):
        PackedBatch.from_packed([1, 2, -5, 4], boundaries)


@pytest.mark.parametrize(
    ("group", "message"),
    [
        (([1, -2], [[3]]), r"groups\[0\]\[0\] must hold token ids .* got -2 at position 1"),
        (([1, 2], [[3], [4, -1]]), r"groups\[0\]\[1\]\[1\] must hold .* got -1 at position 1"),
    ],
    ids=["prompt", "completion"],
)
def test_negative_ids_of_groups_are_refused_with_their_place(group, message):
    with pytest.raises(ValueError, match=message):
        PackedBatch.from_groups([group])


def test_model_kwargs_are_names_of_transformers(batch):
    kwargs = batch.model_kwargs()
    assert kwargs["cu_seq_lens_q"] is kwargs["cu_seq_lens_k"] is batch.cu_seqlens
    assert kwargs["max_length_q"] == kwargs["max_length_k"] == 3
    assert kwargs["use_cache"] is False
    assert kwargs["document_ids"] is batch.document_ids
    assert "labels" not in kwargs


def test_to_moves_every_tensor_and_no_length(batch):
    moved = batch.to("meta")
    assert moved.input_ids.device.type == moved.schedule.q_tiles.device.type == "meta"
    assert moved.lengths == batch.lengths
    assert batch.input_ids.device.type == "cpu"


def test_without_targets_weighs_nothing(batch):
    muted = batch.without_targets()
    assert muted.num_valid_tokens == 0
    assert bool((muted.labels == -100).all())
    assert torch.equal(muted.input_ids, batch.input_ids)


def test_pickles_for_worker_processes(batch):
    copy = pickle.loads(pickle.dumps(batch))
    assert torch.equal(copy.labels, batch.labels)
    assert copy.lengths == batch.lengths


def test_is_frozen(batch):
    for name, value in (("num_tokens", 7), ("labels", batch.labels.clone()), ("other", 1)):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(batch, name, value)


def test_lightning_conversion_of_inputs_leaves_it_as_it_is(batch):
    converted = apply_to_collection(batch, torch.Tensor, lambda tensor: tensor)
    assert torch.equal(converted.input_ids, batch.input_ids)


def offsets(*values: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


@pytest.mark.parametrize(
    ("cu_seqlens", "error", "message"),
    [
        (offsets(1, 3), ValueError, "must start at 0, got 1"),
        (offsets(0, 2, 1, 3), ValueError, "must not decrease"),
        (offsets(0, 2), ValueError, r"must end at the number of packed tokens \(3\), got 2"),
        (offsets(0, 4), ValueError, r"must end at the number of packed tokens \(3\), got 4"),
        (offsets(0, 3, dtype=torch.int64), TypeError, "must be an int32 tensor, got torch.int64"),
        ([0, 3], TypeError, "must be an int32 tensor, got list"),
        (offsets(0, 3).to("meta"), ValueError, "must be on the CPU, got meta"),
        (offsets(0), ValueError, r"must have shape \[documents \+ 1\]"),
        (offsets(0, 3)[None], ValueError, r"must have shape \[documents \+ 1\]"),
    ],
    ids=["start", "decrease", "short", "long", "dtype", "list", "device", "no-document", "2d"],
)
def test_bad_cu_seqlens_is_an_error(cu_seqlens, error, message):
    with pytest.raises(error, match=message):
        PackedBatch.from_packed([1, 2, 3], cu_seqlens)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"labels": [1, 2]}, r"labels must have as many entries as input_ids \(3\), got 2"),
        ({"document_ids": [1]}, r"document_ids must have one entry per document \(2\), got 1"),
        ({"document_ids": [1, 2**31]}, r"document_ids must be in \[0, 2\^31\)"),
        ({"document_ids": [-1, 0]}, r"document_ids must be in \[0, 2\^31\)"),
        ({"names": ["a"]}, r"names must have one entry per document \(2\), got 1"),
        ({"max_tokens": 1}, "max_tokens must be at least 2, got 1"),
        ({"max_tokens": 2}, "at most max_tokens = 2 tokens, got 3"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_companion_is_an_error(keywords, message):
    with pytest.raises(ValueError, match=message):
        PackedBatch.from_packed([1, 2, 3], offsets(0, 2, 3), **keywords)


def test_empty_pack_is_an_error():
    with pytest.raises(ValueError, match="at least one token, got none"):
        PackedBatch.from_packed([], offsets(0, 0))


@pytest.mark.parametrize(
    ("documents", "keywords", "error", "message"),
    [
        ([], {}, ValueError, "at least one document, got none"),
        ([[1], []], {"names": ["a", "b"]}, ValueError, r"got an empty one \(b\)"),
        ([[1], []], {}, ValueError, r"got an empty one \(1\)"),
        ([[0.5]], {}, TypeError, r"documents\[0\] must hold integers, got torch.float32"),
        ([[[1, 2], [3, 4]]], {}, ValueError, r"documents\[0\] must have one dimension"),
        ([[1, 2]], {"labels": [[1]]}, ValueError, r"labels\[0\] must be as long as its document"),
        ([[1, 2]], {"labels": []}, ValueError, r"labels must have one entry per document \(1\)"),
    ],
    ids=["none", "empty-named", "empty", "float", "2d", "label-length", "label-count"],
)
def test_bad_documents_are_an_error(documents, keywords, error, message):
    with pytest.raises(error, match=message):
        PackedBatch.from_documents(documents, **keywords)


def test_text_in_place_of_tokens_is_an_error():
    with pytest.raises(TypeError, match=r"documents\[0\] must hold token ids, got text \('text'\)"):
        PackedBatch.from_documents(["text"])
