"""Tests that a token's loss has the same bits in every batch, and those of a rollout."""

import pytest
import torch

from lctrain.kernels import linear_cross_entropy
from lctrain_kernels.cross_entropy.log_probs import BatchInvariantHead
from tests.kernels.fused_cases import CASES, assert_error_at_most_twice_plain

# The row pass of Triton takes half precision.
SOME = [case for case in CASES if case.values[1:] != (torch.float32, "triton")]
devices = pytest.mark.parametrize(("device", "dtype", "backend"), SOME)
VOCABULARY = 201


def make(device, dtype):
    """Returns hidden states [40, 32], weight [201, 32], bias and labels."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, 32, generator=generator)
    weight = torch.randn(VOCABULARY, 32, generator=generator)
    bias = torch.randn(VOCABULARY, generator=generator)
    labels = torch.randint(VOCABULARY, (40,), generator=generator)
    return *(x.to(device, dtype) for x in (hidden, weight, bias)), labels.to(device)


def losses(hidden, weight, labels, backend, **options):
    options |= {"batch_invariant": True, "reduction": "none", "backend": backend}
    return linear_cross_entropy(hidden, weight, labels, **options)[0]


@pytest.mark.parametrize(
    "options", [{}, {"softcap": 5.0, "logit_scale": 0.7}], ids=["plain", "options"]
)
@devices
def test_bits_depend_on_no_other_token(device, dtype, backend, options, ordered_products):
    hidden, weight, bias, labels = make(device, dtype)
    options = {**options, "bias": bias if options else None}
    whole = losses(hidden, weight, labels, backend, **options)
    chunked = losses(hidden, weight, labels, backend, chunk_tokens=16, **options)
    assert torch.equal(chunked, whole)
    for index in ([7], [39, 0, 3], [*range(5, 30)]):
        part = losses(hidden[index], weight, labels[index], backend, **options)
        assert torch.equal(part, whole[index])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@devices
def test_a_rollout_has_the_bits_of_the_loss(device, dtype, backend, temperature, ordered_products):
    hidden, weight, bias, labels = make(device, dtype)
    options = {"bias": bias, "softcap": 8.0}
    head = BatchInvariantHead(
        weight, logit_scale=0.9, temperature=temperature, backend=backend, **options
    )
    trained = losses(hidden, weight, labels, backend, logit_scale=0.9 / temperature, **options)
    products = head.products(hidden)
    assert torch.equal(head.log_probs(products, labels), -trained)
    order = torch.tensor([8, 2, 2, 30], device=device)
    assert torch.equal(head.log_probs(products[order], labels[order]), -trained[order])
    logits = head.logits(products[:3])
    assert logits.shape == (3, VOCABULARY)
    assert logits.dtype == torch.float32
    assert float(logits.abs().max()) <= 8.0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@devices
def test_logits_without_a_distribution_give_nan(device, dtype, backend, value):
    hidden, weight, _, labels = make(device, dtype)
    head = BatchInvariantHead(weight, backend=backend)
    products = head.products(hidden[:4])
    products[1] = value
    found = head.log_probs(products, labels[:4])
    assert found.isnan().tolist() == [False, True, False, False]


@devices
def test_gradients(device, dtype, backend):
    hidden, weight, _, labels = make(device, dtype)
    assert_error_at_most_twice_plain(
        lambda x, w: losses(x, w, labels, backend if x.dtype != torch.float64 else "pytorch"),
        lambda x, w: torch.nn.functional.cross_entropy(
            (x @ w.t()).to(torch.promote_types(x.dtype, torch.float32)), labels, reduction="none"
        ),
        (hidden, weight),
        dtype,
    )


def test_an_adapter_is_refused():
    hidden, weight, _, labels = make("cpu", torch.float32)
    adapter = (torch.ones(40, 2), torch.ones(VOCABULARY, 2))
    with pytest.raises(ValueError, match="adapter must be None with batch_invariant=True"):
        linear_cross_entropy(hidden, weight, labels, adapter=adapter, batch_invariant=True)
    with pytest.raises(ValueError, match="batch_invariant must be True or False, got 1"):
        linear_cross_entropy(hidden, weight, labels, batch_invariant=1)
