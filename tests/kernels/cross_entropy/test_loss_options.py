"""Tests the options of the loss (z-loss, smoothing, weights, adapters) and its Triton kernel."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from lctrain_kernels.cross_entropy import linear_cross_entropy
from tests.kernels.cross_entropy.plain_products import CHUNK_TOKENS, plain_linear
from tests.numerics import assert_equal_in_float64, assert_error_at_most_twice, near_roundings

TOKENS, HIDDEN, VOCABULARY, RANK = 37, 24, 101, 4
OPTIONS = {
    "smoothing": {"label_smoothing": 0.1},
    "z-loss": {"z_loss": 0.01},
    "weights": {"weighted": True},
    "adapter": {"adapter": True},
    "all": {
        "bias": True,
        "softcap": 3.0,
        "logit_scale": 0.25,
        "label_smoothing": 0.1,
        "z_loss": 0.01,
        "weighted": True,
        "adapter": True,
    },
}
# Triton's interpreter has no bfloat16 products and cuts instead of rounding to it.
CASES = [
    pytest.param("cpu", torch.float32, "auto", id="float32"),
    pytest.param("cpu", torch.bfloat16, "auto", id="bfloat16"),
    pytest.param("cpu", torch.float16, "triton", id="triton-float16"),
    pytest.param("cuda", torch.bfloat16, "auto", id="gpu-bfloat16", marks=pytest.mark.gpu),
    pytest.param("cuda", torch.float16, "auto", id="gpu-float16", marks=pytest.mark.gpu),
    pytest.param("cuda", torch.float32, "auto", id="gpu-float32", marks=pytest.mark.gpu),
]


def tensors_and_labels(device: str) -> tuple[list[Tensor], Tensor, Tensor]:
    """Returns [hidden, weight, bias, low, up], labels, and token weights; all random."""
    shapes = ((TOKENS, HIDDEN), (VOCABULARY, HIDDEN), (VOCABULARY,), (TOKENS, RANK))
    tensors = [torch.randn(shape) for shape in (*shapes, (VOCABULARY, RANK))]
    labels = torch.randint(VOCABULARY, (TOKENS,))
    labels[::5] = -100
    return [t.to(device) for t in tensors], labels.to(device), torch.rand(TOKENS).to(device)


def full_logits(tensors, labels, weights, *, reduction, softcap=0.0, logit_scale=1.0, **options):
    hidden, weight, bias, low, up = tensors
    logits = plain_linear(hidden, weight, bias if options.get("bias") else None)
    if options.get("adapter"):
        logits = logits + low @ up.t()
    logits = logits * logit_scale
    if softcap > 0.0:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    smoothing = options.get("label_smoothing", 0.0)
    loss = functional.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
    squared = logits.logsumexp(-1).square().masked_fill(labels == -100, 0.0)
    loss = loss + options.get("z_loss", 0.0) * squared
    if options.get("weighted"):
        loss = loss * weights.to(loss.dtype)
    return loss if reduction == "none" else loss.sum() / divisor(labels, reduction)


def divisor(labels, reduction):
    return (labels != -100).sum() if reduction == "mean" else 1


def fused(tensors, labels, weights, *, backend, **options):
    hidden, weight, bias, low, up = tensors
    return linear_cross_entropy(
        hidden,
        weight,
        labels,
        bias=bias if options.pop("bias", False) else None,
        adapter=(low, up) if options.pop("adapter", False) else None,
        token_weights=weights if options.pop("weighted", False) else None,
        chunk_tokens=CHUNK_TOKENS,
        backend=backend,
        **options,
    )[0]


def loss_and_grads(function, tensors, *args, **options) -> list[Tensor]:
    tensors = [t.detach().clone().requires_grad_() for t in tensors]
    loss = function(tensors, *args, **options)
    # Different for every token where there is one loss per token, else a number that is not 1.
    upstream = torch.linspace(0.5, 2.0, loss.numel() + 1, dtype=loss.dtype, device=loss.device)
    upstream = upstream[1:].view_as(loss) if loss.dim() else upstream[0]
    grads = torch.autograd.grad(loss, tensors, upstream, allow_unused=True)
    return [loss.detach(), *(grad for grad in grads if grad is not None)]


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("device", "dtype", "backend"), CASES)
def test_error_is_at_most_twice_that_of_full_logits(
    device, dtype, backend, options, reduction
) -> None:
    tensors, labels, weights = tensors_and_labels(device)
    tensors = [t.to(dtype) for t in tensors]
    args = (labels, weights)
    ours = loss_and_grads(fused, tensors, *args, reduction=reduction, backend=backend, **options)
    plain = loss_and_grads(full_logits, tensors, *args, reduction=reduction, **options)
    exact = [t.double() for t in tensors]
    reference = loss_and_grads(full_logits, exact, *args, reduction=reduction, **options)
    # The error of one number is luck; the losses of the tokens are judged under "none".
    first = 0 if reduction == "none" else 1
    for our, other, true in list(zip(ours, plain, reference, strict=True))[first:]:
        assert_error_at_most_twice(our, other, true)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_all_options_agree_with_finite_differences(reduction) -> None:
    tensors, labels, weights = tensors_and_labels("cpu")
    tensors = [t.double().requires_grad_() for t in tensors]
    options = OPTIONS["all"] | {"reduction": reduction, "backend": "auto"}
    assert torch.autograd.gradcheck(
        lambda *args: fused(args, labels, weights, **options), tensors, fast_mode=True
    )


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_confident_rows_keep_their_gradient(backend) -> None:
    """The probability 0.999 rounds to 1 in bfloat16, but its gradient, -0.001, is not 0."""
    weight = torch.eye(4, 8, dtype=torch.float16).requires_grad_()
    hidden = torch.zeros(3, 8, dtype=torch.float16)
    hidden[:, 0] = 8.0
    labels = torch.zeros(3, dtype=torch.int64)
    linear_cross_entropy(hidden, weight, labels, backend=backend)[0].backward()
    logits = (hidden.double() @ weight.detach().double().t()).requires_grad_()
    functional.cross_entropy(logits, labels, reduction="sum").backward()
    expected = logits.grad.t() @ hidden.double()
    assert 0.0 < expected.abs().max() < 0.1
    # Logits' gradients and their sum are rounded to float16; 1 - p loses 2^-24 of 0.001 before.
    found = weight.grad.flatten().tolist()
    assert found == near_roundings(expected.flatten().tolist(), 3, torch.float16)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_lse_is_the_normaliser_of_each_token(reduction) -> None:
    tensors, labels, _ = tensors_and_labels("cpu")
    hidden, weight = tensors[:2]
    _, _, lse = linear_cross_entropy(
        hidden, weight, labels, reduction=reduction, return_lse=True, chunk_tokens=8
    )
    plain, exact = (
        (h @ w.t()).logsumexp(-1).masked_fill(labels == -100, 0.0)
        for h, w in ((hidden, weight), (hidden.double(), weight.double()))
    )
    assert_error_at_most_twice(lse, plain, exact)


def test_lse_of_none_carries_gradients() -> None:
    tensors, labels, _ = tensors_and_labels("cpu")
    hidden, weight = (t.double().requires_grad_() for t in tensors[:2])
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(
            h, w, labels, reduction="none", return_lse=True, chunk_tokens=8
        )[::2],
        (hidden, weight),
        fast_mode=True,
    )


def test_frozen_head_takes_no_memory_of_its_size() -> None:
    hidden = torch.randn(4, 8, requires_grad=True)
    loss, _ = linear_cross_entropy(hidden, torch.randn(5000, 8), torch.zeros(4, dtype=torch.int64))
    saved = [t for t in loss.grad_fn.saved_tensors if t is not None]
    assert max(t.numel() for t in saved) == hidden.numel()


def test_frozen_hidden_states_train_the_head() -> None:
    tensors, labels, _ = tensors_and_labels("cpu")
    hidden, weight = tensors[0].double(), tensors[1].double().requires_grad_()
    linear_cross_entropy(hidden, weight, labels)[0].backward()
    expected = weight.detach().clone().requires_grad_()
    functional.cross_entropy(hidden @ expected.t(), labels, reduction="sum").backward()
    assert_equal_in_float64(weight.grad, expected.grad)


def test_backward_twice_gives_the_same_gradients() -> None:
    tensors, labels, _ = tensors_and_labels("cpu")
    hidden, weight = (t.requires_grad_() for t in tensors[:2])
    loss, _ = linear_cross_entropy(hidden, weight, labels, reduction="mean")
    first = torch.autograd.grad(3.0 * loss, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(3.0 * loss, (hidden, weight))
    for grad, other in zip(first, second, strict=True):
        assert torch.equal(grad, other)


def test_tied_embeddings_get_both_gradients() -> None:
    embedding = torch.randn(VOCABULARY, HIDDEN, dtype=torch.float64, requires_grad=True)
    tokens, labels = torch.randint(VOCABULARY, (2, TOKENS)).unbind()
    linear_cross_entropy(functional.embedding(tokens, embedding), embedding, labels)[0].backward()
    tied = embedding.detach().clone().requires_grad_()
    logits = functional.embedding(tokens, tied) @ tied.t()
    functional.cross_entropy(logits, labels, reduction="sum").backward()
    assert_equal_in_float64(embedding.grad, tied.grad)


def test_weight_of_zero_silences_an_impossible_target() -> None:
    hidden, weight = torch.randn(2, 4), torch.randn(3, 4)
    bias = torch.tensor([-torch.inf, 0.0, 0.0])
    loss, _ = linear_cross_entropy(
        hidden, weight, torch.tensor([0, 1]), bias=bias, token_weights=torch.tensor([0.0, 1.0])
    )
    assert loss.isfinite()


@pytest.mark.gpu
def test_more_logits_than_int32_counts() -> None:
    tokens, vocabulary = 20_000, 131_072  # 2.6 e9 logits, and as many bytes in half precision
    hidden = torch.randn(tokens, 16, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocabulary, 16, device="cuda", dtype=torch.bfloat16)
    labels = torch.randint(vocabulary, (tokens,), device="cuda")
    options = {"chunk_tokens": tokens}
    loss, _ = linear_cross_entropy(hidden, weight, labels, **options)
    (grad,) = torch.autograd.grad(loss, hidden)
    tail = hidden[-64:].detach().requires_grad_()
    logits = tail.float() @ weight.float().t()
    functional.cross_entropy(logits, labels[-64:], reduction="sum").backward()
    difference = (grad[-64:].float() - tail.grad.float()).norm() / tail.grad.float().norm()
    assert difference < 5 * torch.finfo(torch.bfloat16).eps / 2  # a few roundings of bfloat16
