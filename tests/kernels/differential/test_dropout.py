"""Reads the dropout masks of both branches from outputs and gradients, like masks.py.

With q = 0 every key has the weight 1 / L. With lambda = 2 a weight in out or dv is (Z1 - 2 Z2) / L,
which tells the branches' masks Z1 and Z2 apart. The signs of dq1 and dq2 show the masks of the
kernel that owns queries.
"""

import dataclasses

import pytest
import torch

from lctrain_kernels.reference.philox import dropout_keep
from tests.kernels.differential.oracle import DifferentialCase, DifferentialInputs, attention
from tests.kernels.oracle import DROPOUT_SEED, cumulative

LENGTHS = (50, 17)
HEADS, WIDTH = 2, 128


def branches_of(weights, length):
    """Returns both branches' masks from (Z1 - 2 Z2) s / L, for any scale s."""
    unit = weights.abs()[weights != 0].min()
    value = (weights / unit).round()
    assert set(value.unique().tolist()) <= {-2.0, -1.0, 0.0, 1.0}
    return (value == 1) | (value == -1), value < 0


def read_masks(backend, device, dropout_p, *, shared_k, seed=DROPOUT_SEED, document_ids=None):
    """Returns the masks [H, 2, L, L] of each document by kernel, True where a weight is kept."""
    total, longest = sum(LENGTHS), max(LENGTHS)
    case = DifferentialCase(
        tuple((length, length) for length in LENGTHS),
        heads=HEADS,
        heads_k=1,
        head_dim=WIDTH,
        value_dim=WIDTH,
        shared_k=shared_k,
        causal=False,
        dropout_p=dropout_p,
    )
    position = torch.cat([torch.arange(length) for length in LENGTHS])

    def units(columns):
        return torch.nn.functional.one_hot(columns, WIDTH).to(device, torch.float16)

    by_key = units(position)[:, None]
    by_head = units(position[:, None] + longest * torch.arange(HEADS))
    first = units(torch.zeros_like(position))[:, None]
    cu = cumulative(LENGTHS, device)
    zeros = torch.zeros_like(by_head)
    small = torch.full((HEADS, total), 0.5 / longest, device=device)
    k = torch.zeros_like(by_key)
    inputs = DifferentialInputs(
        q1=zeros,
        q2=zeros,
        k1=k,
        k2=k if shared_k else k.clone(),
        v=by_key,
        lam=torch.full((total, HEADS), 2.0, device=device),
        dout=by_head,
        dlse1=small,
        dlse2=-small,
        cu_seqlens_q=cu,
        cu_seqlens_k=cu,
    )
    options = {"backend": backend, "dropout_seed": seed, "document_ids": document_ids}
    by_value = attention(case, inputs, **options)
    inputs = dataclasses.replace(
        inputs, k1=by_key, k2=by_key, v=first, dout=first.expand(-1, HEADS, -1)
    )
    by_sign = attention(case, inputs, **options)
    masks = {"diff_fwd": [], "diff_dkv": [], "diff_dq": []}
    for index, length in enumerate(LENGTHS):
        rows = slice(*cu[index : index + 2].tolist())
        forward = by_value.out[rows, :, :length].transpose(0, 1)
        columns = [slice(head * longest, head * longest + length) for head in range(HEADS)]
        backward = torch.stack([by_value.dv[rows, 0, part].t() for part in columns])
        masks["diff_fwd"].append(torch.stack(branches_of(forward.float(), length), 1))
        masks["diff_dkv"].append(torch.stack(branches_of(backward.float(), length), 1))
        first_branch = by_sign.dq1[rows, :, :length].transpose(0, 1) > 0
        second_branch = by_sign.dq2[rows, :, :length].transpose(0, 1) < 0
        masks["diff_dq"].append(torch.stack((first_branch, second_branch), 1))
    return masks


def assert_masks(masks, dropout_p, *, seed=DROPOUT_SEED, document_ids=(0, 1)):
    for kernel, by_document in masks.items():
        for mask, document_id, length in zip(by_document, document_ids, LENGTHS, strict=True):
            position = torch.arange(length)
            keys = torch.arange(2 * HEADS)  # branch b of head h: 2 h + b
            expected = dropout_keep(seed, document_id, keys, position, position, dropout_p)
            expected = expected.unflatten(0, (HEADS, 2))
            assert torch.equal(mask.cpu(), expected), f"{kernel}, document {document_id}"


@pytest.mark.parametrize("shared_k", [False, True], ids=["v1", "v2"])
def test_every_kernel_applies_the_defined_masks(shared_k, device):
    assert_masks(read_masks("triton", device, 0.2, shared_k=shared_k), 0.2)


def test_the_pytorch_path_applies_the_defined_masks():
    assert_masks(read_masks("pytorch", "cpu", 0.2, shared_k=True), 0.2)


def test_document_ids_and_a_seed_tensor_are_the_key(device):
    ids, seed = (-1, 123_456_789), 5 << 40
    masks = read_masks(
        "triton",
        device,
        0.3,
        shared_k=True,
        seed=torch.tensor([seed], device=device),
        document_ids=torch.tensor(ids, dtype=torch.int32, device=device),
    )
    assert_masks(masks, 0.3, seed=seed, document_ids=ids)


@pytest.mark.parametrize("tile", [(32, 64, 1), (64, 32, 2)], ids=["32x64", "64x32-two_heads"])
def test_the_masks_do_not_depend_on_tiles(tile, device):
    from lctrain_kernels.tile.config import TileConfig, override_configs

    block_m, block_n, pack = tile
    by_queries = TileConfig(block_m, block_n, 4, 1, pack=pack)
    by_keys = TileConfig(block_n, block_m, 4, 1)
    with override_configs(diff_fwd=by_queries, diff_dq=by_queries, diff_dkv=by_keys):
        assert_masks(read_masks("triton", device, 0.2, shared_k=True), 0.2)
