"""Tests that lengths, counts and masks of a wrong type, sign or size are refused."""

import numpy as np
import pytest
import torch

from lctrain.data.packing import plan_rows
from lctrain.kernels import (
    apply_rotary_emb,
    flash_attn_varlen_func,
    make_schedule,
    make_shared_prefixes,
    pad_input,
    rotary_table,
    unpad_input,
)
from lctrain_kernels import checks

MASK = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])
ROWS = torch.zeros(2, 4, 3)
WRONG = {
    "bool": np.array([True, False]),
    "bool tensor": torch.tensor([True, False]),
    "float": [2.7, 3.2],
    "table": np.array([[2, 3]]),
}


@pytest.mark.parametrize("lengths", WRONG.values(), ids=WRONG)
def test_lengths_are_integers(lengths):
    with pytest.raises(TypeError, match=r"lengths_q must be integers \[documents\], got"):
        make_schedule(lengths)
    with pytest.raises(TypeError, match=r"lengths_k must be integers \[documents\], got"):
        make_schedule([2, 3], lengths)
    with pytest.raises(TypeError, match=r"cache_seqlens must be integers \[documents\], got"):
        make_shared_prefixes([[0, 1], [0, 2]], lengths, 16)
    with pytest.raises(TypeError, match=r"lengths must be integers \[documents\], got"):
        plan_rows(lengths, 16)


def test_lengths_of_other_integer_types():
    expected = make_schedule([2, 3])
    for lengths in (np.array([2, 3], np.uint8), torch.tensor([2, 3], dtype=torch.int16), (2, 3)):
        for found, tensor in zip(make_schedule(lengths)[:2], expected[:2], strict=True):
            assert torch.equal(found, tensor)
    assert make_schedule([]).documents == 0
    with pytest.raises(ValueError, match="lengths must be >= 0, got a negative one"):
        make_schedule(~np.array([2, 3]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_mask": ~MASK}, "attention_mask must hold 0 and 1 only, got -2 to -1"),
        ({"attention_mask": ~MASK.to(torch.uint8)}, "must hold 0 and 1 only, got 254 to 255"),
        ({"unused_mask": ~MASK}, "unused_mask must hold 0 and 1 only, got -2 to -1"),
        ({"unused_mask": MASK[:1]}, r"unused_mask must have shape \(2, 4\), got \(1, 4\)"),
        ({"num_tokens": 4}, "num_tokens must be the ones in both masks, 5, got 4"),
        ({"num_tokens": 6}, "num_tokens must be the ones in both masks, 5, got 6"),
        ({"max_seqlen": 2}, "max_seqlen must be at least 3, the longest row, got 2"),
    ],
)
def test_masks_and_counts_of_padded_rows(changes, message):
    given = {"hidden_states": ROWS, "attention_mask": MASK}
    with pytest.raises(ValueError, match=message):
        unpad_input(**{**given, **changes})
    assert unpad_input(**given, num_tokens=5, max_seqlen=4)[3] == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": -2}, "batch must be an int of at least 0, got -2"),
        ({"seqlen": True}, "seqlen must be an int of at least 0, got True"),
        ({"indices": torch.tensor([0, 8])}, "indices must be from 0 to 7 for 2 rows of 4 tokens"),
        ({"indices": torch.tensor([-1, 0])}, "indices must be from 0 to 7 .* got -1 to 0"),
        ({"indices": torch.tensor([True, True])}, r"indices must be int64 of shape \(2,\), got"),
        ({"indices": torch.tensor([1])}, r"indices must be int64 of shape \(2,\), got"),
    ],
)
def test_places_of_packed_tokens(changes, message):
    given = {"hidden_states": ROWS[0, :2], "indices": torch.tensor([0, 5]), "batch": 2}
    with pytest.raises(ValueError, match=message):
        pad_input(**{**given, "seqlen": 4, **changes})


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        (torch.tensor([0, 1, 2, -1]), "position_ids must be from 0 to 4, .* got -1 to 2"),
        (torch.tensor([0, 1, 2, 5]), "position_ids must be from 0 to 4, .* got 0 to 5"),
        (torch.ones(4, dtype=torch.bool), r"position_ids must be integers of shape \(4,\)"),
    ],
)
def test_positions_are_rows_of_the_table(positions, message):
    cos, sin = rotary_table(torch.ones(4), torch.arange(5))
    with pytest.raises(ValueError, match=message):
        apply_rotary_emb(torch.zeros(4, 2, 8), cos, sin, position_ids=positions)


@pytest.mark.parametrize("positions", [torch.ones(3), torch.ones(3, dtype=torch.bool)])
def test_positions_of_a_table_are_integers(positions):
    with pytest.raises(ValueError, match=r"positions must be integers \[T\]"):
        rotary_table(torch.ones(4), positions)


@pytest.mark.parametrize(
    ("longest", "error", "message"),
    [
        ((True, 4), TypeError, "max_seqlen_q must be a Python int, got bool"),
        ((-1, 4), ValueError, "max_seqlen_q must be at least 4, .* got -1"),
        ((4, 3), ValueError, "max_seqlen_k must be at least 4, the tokens of the longest .* got 3"),
    ],
)
def test_no_document_is_longer_than_the_longest_length(longest, error, message):
    x, ends = torch.zeros(6, 1, 8), torch.tensor([0, 2, 6], dtype=torch.int32)
    with pytest.raises(error, match=message):
        flash_attn_varlen_func(x, x, x, ends, ends, *longest)
    flash_attn_varlen_func(x, x, x, ends, ends, 4, 9)


def test_the_switch_reads_lengths_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.delenv(checks.SWITCH, raising=False)
    gpu = torch.empty(0, device="meta")
    assert not checks.has_values(gpu)
    assert not checks.reads_values(torch.device("cuda"))
    monkeypatch.setenv(checks.SWITCH, "1")
    assert checks.reads_values(torch.device("cuda"))
