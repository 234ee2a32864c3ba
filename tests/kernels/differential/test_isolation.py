"""Tests that documents of differential attention do not change each other's bits, with dropout."""

import dataclasses

import pytest
import torch

from lctrain.kernels import make_schedule
from tests.kernels.differential.cases import V1, V2
from tests.kernels.differential.oracle import DifferentialCase, attention, make_inputs
from tests.kernels.oracle import cumulative, equal_lengths
from tests.kernels.varlen.test_isolation import CHANGES, same_bits

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

# Lengths leave tiles half full: 16 or 32 rows under the interpreter, 64 or 128 on a GPU.
if torch.cuda.is_available():
    DOCUMENTS = equal_lengths(150, 0, 64, 400, 1, 129)
    CASES = {
        "v1": dataclasses.replace(V1, documents=DOCUMENTS, dropout_p=0.1, lam="tokens"),
        "v2": dataclasses.replace(V2, documents=DOCUMENTS, dropout_p=0.3),
    }
else:
    DOCUMENTS = equal_lengths(19, 0, 34, 5)
    CASES = {
        "v1": DifferentialCase(DOCUMENTS, heads=2, heads_k=2, dropout_p=0.2),
        "v2": DifferentialCase(DOCUMENTS, heads_k=2, value_dim=16, shared_k=True, dropout_p=0.2),
    }
by_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
PER_QUERY = ("q1", "q2", "lam", "dout")
PER_KEY = ("k1", "k2", "v")
CHANGED = 2


def assert_same_bits(left, right, what):
    others = dict(right.items())
    for name, tensor in left.items():
        assert same_bits(tensor, others[name]), f"{name} of {what}"


def rows_of(inputs, document):
    return (
        slice(*inputs.cu_seqlens_q[document : document + 2].tolist()),
        slice(*inputs.cu_seqlens_k[document : document + 2].tolist()),
    )


def perturbed(inputs, document, change):
    """Returns the inputs with every tensor of one document changed."""
    queries, keys = rows_of(inputs, document)
    new = {name: getattr(inputs, name).clone() for name in (*PER_QUERY, *PER_KEY)}
    new |= {name: getattr(inputs, name).clone() for name in ("dlse1", "dlse2")}
    for name in PER_QUERY:
        new[name][queries] = change(new[name][queries])
    for name in PER_KEY:
        new[name][keys] = change(new[name][keys])
    for name in ("dlse1", "dlse2"):
        new[name][:, queries] = change(new[name][:, queries])
    return dataclasses.replace(inputs, **new)


def select(inputs, case, order):
    """Returns a pack of some of the documents, in another order."""
    rows = [rows_of(inputs, index) for index in order]
    new = {name: torch.cat([getattr(inputs, name)[q] for q, _ in rows]) for name in PER_QUERY}
    new |= {name: torch.cat([getattr(inputs, name)[k] for _, k in rows]) for name in PER_KEY}
    for name in ("dlse1", "dlse2"):
        new[name] = torch.cat([getattr(inputs, name)[:, q] for q, _ in rows], dim=1)
    documents = tuple(case.documents[index] for index in order)
    cu = cumulative([length for length, _ in documents], inputs.q1.device)
    inputs = dataclasses.replace(inputs, **new, cu_seqlens_q=cu, cu_seqlens_k=cu)
    return dataclasses.replace(case, documents=documents), inputs


@by_case
def test_changing_one_document_leaves_the_others(case, device):
    for backend in ("triton", "pytorch") if device.type == "cpu" else ("triton",):
        inputs = make_inputs(case, device)
        before = attention(case, inputs, backend=backend)
        for change in CHANGES.values():
            after = attention(case, perturbed(inputs, CHANGED, change), backend=backend)
            for index in range(len(case.documents)):
                own = before.document(inputs, index), after.document(inputs, index)
                if index == CHANGED:
                    assert not same_bits(own[0].out, own[1].out)
                else:
                    assert_same_bits(*own, f"document {index}, {backend}")


@by_case
def test_packed_equals_separate_in_any_order(case, device):
    def identities(*documents):
        ids = [1000 + 7 * index for index in documents]
        return torch.tensor(ids, dtype=torch.int32, device=device)

    inputs = make_inputs(case, device)
    everyone = range(len(case.documents))
    together = attention(case, inputs, backend="triton", document_ids=identities(*everyone))
    for pack in [[0], [2], [3, 2, 0]]:
        part_case, part = select(inputs, case, pack)
        result = attention(part_case, part, backend="triton", document_ids=identities(*pack))
        for place, index in enumerate(pack):
            assert_same_bits(
                result.document(part, place),
                together.document(inputs, index),
                f"document {index} in the pack {pack}",
            )


def test_a_schedule_changes_no_bit(device):
    case = CASES["v2"]
    inputs = make_inputs(case, device)
    schedule = make_schedule([queries for queries, _ in case.documents]).to(device)
    with_it = attention(case, inputs, backend="triton", schedule=schedule)
    assert_same_bits(with_it, attention(case, inputs, backend="triton"), "a schedule")


@pytest.mark.gpu
@by_case
def test_two_hundred_and_fifty_repeats(case, device):
    case = dataclasses.replace(case, documents=equal_lengths(*range(1, 400, 17), 2048, 700))
    inputs = make_inputs(case, device)
    first = attention(case, inputs)
    for repeat in range(249):
        assert_same_bits(attention(case, inputs), first, f"repeat {repeat}")
