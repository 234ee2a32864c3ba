"""Tests Pack: the functions that take one, and the checks that it makes per call."""

import pytest
import torch

from lctrain.kernels import (
    diff_attn_varlen_func,
    dual_chunk_attn_varlen_func,
    flash_attn_func,
    flash_attn_varlen_func,
    make_schedule,
)
from lctrain_kernels import pack_checks
from lctrain_kernels.differential.api import diff_attn_pack_func
from lctrain_kernels.dual_chunk.api import dual_chunk_attn_pack_func
from lctrain_kernels.pack import checked_pack, rows_pack
from lctrain_kernels.varlen.api import flash_attn_pack_func

LENGTHS = (23, 0, 40, 1)
TOTAL, LONGEST = sum(LENGTHS), max(LENGTHS)
CPU = torch.device("cpu")
DROPOUT = {"dropout_p": 0.2, "dropout_seed": 5}


def boundaries():
    return torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)


def make_pack(**changes):
    cu_seqlens = boundaries()
    arguments = {
        "max_seqlen_q": LONGEST,
        "max_seqlen_k": LONGEST,
        "document_ids": torch.tensor([7, 3, 9, 4], dtype=torch.int32),
        "schedule": make_schedule(LENGTHS),
    }
    return checked_pack(cu_seqlens, cu_seqlens, TOTAL, TOTAL, CPU, **arguments | changes)


def leaves(*heads, head_dim=16):
    torch.manual_seed(0)
    return [torch.randn(TOTAL, n, head_dim, requires_grad=True) for n in heads]


def flash(pack):
    q, k, v = inputs = leaves(4, 2, 2)
    options = {"causal": True, "softcap": 3.0, "window_size": (9, 0), **DROPOUT}
    if pack is not None:
        return inputs, flash_attn_pack_func(q, k, v, pack, **options)
    cu, known = boundaries(), make_pack()
    return inputs, flash_attn_varlen_func(
        q,
        k,
        v,
        cu,
        cu,
        LONGEST,
        LONGEST,
        return_lse=True,
        document_ids=known.document_ids,
        schedule=known.schedule,
        **options,
    )


def dual_chunk(pack):
    q, k, v = inputs = leaves(4, 2, 2)
    options = {"inv_freq": torch.rand(8), "chunk_size": 12, "local_size": 3, **DROPOUT}
    if pack is not None:
        return inputs, dual_chunk_attn_pack_func(q, k, v, pack, **options)
    return inputs, dual_chunk_attn_varlen_func(
        q,
        k,
        v,
        boundaries(),
        LONGEST,
        return_lse=True,
        document_ids=make_pack().document_ids,
        **options,
    )


def differential(pack):
    q1, q2, k1, k2, v = inputs = leaves(2, 2, 1, 1, 1)
    arguments, options = (q1, q2, k1, k2, v, torch.tensor(0.3)), {"causal": True, **DROPOUT}
    if pack is not None:
        return inputs, diff_attn_pack_func(*arguments, pack, **options)
    return inputs, diff_attn_varlen_func(
        *arguments,
        boundaries(),
        LONGEST,
        return_lse=True,
        document_ids=make_pack().document_ids,
        **options,
    )


ATTENTIONS = {"flash": flash, "dual_chunk": dual_chunk, "differential": differential}


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_pack_gives_the_bits_of_the_flat_signature(attention):
    found = []
    for pack in (make_pack(), None):
        inputs, results = ATTENTIONS[attention](pack)
        torch.autograd.backward(results, [torch.ones_like(x) for x in results])
        found.append([*results, *(x.grad for x in inputs)])
    for of_pack, of_arguments in zip(*found, strict=True):
        assert torch.equal(of_pack, of_arguments)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_call_with_a_pack_does_not_validate_it_again(attention, monkeypatch):
    pack, checked = make_pack(), []
    for name in ("check_cu_seqlens", "check_document_ids", "check_schedule"):
        monkeypatch.setattr(f"lctrain_kernels.pack.{name}", lambda *_: checked.append(_))
    ATTENTIONS[attention](pack)
    assert checked == []


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_tokens_of_another_pack_are_refused(attention):
    cu_seqlens = torch.tensor([0, 5], dtype=torch.int32)
    pack = checked_pack(cu_seqlens, cu_seqlens, 5, 5, CPU, max_seqlen_q=5, max_seqlen_k=5)
    with pytest.raises(ValueError, match=r"q must hold the 5 tokens of its pack, got 64\. Build"):
        ATTENTIONS[attention](pack)


def test_tokens_on_another_device_are_refused():
    q = torch.zeros(TOTAL, 2, 16, device="meta")
    message = r"q must be on the device of its pack \(cpu\), got meta\. Move"
    with pytest.raises(ValueError, match=message):
        flash_attn_pack_func(q, q, q, make_pack())


@pytest.mark.parametrize(
    ("offsets", "error", "message"),
    [
        (
            [0, 0, 24, 0],
            ValueError,
            r"must be multiples of 16, from 0 on, got 24\. 16 queries .* of 128",
        ),
        ([-16, 0, 0, 0], ValueError, r"must be multiples of 16, from 0 on, got -16\. 16 queries"),
        ([0, 16], ValueError, r"must have shape \[4\], got \(2,\)"),
        ([0.0, 0.0, 0.0, 0.0], TypeError, r"must be int32, got torch\.float32\. Cast it"),
    ],
    ids=["24", "negative", "shape", "dtype"],
)
def test_query_offsets_are_checked(offsets, error, message):
    dtype = torch.int32 if isinstance(offsets[0], int) else torch.float32
    with pytest.raises(error, match=f"query_offsets {message}"):
        make_pack(query_offsets=torch.tensor(offsets, dtype=dtype))


def test_query_offsets_of_documents_without_queries_are_free():
    offsets = torch.tensor([16, 5, 128, 0], dtype=torch.int32)  # the second document is empty
    pack = make_pack(query_offsets=offsets)
    assert pack.tensors().query_offsets is offsets
    assert pack.tensors().with_tiles(TOTAL, TOTAL).query_offsets is offsets
    with pytest.raises(ValueError, match=r"query_offsets must be on q's device \(cpu\), got meta"):
        make_pack(query_offsets=offsets.to("meta"))


@pytest.mark.parametrize(
    ("first_head", "error"),
    [(torch.tensor(2), TypeError), (1.0, TypeError), (-1, ValueError), (2**30, ValueError)],
    ids=["tensor", "float", "negative", "large"],
)
def test_the_first_head_is_checked(first_head, error):
    q, k, v = leaves(4, 2, 2)
    message = r"first_head must be .*, got .*\. Pass the index of this rank's first query head"
    with pytest.raises(error, match=message):
        flash_attn_pack_func(q, k, v, make_pack(), first_head=first_head)


def test_one_tensor_of_boundaries_is_checked_once(monkeypatch):
    checked, check = [], pack_checks.check_cu_seqlens
    monkeypatch.setattr(
        "lctrain_kernels.pack.check_cu_seqlens",
        lambda name, *arguments: (checked.append(name), check(name, *arguments)),
    )
    make_pack()
    assert checked == ["cu_seqlens_q"]
    cu_seqlens = boundaries()
    lengths = {"max_seqlen_q": LONGEST, "max_seqlen_k": LONGEST}
    with pytest.raises(ValueError, match="cu_seqlens_k must end at the number of packed tokens"):
        checked_pack(cu_seqlens, cu_seqlens, TOTAL, TOTAL + 1, CPU, **lengths)


def test_rows_are_documents_of_equal_length():
    pack = rows_pack(3, 2, 5, CPU)
    assert pack.cu_seqlens_q.tolist() == [0, 2, 4, 6]
    assert pack.cu_seqlens_k.tolist() == [0, 5, 10, 15]
    assert pack[2:] == (6, 15, 2, 5, None, None, None)
    assert pack.documents == 3
    assert rows_pack(3, 4, 4, CPU).cu_seqlens_q is rows_pack(3, 4, 4, CPU).cu_seqlens_k


def test_ids_of_rows_are_checked():
    x = torch.zeros(2, 3, 1, 8)
    with pytest.raises(ValueError, match=r"document_ids must have shape \[2\], got \(3,\)"):
        flash_attn_func(x, x, x, document_ids=torch.zeros(3, dtype=torch.int32))
