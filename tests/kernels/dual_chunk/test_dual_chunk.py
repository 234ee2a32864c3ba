"""Compares dual chunk attention on a CPU, interpreted and in PyTorch, with its definition."""

import dataclasses

import pytest
import torch

from lctrain.kernels import flash_attn_varlen_func, make_schedule
from lctrain_kernels.dual_chunk.reference import dense_dual_chunk_attention, rotate
from lctrain_kernels.tile.config import TileConfig, override_configs
from tests.kernels.cases import GPU_DUAL_CHUNK_PLAIN, TINY_DUAL_CHUNK_CASES
from tests.kernels.oracle import (
    Case,
    assert_matches_oracle,
    attention,
    dense,
    equal_lengths,
    frequencies,
    make_inputs,
)
from tests.numerics import assert_equal_in_float64, assert_error_at_most_twice

pytestmark = pytest.mark.usefixtures("nan_filled_memory")
needs_interpreter = pytest.mark.skipif(
    torch.cuda.is_available(), reason="kernels run on the GPU here: test_dual_chunk_gpu.py"
)
by_case = pytest.mark.parametrize(
    "case", TINY_DUAL_CHUNK_CASES.values(), ids=TINY_DUAL_CHUNK_CASES.keys()
)
# Two heads share a key head; test_triton_matches_float64 has more heads and more key heads.
FEW_HEADS = {"heads": 2, "heads_k": 1}
BASE = (
    GPU_DUAL_CHUNK_PLAIN
    if torch.cuda.is_available()
    else dataclasses.replace(TINY_DUAL_CHUNK_CASES["boundaries"], **FEW_HEADS)
)


def backends(device: torch.device) -> list[str]:
    """Returns the backends that support half precision on this device."""
    return ["triton"] if device.type == "cuda" else ["triton", "pytorch"]


@needs_interpreter
@by_case
def test_triton_matches_float64(case):
    inputs = make_inputs(case)
    assert_matches_oracle(attention(case, inputs, backend="triton"), case, inputs)


@by_case
def test_pytorch_path_matches_float64(case):
    case = dataclasses.replace(case, dtype=torch.bfloat16)
    inputs = make_inputs(case)
    assert_matches_oracle(attention(case, inputs, backend="auto"), case, inputs)


@by_case
def test_pytorch_path_is_the_definition(case):
    """In float64 the PyTorch path and the definition agree to rounding."""
    case = dataclasses.replace(case, dtype=torch.float64)
    inputs = make_inputs(case)
    expected = dict(dense(case, inputs, torch.float64).items())
    for name, tensor in attention(case, inputs, backend="pytorch").items():
        assert_equal_in_float64(tensor, expected[name].to(tensor.dtype), name, tensor.dtype)


@by_case
def test_the_definition_of_some_queries_at_a_time(case):
    """The definition in chunks of queries, which long documents need, gives the same gradients."""
    case = dataclasses.replace(case, dtype=torch.float64, dropout_p=0.0)
    inputs = make_inputs(case)
    whole = dict(dense(case, inputs, torch.float64).items())
    for name, tensor in dense(case, inputs, torch.float64, chunk=13).items():
        assert_equal_in_float64(tensor, whole[name], name)


@pytest.mark.parametrize(("chunk_size", "local_size"), [(20, 5), (20, 0), (20, 17), (7, 3)])
def test_the_definition_is_attention_over_bounded_relative_positions(chunk_size, local_size):
    """Rotates the query of each pair by the relative position in the paper's table."""
    case = Case(equal_lengths(60), dtype=torch.float64, chunks=(chunk_size, local_size), heads_k=4)
    inputs, c = make_inputs(case), chunk_size - local_size
    position = torch.arange(60)
    q, k = inputs.q.transpose(0, 1), inputs.k.transpose(0, 1)
    inv_freq = frequencies(case, "cpu")
    at_place = [rotate(x, position % c, inv_freq).transpose(0, 1) for x in (q, k)]
    out, lse = dense_dual_chunk_attention(
        *at_place, inputs.v, inv_freq=inv_freq, chunk_size=chunk_size, local_size=local_size
    )
    logits = torch.full((4, 60, 60), float("-inf"), dtype=torch.float64)
    largest = 0
    for i in range(60):
        for j in range(i + 1):
            distance = i // c - j // c
            stands = (i % c, min(i % c + c, chunk_size), min(2 * c - 1, chunk_size))
            relative = stands[min(distance, 2)] - j % c
            largest = max(largest, relative)
            assert relative == i - j or i - j > min(local_size, c)
            turned = rotate(q[:, i : i + 1], torch.tensor([relative]), inv_freq)[:, 0]
            logits[:, i, j] = (turned * k[:, j]).sum(-1) / 4
    assert largest == min(chunk_size, 2 * c - 1)
    assert_equal_in_float64(lse, torch.logsumexp(logits, -1))
    expected = torch.einsum("hij,jhd->ihd", torch.softmax(logits, -1), inputs.v)
    assert_equal_in_float64(out, expected)


@pytest.mark.parametrize(("length", "equal"), [(24, True), (31, True), (32, False)])
def test_documents_of_up_to_chunk_size_plus_one_tokens_are_plain_attention(length, equal):
    """In float64. With chunk size S, row S + 1 is the first that differs."""
    case = Case(equal_lengths(length), dtype=torch.float64, chunks=(30, 7))
    inputs, inv_freq = make_inputs(case), frequencies(case, "cpu")
    position = torch.arange(length)
    turned = [
        [rotate(x.transpose(0, 1), places, inv_freq).transpose(0, 1) for x in (inputs.q, inputs.k)]
        for places in (position, position % 23)
    ]
    cu = inputs.cu_seqlens_q
    plain = flash_attn_varlen_func(*turned[0], inputs.v, cu, cu, length, length, causal=True)
    own = attention(case, dataclasses.replace(inputs, q=turned[1][0], k=turned[1][1])).out
    assert_equal_in_float64(own[:31], plain[:31])
    assert equal or (own[31] - plain[31]).abs().max() > 1e-4


@pytest.mark.parametrize("dropout_p", [0.0, 0.2], ids=["", "dropout"])
def test_one_chunk_has_the_bits_of_causal_attention(dropout_p, device):
    """Both kernels need equal tiles: under the interpreter always, on a GPU at D = 64."""
    case = dataclasses.replace(
        BASE, documents=equal_lengths(20, 17, 1), chunks=(30, 7), dropout_p=dropout_p
    )
    inputs = make_inputs(case, device)
    for backend in backends(device):
        own = attention(case, inputs, backend=backend)
        plain = attention(
            dataclasses.replace(case, chunks=None, causal=True), inputs, backend=backend
        )
        assert torch.equal(own.out, plain.out)
        assert torch.equal(own.lse, plain.lse)
        assert torch.equal(own.dq, plain.dq)
        assert torch.equal(own.dk, plain.dk)
        assert torch.equal(own.dv, plain.dv)


def test_logit_scale_is_a_factor_of_the_logits(device):
    """Doubling the factor equals doubling the query exactly, except for tiny float16 numbers."""
    case = dataclasses.replace(BASE, documents=equal_lengths(40), chunks=(19, 3))
    if device.type == "cpu":
        case = dataclasses.replace(case, dtype=torch.float32)
    inputs = make_inputs(case, device)
    twice = torch.full((1,), 2.0, device=device)
    for backend in backends(device):
        scaled = attention(case, inputs, logit_scale=twice, backend=backend)
        longer = attention(case, dataclasses.replace(inputs, q=inputs.q * 2), backend=backend)
        assert torch.equal(scaled.out, longer.out)
        assert torch.equal(scaled.lse, longer.lse)
        assert torch.equal(scaled.dk, longer.dk)
        assert torch.equal(scaled.dq, longer.dq * 2)


def test_a_filled_cache_gives_the_rows_of_one_full_pass(device):
    """The last queries alone, on all keys, give the last rows of the whole document."""
    case = dataclasses.replace(BASE, documents=equal_lengths(90), chunks=(30, 7))
    inputs = make_inputs(case, device)
    for backend in backends(device):
        full = attention(case, inputs, backend=backend)
        for count in (1, 40):
            piece = dataclasses.replace(case, documents=((count, 90),))
            part = dataclasses.replace(
                inputs,
                q=inputs.q[-count:],
                dout=inputs.dout[-count:],
                dlse=inputs.dlse[:, -count:],
                cu_seqlens_q=inputs.cu_seqlens_q.clamp(max=count),
            )
            result = attention(piece, part, backend=backend)
            plain = dense(piece, part, inputs.q.dtype)
            exact = dense(piece, part, torch.float64)
            assert_error_at_most_twice(result.out, plain.out, exact.out, "out")
            assert_error_at_most_twice(full.out[-count:], plain.out, exact.out, "out of the whole")
            assert_error_at_most_twice(result.lse, plain.lse, exact.lse, "lse")
            assert_error_at_most_twice(full.lse[:, -count:], plain.lse, exact.lse, "lse of whole")
            assert_error_at_most_twice(result.dq, plain.dq, exact.dq, "dq")
            assert_error_at_most_twice(full.dq[-count:], plain.dq, exact.dq, "dq of the whole")


def test_a_schedule_changes_no_bit(device):
    case = dataclasses.replace(BASE, documents=equal_lengths(40, 0, 5))
    inputs = make_inputs(case, device)
    own = attention(case, inputs, backend="triton")
    schedule = make_schedule([40, 0, 5]).to(device)
    given = dict(attention(case, inputs, schedule=schedule, backend="triton").items())
    for name, tensor in own.items():
        assert torch.equal(tensor, given[name]), name


@needs_interpreter
@pytest.mark.parametrize("share", [16, 64], ids=["smaller", "larger"])
def test_a_launch_adds_what_one_with_other_tiles_has_written(share):
    """Two launches add up dq, and dk with dv; rows that the first skips are not read."""
    case = dataclasses.replace(
        TINY_DUAL_CHUNK_CASES["many_chunks"], documents=equal_lengths(97, 24), **FEW_HEADS
    )
    inputs = make_inputs(case)
    tiles = {
        "dual_chunk_dq": TileConfig(32, 32, 4, 1, pack=2),
        "dual_chunk_dq_partial": TileConfig(share, 32, 4, 1, pack=1),
        "dual_chunk_dkv": TileConfig(16, 32, 4, 1),
        "dual_chunk_dkv_partial": TileConfig(16, share, 4, 1),
    }
    with override_configs(**tiles):
        result = attention(case, inputs, backend="triton")
    assert_matches_oracle(result, case, inputs)


def test_vectors_of_any_stride_are_read_right(device):
    """Vectors are slices of longer ones, or one number expanded to all documents."""
    case = dataclasses.replace(BASE, documents=equal_lengths(40, 17, 5), dropout_p=0.2)
    inputs = make_inputs(case, device)
    inv_freq = frequencies(case, device)
    identities = torch.tensor([7, 9, 11], dtype=torch.int32, device=device)
    every_other = {
        "inv_freq": torch.stack([inv_freq, inv_freq + 1], 1)[:, 0],
        "document_ids": torch.stack([identities, identities + 1], 1)[:, 0],
        "logit_scale": torch.tensor([1.5], device=device).expand(3),
    }
    same = {name: vector.clone() for name, vector in every_other.items()}
    same["logit_scale"] = torch.full((3,), 1.5, device=device)
    for backend in backends(device):
        strided = attention(case, inputs, backend=backend, **every_other)
        expected = dict(attention(case, inputs, backend=backend, **same).items())
        for name, tensor in strided.items():
            assert torch.equal(tensor, expected[name]), name


def test_packs_without_tokens(device):
    for documents in ((), ((0, 0), (0, 0)), ((3, 0),), ((0, 40),)):
        case = dataclasses.replace(BASE, documents=documents)
        inputs = make_inputs(case, device)
        for backend in backends(device):
            result = attention(case, inputs, backend=backend)
            assert (result.out == 0).all()
            assert (result.lse == -torch.inf).all()
            for grad in (result.dq, result.dk, result.dv):
                assert (grad == 0).all()
