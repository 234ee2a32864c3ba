"""Tests unpad_input and pad_input: FlashAttention's five return values, and the way back."""

import pytest
import torch

from lctrain.kernels import flash_attn_varlen_func, pad_input, unpad_input

MASK = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0], [0, 1, 0, 1]])


def test_five_values():
    rows = torch.arange(12.0).view(3, 4, 1)
    tokens, indices, cu_seqlens, max_seqlen, lengths = unpad_input(rows, MASK)
    assert tokens.flatten().tolist() == [0, 1, 2, 9, 11]
    assert indices.tolist() == [0, 1, 2, 9, 11]
    assert indices.dtype == torch.int64
    assert cu_seqlens.tolist() == [0, 3, 3, 5]
    assert cu_seqlens.dtype == lengths.dtype == torch.int32
    assert max_seqlen == 3
    assert isinstance(max_seqlen, int)
    assert lengths.tolist() == [3, 0, 2]


def test_unused_tokens_are_kept_and_not_counted():
    rows = torch.arange(12.0).view(3, 4, 1)
    unused = torch.tensor([[0, 0, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]])
    tokens, _, cu_seqlens, max_seqlen, lengths = unpad_input(rows, MASK, unused)
    assert tokens.flatten().tolist() == [0, 1, 2, 3, 8, 9, 11]
    assert cu_seqlens.tolist() == [0, 4, 4, 7]
    assert max_seqlen == 4
    assert lengths.tolist() == [3, 0, 2]


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32], ids=str)
def test_masks_of_any_dtype(dtype):
    rows = torch.randn(3, 4, 2)
    assert torch.equal(unpad_input(rows, MASK.to(dtype))[0], unpad_input(rows, MASK)[0])


def test_there_and_back(device):
    rows = torch.randn(3, 4, 2, 5, device=device)
    tokens, indices, *_ = unpad_input(rows, MASK.to(device))
    padded = pad_input(tokens, indices, 3, 4)
    assert torch.equal(padded, rows * MASK[..., None, None].to(device))


def test_gradients_go_there_and_back(device):
    rows = torch.randn(3, 4, 2, device=device, requires_grad=True)
    tokens, indices, *_ = unpad_input(rows, MASK.to(device))
    weight = torch.randn(3, 4, 2, device=device)
    (pad_input(tokens, indices, 3, 4) * weight).sum().backward()
    assert torch.equal(rows.grad, weight * MASK[..., None].to(device))


def test_known_counts_give_the_same(device):
    """Given the counts of tokens, which spares reading the mask, unpadding returns the same."""
    rows = torch.randn(3, 4, 2, device=device)
    expected = unpad_input(rows, MASK.to(device))
    actual = unpad_input(rows, MASK.to(device), num_tokens=5, max_seqlen=3)
    for left, right in zip(actual, expected, strict=True):
        assert torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right


def test_a_mask_on_the_cpu_serves_rows_on_a_device(device):
    rows = torch.randn(3, 4, 2, device=device)
    expected = unpad_input(rows, MASK.to(device))
    actual = unpad_input(rows, MASK)
    for left, right in zip(actual, expected, strict=True):
        assert torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right
        assert not isinstance(left, torch.Tensor) or left.device.type == device.type


def test_unpadded_rows_are_documents():
    """Attention over unpadded tokens equals attention over each row alone."""
    rows = torch.randn(3, 4, 2, 8, dtype=torch.float64)
    tokens, indices, cu_seqlens, longest, lengths = unpad_input(rows, MASK)
    packed = flash_attn_varlen_func(
        tokens, tokens, tokens, cu_seqlens, cu_seqlens, longest, longest, causal=True
    )
    padded = pad_input(packed, indices, 3, 4)
    for row, length in enumerate(lengths.tolist()):
        own = rows[row][MASK[row].bool()]
        cu_own = torch.tensor([0, length], dtype=torch.int32)
        alone = flash_attn_varlen_func(own, own, own, cu_own, cu_own, length, length, causal=True)
        assert torch.equal(padded[row][MASK[row].bool()], alone)


def test_a_mask_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"attention_mask must have shape \(3, 4\), got \(4, 3\)"):
        unpad_input(torch.randn(3, 4, 2), MASK.T)


@pytest.mark.parametrize("mask", [[[1, 1, 2, 0]], [[1, -1, 0, 0]], [[1.0, 0.5, 0.0, 0.0]]], ids=str)
def test_masks_of_other_values_are_refused(mask):
    with pytest.raises(
        ValueError, match=r"must hold 0 and 1 only, got .* Pass one row per document"
    ):
        unpad_input(torch.zeros(1, 4, 2), torch.tensor(mask))
