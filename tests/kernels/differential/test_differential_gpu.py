"""Tests differential attention on a GPU: float64 comparisons, long documents, recompilation."""

import dataclasses

import pytest
import torch

from lctrain.kernels import diff_attn_varlen_func, make_schedule, select_backend
from tests.kernels.differential.cases import GPU_CASES, V1, V2
from tests.kernels.differential.oracle import assert_matches_oracle, attention, make_inputs
from tests.kernels.oracle import cumulative, equal_lengths

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("nan_filled_memory")]
by_version = pytest.mark.parametrize("case", [V1, V2], ids=["v1", "v2"])


@pytest.mark.parametrize("case", GPU_CASES.values(), ids=GPU_CASES.keys())
def test_matches_float64(case, device):
    """float32 runs the PyTorch path, since a float32 lse is too coarse for its gradients."""
    inputs = make_inputs(case, device)
    backend = "auto" if case.dtype == torch.float32 else "triton"
    assert (select_backend(device, case.dtype) == "pytorch") == (backend == "auto")
    assert_matches_oracle(attention(case, inputs, backend=backend), case, inputs)


@by_version
def test_the_pytorch_path_on_a_gpu(case, device):
    inputs = make_inputs(case, device)
    assert_matches_oracle(attention(case, inputs, backend="pytorch"), case, inputs)


@by_version
def test_two_thousand_documents(case, device):
    lengths = [(37 * index) % 90 for index in range(2000)]
    case = dataclasses.replace(case, documents=equal_lengths(*lengths), lam="tokens")
    inputs = make_inputs(case, device)
    result = attention(case, inputs)
    for name, tensor in result.items():
        if not name.startswith("lse"):
            assert tensor.isfinite().all(), name
    assert_matches_oracle(result, case, inputs, sample=[1, 61, 122, 999, 1999])


@by_version
def test_a_long_document_beside_short_ones(case, device):
    """4,000 tokens give long loops, and the dense reference still fits into memory."""
    case = dataclasses.replace(case, documents=equal_lengths(20, 4001, 20), lam="tokens")
    inputs = make_inputs(case, device)
    result = attention(case, inputs)
    assert_matches_oracle(result, case, inputs, sample=[0, 1, 2])


def leaves_of(case, total, device):
    """Returns q1, q2, k1, k2, v and lam of a pack, as autograd leaves."""

    def draw(heads, width):
        shape = (total, heads, width)
        return torch.randn(shape, device=device, dtype=case.dtype, requires_grad=True)

    k1 = draw(case.heads_k, case.head_dim)
    lam = torch.rand(() if case.lam == "scalar" else (total, case.heads), device=device)
    return [
        draw(case.heads, case.head_dim),
        draw(case.heads, case.head_dim),
        k1,
        k1 if case.shared_k else draw(case.heads_k, case.head_dim),
        draw(case.heads_k, case.value_dim),
        lam.requires_grad_(),
    ]


@by_version
@pytest.mark.parametrize("dropout_p", [0.0, 0.1], ids=["plain", "dropout"])
def test_no_synchronisation(case, dropout_p, device, no_synchronisation):
    def step(lengths):
        cu = cumulative(lengths, "cpu").pin_memory().to(device, non_blocking=True)
        schedule = make_schedule(lengths).pin_memory().to(device, non_blocking=True)
        leaves = leaves_of(case, sum(lengths), device)
        out = diff_attn_varlen_func(
            *leaves, cu, max(lengths), dropout_p=dropout_p, schedule=schedule
        )
        torch.autograd.backward(out, torch.ones_like(out))

    step([70, 3, 200])  # compiles
    with no_synchronisation():
        step([70, 3, 200])
        step([5, 0, 129, 64])


def compiled_kernels() -> int:
    """Returns the number of specialisations in the caches of the differential kernels."""
    from lctrain_kernels.aot import KERNELS

    return sum(
        len(caches[0])
        for name, kernel in KERNELS.items()
        if name.startswith("diff_")
        for caches in kernel.device_caches.values()
    )


@by_version
def test_no_recompilation_over_packings(case, device):
    """Lengths, documents, tokens and dropout rates change; no kernel is compiled again."""
    counts = []
    for packing in range(20):
        lengths = [1 + packing % 17, 40 + packing, *([13] * (packing % 5))]
        leaves = leaves_of(case, sum(lengths), device)
        out = diff_attn_varlen_func(
            *leaves,
            cumulative(lengths, device),
            max(lengths),
            dropout_p=0.05 + 0.001 * packing,
            window_size=(20 + packing, -1),
        )
        torch.autograd.backward(out, torch.ones_like(out))
        counts.append(compiled_kernels())
    assert len(set(counts)) == 1, f"compiled during these packings: {counts}"
