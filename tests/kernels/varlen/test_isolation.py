"""Tests that documents do not change each other's bits, forward and backward, dropout included."""

import dataclasses
import functools

import pytest
import torch
from torch import Tensor

from lctrain.kernels import make_schedule
from tests.kernels.cases import GPU_CASES, GPU_DUAL_CHUNK_CASES, TINY_CASES
from tests.kernels.oracle import (
    Case,
    Inputs,
    Result,
    attention,
    cumulative,
    equal_lengths,
    make_inputs,
)

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

# Lengths leave tiles half full: 16 or 32 rows under the interpreter, 64 or 128 on a GPU.
if torch.cuda.is_available():
    CAUSAL = dataclasses.replace(
        GPU_CASES["D64-causal-dropout"], documents=equal_lengths(150, 0, 64, 400, 1, 129)
    )
    EVERYTHING = GPU_CASES["D128-everything-g8"]
    DUAL_CHUNK = dataclasses.replace(
        GPU_DUAL_CHUNK_CASES["D64-dropout-scale-fused_qkv"],
        documents=CAUSAL.documents,
        logit_scale=False,
        fused_qkv=False,
    )
else:
    CAUSAL = Case(equal_lengths(19, 0, 34, 5), heads=2, heads_k=1, causal=True, dropout_p=0.2)
    EVERYTHING = dataclasses.replace(
        TINY_CASES["everything"],
        documents=((19, 7), (5, 0), (34, 40), (3, 5)),
        heads=2,
        heads_k=1,
        fused_qkv=False,
    )
    DUAL_CHUNK = dataclasses.replace(CAUSAL, chunks=(14, 3), causal=False)
PACKED = pytest.mark.parametrize("case", [CAUSAL, DUAL_CHUNK], ids=["causal", "dual_chunk"])


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Returns whether two tensors have equal bits: 0 differs from -0, NaN equals NaN."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[left.element_size()]
    return left.shape == right.shape and torch.equal(
        left.contiguous().view(integers), right.contiguous().view(integers)
    )


def assert_same_bits(left: Result, right: Result, what: str) -> None:
    others = dict(right.items())
    for name, tensor in left.items():
        assert same_bits(tensor, others[name]), f"{name} of {what}"


def perturbed(inputs: Inputs, document: int, change) -> Inputs:
    """Returns the inputs with every tensor of one document changed."""
    queries = slice(*inputs.cu_seqlens_q[document : document + 2].tolist())
    keys = slice(*inputs.cu_seqlens_k[document : document + 2].tolist())
    new = {name: getattr(inputs, name).clone() for name in ("q", "k", "v", "dout", "dlse")}
    for name, rows in (("q", queries), ("k", keys), ("v", keys), ("dout", queries)):
        new[name][rows] = change(new[name][rows])
    new["dlse"][:, queries] = change(new["dlse"][:, queries])
    return dataclasses.replace(inputs, **new)


def select(inputs: Inputs, case: Case, order: list[int]) -> tuple[Case, Inputs]:
    """Returns a pack of some of the documents, in another order."""
    queries = [slice(*inputs.cu_seqlens_q[i : i + 2].tolist()) for i in order]
    keys = [slice(*inputs.cu_seqlens_k[i : i + 2].tolist()) for i in order]
    documents = tuple(case.documents[i] for i in order)
    device = inputs.q.device
    return dataclasses.replace(case, documents=documents), dataclasses.replace(
        inputs,
        q=torch.cat([inputs.q[rows] for rows in queries]),
        k=torch.cat([inputs.k[rows] for rows in keys]),
        v=torch.cat([inputs.v[rows] for rows in keys]),
        dout=torch.cat([inputs.dout[rows] for rows in queries]),
        dlse=torch.cat([inputs.dlse[:, rows] for rows in queries], dim=1),
        cu_seqlens_q=cumulative([length for length, _ in documents], device),
        cu_seqlens_k=cumulative([length for _, length in documents], device),
    )


def identities(*documents: int, device) -> Tensor:
    return torch.tensor([1000 + 7 * index for index in documents], dtype=torch.int32, device=device)


CHANGES = {
    "other-values": lambda x: 3.0 - 2.0 * x,
    "inf": lambda x: torch.full_like(x, float("inf")),
    "nan": lambda x: torch.full_like(x, float("nan")),
}
by_change = pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())


@functools.cache
def unchanged(case: Case, device: torch.device, backend: str) -> Result:
    return attention(case, make_inputs(case, device), backend=backend)


@pytest.mark.parametrize(
    "case", [CAUSAL, EVERYTHING, DUAL_CHUNK], ids=["causal-dropout", "everything", "dual_chunk"]
)
@by_change
def test_changing_one_document_leaves_the_others(case, change, device):
    """All documents share the sink, so its gradient is not compared."""
    for backend in ("triton", "pytorch") if device.type == "cpu" else ("triton",):
        for document in (2,) if device.type == "cpu" else (0, 2, 5):
            inputs = make_inputs(case, device)
            before = unchanged(case, device, backend)
            after = attention(case, perturbed(inputs, document, change), backend=backend)
            for index in range(len(case.documents)):
                own = before.document(inputs, index), after.document(inputs, index)
                if index == document:
                    assert not same_bits(own[0].out, own[1].out)
                else:
                    assert_same_bits(*own, f"document {index}")


@PACKED
def test_packed_equals_separate_in_any_order(case, device):
    """Every pack gives a document the same bits as the full pack."""
    inputs = make_inputs(case, device)
    everyone = range(len(case.documents))
    together = attention(
        case, inputs, backend="triton", document_ids=identities(*everyone, device=device)
    )
    packs = [[0], [2], [3], [3, 2, 0]]
    if device.type == "cuda":
        packs += [[4], [5], [5, 4, 3, 2, 1, 0], [3, 3, 0, 5, 5, 2, 1, 4]]
    for pack in packs:
        selected, part = select(inputs, case, pack)
        ids = identities(*pack, device=device)
        result = attention(selected, part, backend="triton", document_ids=ids)
        for place, index in enumerate(pack):
            assert_same_bits(
                result.document(part, place),
                together.document(inputs, index),
                f"document {index} in the pack {pack}",
            )


def test_options_that_change_no_bit(device):
    """Neither a schedule from the CPU nor deterministic=True changes portable kernels' results."""
    schedule = make_schedule([queries for queries, _ in CAUSAL.documents]).to(device)
    for option in ({"schedule": schedule}, {"deterministic": True}):
        result = attention(CAUSAL, make_inputs(CAUSAL, device), backend="triton", **option)
        assert_same_bits(result, unchanged(CAUSAL, device, "triton"), str(list(option)))


@pytest.mark.gpu
@PACKED
def test_two_hundred_and_fifty_repeats(case, device):
    case = dataclasses.replace(case, documents=equal_lengths(*range(1, 400, 17), 2048, 700))
    inputs = make_inputs(case, device)
    options = {} if case.chunks else {"deterministic": True}  # dual chunk attention always is
    first = attention(case, inputs, **options)
    for repeat in range(249):
        again = attention(case, inputs, **options)
        assert_same_bits(again, first, f"repeat {repeat}")
