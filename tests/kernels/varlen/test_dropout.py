"""Tests the dropout mask: its definition, its rate, and what does not change it."""

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lctrain.kernels import flash_attn_varlen_func
from lctrain_kernels.reference.philox import (
    ROUNDS,
    dropout_keep,
    dropout_threshold,
    keep_scale,
    philox,
)
from tests.kernels.masks import KERNELS, read_masks
from tests.kernels.oracle import DROPOUT_SEED, Case, attention, equal_lengths, make_inputs

RATES = (0.001, 0.01, 0.1, 0.5)
HAS_GPU = torch.cuda.is_available()
# Lengths cross tiles: 32 rows under the interpreter, 64 or 128 on a GPU.
LENGTHS = (120, 17, 100) if HAS_GPU else (50, 17)


def defined_mask(length: int, document_id: int, dropout_p: float, seed: int = DROPOUT_SEED):
    """Returns the reference's mask [2, L, L], on the CPU."""
    position = torch.arange(length)
    return dropout_keep(seed, document_id, torch.arange(2), position, position, dropout_p)


def assert_masks(
    masks, dropout_p, *, document_ids=None, lengths=LENGTHS, seed=DROPOUT_SEED
) -> None:
    ids = range(len(lengths)) if document_ids is None else document_ids
    for kernel in KERNELS:
        for mask, document_id, length in zip(masks[kernel], ids, lengths, strict=True):
            expected = defined_mask(length, document_id, dropout_p, seed)
            assert torch.equal(mask.cpu(), expected), f"{kernel}, document {document_id}"


def test_every_kernel_applies_the_defined_mask(device):
    assert_masks(read_masks(LENGTHS, 0.1, backend="triton", device=device), 0.1)


def test_the_pytorch_path_applies_the_defined_mask():
    masks = read_masks((50, 17), 0.1, backend="pytorch", device="cpu")
    assert_masks(masks, 0.1, lengths=(50, 17))


def test_document_ids_and_a_seed_tensor_are_the_key(device):
    """Ids exceed 2^31 as unsigned numbers, and the seed's lower 32 bits are zero."""
    ids = [-1, 123_456_789, 7][: len(LENGTHS)]
    seed = 5 << 40
    masks = read_masks(
        LENGTHS,
        0.3,
        backend="triton",
        device=device,
        dropout_seed=torch.tensor([seed], device=device),
        document_ids=torch.tensor(ids, dtype=torch.int32, device=device),
    )
    assert_masks(masks, 0.3, document_ids=ids, seed=seed)


@pytest.mark.parametrize("tile", [(32, 64, 1), (64, 32, 2)], ids=["32x64", "64x32-two_heads"])
def test_the_mask_does_not_depend_on_tiles(tile, device):
    from lctrain_kernels.tile.config import TileConfig, override_configs

    block_m, block_n, pack = tile
    by_queries = TileConfig(block_m, block_n, 4, 1, pack=pack)
    by_keys = TileConfig(block_n, block_m, 4, 1)
    with override_configs(varlen_fwd=by_queries, varlen_dq=by_queries, varlen_dkv=by_keys):
        masks = read_masks((64, 17), 0.1, backend="triton", device=device)
    assert_masks(masks, 0.1, lengths=(64, 17))


@pytest.mark.gpu
@pytest.mark.parametrize("dropout_p", RATES)
def test_every_rate_on_a_gpu(dropout_p, device):
    masks = read_masks((64, 17), dropout_p, backend="triton", device=device)
    assert_masks(masks, dropout_p, lengths=(64, 17))


@pytest.mark.gpu
@pytest.mark.parametrize("dropout_p", RATES)
def test_observed_rate_on_a_gpu(dropout_p, device):
    """Counts dropped weights in 64 documents of 64 tokens with 8 heads: two million weights."""
    case = Case(equal_lengths(*[64] * 64), heads=8, heads_k=8, head_dim=64, dtype=torch.bfloat16)
    inputs = make_inputs(case, device)
    v = torch.eye(64, device=device, dtype=torch.bfloat16).repeat(64, 1)[:, None].repeat(1, 8, 1)
    out = flash_attn_varlen_func(
        torch.zeros_like(inputs.q),
        inputs.k,
        v,
        inputs.cu_seqlens_q,
        inputs.cu_seqlens_k,
        64,
        64,
        dropout_p,
        dropout_seed=11,
    )
    dropped = (out == 0).double().mean().item()
    assert abs(dropped - dropout_p) < 3 * math.sqrt(dropout_p * (1 - dropout_p) / out.numel())


@pytest.mark.parametrize("dropout_p", RATES)
def test_observed_rate_of_the_definition(dropout_p):
    position, heads = torch.arange(512), torch.arange(8)
    keep = dropout_keep(3, 0, heads, position, position, dropout_p)
    dropped = 1 - keep.double().mean().item()
    assert abs(dropped - dropout_p) < 3 * math.sqrt(dropout_p * (1 - dropout_p) / keep.numel())


@pytest.mark.parametrize("dropout_p", [1e-6, *RATES, 0.999, 1 - 2**-20])
def test_the_rescale_uses_the_probability_that_is_applied(dropout_p):
    threshold = dropout_threshold(dropout_p)
    assert abs(threshold / 65536 - dropout_p) <= 2**-16
    kept = (65536 - threshold) / 65536
    assert kept > 0
    assert keep_scale(dropout_p) * kept == 1.0


def test_the_mean_is_unbiased(device):
    """With all values 1, out is the mean over keys of the scaled mask: 1 on average."""
    case = Case(equal_lengths(64), heads=4, heads_k=2)
    inputs = make_inputs(case, device)
    call = (torch.zeros_like(inputs.q), inputs.k, torch.ones_like(inputs.v))
    for dropout_p in (0.1, 0.5):
        out = flash_attn_varlen_func(
            *call, inputs.cu_seqlens_q, inputs.cu_seqlens_k, 64, 64, dropout_p, dropout_seed=1
        )
        weights = 4 * 64 * 64
        sigma = math.sqrt(dropout_p / (1 - dropout_p) / weights)
        assert abs(out[..., 0].double().mean().item() - 1.0) < 3 * sigma


@pytest.mark.parametrize("changed", ["seed", "seed_high", "document", "head"])
def test_masks_of_different_keys_are_independent(changed):
    """Two independent masks agree on a fraction p^2 + (1 - p)^2 of the weights."""
    position, heads = torch.arange(256), torch.arange(2)
    key = {"seed": 9, "document": 4, "heads": heads}
    other = dict(key)
    if changed == "head":
        other["heads"] = heads + 2
    elif changed == "document":
        other["document"] = 5
    else:
        other["seed"] = 10 if changed == "seed" else 9 + (1 << 32)
    masks = [
        dropout_keep(x["seed"], x["document"], x["heads"], position, position, 0.3)
        for x in (key, other)
    ]
    agreement = (masks[0] == masks[1]).double().mean().item()
    share = 0.3**2 + 0.7**2
    assert abs(agreement - share) < 3 * math.sqrt(share * (1 - share) / masks[0].numel())


def test_neighbouring_weights_are_independent():
    """Weights 8, 16 or 24 apart may share a random draw; weights 1 or 32 apart never do."""
    position = torch.arange(512)
    keep = dropout_keep(21, 0, torch.arange(2), position, position, 0.5)
    for rows, columns in ((8, 0), (0, 8), (0, 16), (8, 24), (1, 0), (0, 1), (16, 0), (0, 32)):
        left = keep[:, rows:, columns:]
        right = keep[:, : 512 - rows, : 512 - columns]
        agreement = (left == right).double().mean().item()
        assert abs(agreement - 0.5) < 3 * math.sqrt(0.25 / left.numel()), (rows, columns)


def python_philox(counter: list[int], key: list[int], rounds: int) -> list[int]:
    """Computes Philox-4x32 on Python integers, from the paper's description."""
    c, k = list(counter), list(key)
    for _ in range(rounds):
        high_0, low_0 = divmod(0xD2511F53 * c[0], 1 << 32)
        high_1, low_1 = divmod(0xCD9E8D57 * c[2], 1 << 32)
        c = [high_1 ^ c[1] ^ k[0], low_1, high_0 ^ c[3] ^ k[1], low_0]
        k = [(k[0] + 0x9E3779B9) % (1 << 32), (k[1] + 0xBB67AE85) % (1 << 32)]
    return c


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (
            [0xFFFFFFFF] * 4,
            [0xFFFFFFFF] * 2,
            [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
        ),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_the_tests_own_philox_gives_the_published_answers(counter, key, expected):
    """Random123 publishes known answers for ten rounds."""
    assert python_philox(counter, key, 10) == expected


def test_philox_equals_an_implementation_on_python_integers():
    values = torch.randint(0, 1 << 32, (6, 50))
    values[:, 0], values[:, 1] = 0, (1 << 32) - 1
    words = philox(tuple(values[:4]), tuple(values[4:]))
    for index in range(values.shape[1]):
        *counter, key_0, key_1 = values[:, index].tolist()
        expected = python_philox(counter, [key_0, key_1], ROUNDS)
        assert [int(word[index]) for word in words] == expected


def test_the_mask_takes_every_bit_of_a_draw_once():
    """Checks weight by weight that a 128-bit draw serves 8 weights, with 16 bits each."""
    seed, document, p = (7 << 32) + 11, 3, 0.5
    rows, columns = torch.tensor([0, 9, 31, 1000]), torch.tensor([0, 8, 16, 24, 37, 5000])
    keep = dropout_keep(seed, document, torch.tensor([2]), rows, columns, p)[0]
    for a, i in enumerate(rows.tolist()):
        for b, j in enumerate(columns.tolist()):
            counter = [(j >> 5) * 8 + j % 8, (i >> 4) * 8 + i % 8, 2, document]
            word = python_philox(counter, [11, 7], ROUNDS)[2 * (i >> 3 & 1) + (j >> 4 & 1)]
            draw = word >> 16 * (j >> 3 & 1) & 0xFFFF
            assert bool(keep[a, b]) == (draw >= 32768), (i, j)


def test_without_a_seed_torchs_generator_decides(device):
    case = Case(equal_lengths(20), dropout_p=0.5)
    inputs = make_inputs(case, device)
    runs = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        runs.append(attention(case, inputs, dropout_seed=None))
    for name, tensor in runs[0].items():
        assert torch.equal(tensor, getattr(runs[1], name)), name
    assert not torch.equal(runs[0].out, runs[2].out)
    assert not torch.equal(runs[2].out, attention(case, inputs, dropout_seed=None).out)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_replays_the_mask(use_reentrant, device):
    inputs = make_inputs(Case(equal_lengths(20, 9)), device)

    def call(q, k, v):
        return flash_attn_varlen_func(
            q, k, v, inputs.cu_seqlens_q, inputs.cu_seqlens_k, 20, 20, 0.4
        )

    results = []
    for wrap in (lambda *x: checkpoint(call, *x, use_reentrant=use_reentrant), call):
        leaves = [x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
        torch.manual_seed(3)
        out = wrap(*leaves)
        torch.rand(5, device=device)  # what the rest of a model draws in between
        out.backward(inputs.dout)
        results.append((out, *(leaf.grad for leaf in leaves)))
    for checkpointed, plain in zip(*results, strict=True):
        assert torch.equal(checkpointed, plain)


def test_the_operator_saves_a_seed_not_a_mask(device):
    """With dropout, autograd saves one more element: the seed."""
    inputs = make_inputs(Case(equal_lengths(64)), device)

    def saved_elements(dropout_p):
        count = 0

        def pack(tensor):
            nonlocal count
            count += tensor.numel()
            return tensor

        leaves = [x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            flash_attn_varlen_func(
                *leaves, inputs.cu_seqlens_q, inputs.cu_seqlens_k, 64, 64, dropout_p
            )
        return count

    assert saved_elements(0.1) == saved_elements(0.0) + 1
