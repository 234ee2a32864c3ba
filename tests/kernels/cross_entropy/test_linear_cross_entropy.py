import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from lctrain_kernels.cross_entropy import linear_cross_entropy
from lctrain_kernels.cross_entropy.chunks import pick_chunk_tokens
from tests.kernels.cross_entropy.plain_products import CHUNK_TOKENS, plain_linear
from tests.numerics import assert_equal_in_float64, assert_error_at_most_twice

TOKENS, HIDDEN, VOCABULARY = 37, 24, 101
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 3.0},
    "scale": {"logit_scale": 0.25},
    "all": {"bias": True, "softcap": 3.0, "logit_scale": 0.25},
}
cpu_and_gpu = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
)


def make_inputs(dtype: torch.dtype, *, bias: bool = False, device: str = "cpu") -> list:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator)
    bias_values = torch.randn(VOCABULARY, generator=generator)
    labels = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    labels[::5] = -100
    inputs = [tensor.to(device, dtype) for tensor in (hidden, weight, bias_values)]
    return [*(inputs if bias else [*inputs[:2], None]), labels.to(device)]


def full_logits_loss(
    hidden, weight, bias, labels, *, softcap=0.0, logit_scale=1.0, reduction="sum"
) -> Tensor:
    logits = plain_linear(hidden, weight, bias) * logit_scale
    if softcap > 0.0:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return functional.cross_entropy(logits, labels, ignore_index=-100, reduction=reduction)


def fused_loss(hidden, weight, bias, labels, **options) -> Tensor:
    return linear_cross_entropy(
        hidden, weight, labels, bias=bias, chunk_tokens=CHUNK_TOKENS, **options
    )[0]


def loss_and_grads(function, inputs, **options) -> list[Tensor]:
    *tensors, labels = inputs
    tensors = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    loss = function(*tensors, labels, **options)
    # A different upstream gradient for every token where there is one loss per token.
    upstream = torch.linspace(0.5, 2.0, loss.numel(), dtype=loss.dtype, device=loss.device)
    loss.backward(upstream.view_as(loss))
    return [loss.detach(), *(t.grad for t in tensors if t is not None)]


def assert_error_at_most_twice_plain(ours, plain, reference, loss_scale=None) -> None:
    names = ("loss", "hidden gradient", "weight gradient", "bias gradient")
    for our, other, exact, name in zip(ours, plain, reference, names, strict=False):
        if name == "loss" and loss_scale is not None:
            assert (our.double() - exact).abs() <= 2.0 * loss_scale
            continue
        assert_error_at_most_twice(our, other, exact, name)


def error_of_a_sum(inputs, exact, **options) -> Tensor:
    """Returns a bound on the error of a sum or mean of losses, from plain PyTorch's losses.

    Errors of single tokens have random signs and may cancel by luck, so the bound adds their
    absolute values.
    """
    reduction = options.pop("reduction", "sum")
    losses = [full_logits_loss(*side, reduction="none", **options) for side in (inputs, exact)]
    error = (losses[0].double() - losses[1]).abs().sum()
    rounding = torch.finfo(torch.float32).eps * losses[1].sum()
    scale = torch.maximum(error, rounding)
    return scale / (inputs[-1] != -100).sum() if reduction == "mean" else scale


@cpu_and_gpu
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_is_at_most_twice_that_of_full_logits(dtype, head, reduction, device) -> None:
    options = {"reduction": reduction, **HEADS[head]}
    inputs = make_inputs(dtype, bias=options.pop("bias", False), device=device)
    exact = [t if t is None or t.dtype == torch.int64 else t.double() for t in inputs]
    ours = loss_and_grads(fused_loss, inputs, **options)
    plain = loss_and_grads(full_logits_loss, inputs, **options)
    assert ours[0].dtype == torch.float32
    assert [grad.dtype for grad in ours[1:]] == [dtype] * len(ours[1:])
    scale = None if reduction == "none" else error_of_a_sum(inputs, exact, **options)
    reference = loss_and_grads(full_logits_loss, exact, **options)
    assert_error_at_most_twice_plain(ours, plain, reference, scale)


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("head", HEADS)
def test_float64_gradients_agree_with_finite_differences(head, reduction) -> None:
    options = {"reduction": reduction, **HEADS[head]}
    *tensors, labels = make_inputs(torch.float64, bias=options.pop("bias", False))
    tensors = [None if t is None else t[:9].contiguous().requires_grad_() for t in tensors]
    labels = labels[:9].clamp(max=8)
    assert torch.autograd.gradcheck(
        lambda *args: fused_loss(*args, labels, **options), tensors, fast_mode=True
    )


@cpu_and_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_takes_float32_parameters_and_returns_float32_gradients(dtype, device) -> None:
    inputs = make_inputs(torch.float32, bias=True, device=device)
    exact = [t if t.dtype == torch.int64 else t.double() for t in inputs]
    with torch.autocast(device, dtype=dtype):
        ours = loss_and_grads(fused_loss, inputs)
        plain = loss_and_grads(full_logits_loss, inputs)
        scale = error_of_a_sum(inputs, exact)
    assert all(tensor.dtype == torch.float32 for tensor in ours)
    reference = loss_and_grads(full_logits_loss, exact)
    assert_error_at_most_twice_plain(ours, plain, reference, scale)


def test_hidden_states_of_an_autocast_region_meet_float32_weights() -> None:
    hidden, weight, _, labels = make_inputs(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow, _ = linear_cross_entropy(hidden.bfloat16(), weight, labels)
        wide, _ = linear_cross_entropy(hidden, weight, labels)
    assert torch.equal(narrow, wide)


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_without_a_valid_token_gradients_are_zero_and_a_mean_is_nan(reduction) -> None:
    inputs = make_inputs(torch.float32, bias=True)
    inputs[-1].fill_(-100)
    loss, *gradients = loss_and_grads(fused_loss, inputs, reduction=reduction)
    assert loss.isnan().all() if reduction == "mean" else not loss.any()
    for tensor in gradients:
        assert torch.equal(tensor, torch.zeros_like(tensor))


def test_no_tokens_at_all() -> None:
    inputs = make_inputs(torch.float32)
    inputs[0], inputs[-1] = inputs[0][:0], inputs[-1][:0]
    loss, hidden_grad, weight_grad = loss_and_grads(fused_loss, inputs)
    assert loss.item() == 0.0
    assert hidden_grad.shape == (0, HIDDEN)
    assert torch.equal(weight_grad, torch.zeros_like(weight_grad))


def test_number_of_valid_tokens_is_an_integer_tensor() -> None:
    hidden, weight, _, labels = make_inputs(torch.float32)
    _, count = linear_cross_entropy(hidden, weight, labels)
    assert count.dtype == torch.int64
    assert count.item() == (labels != -100).sum().item()


def test_ignored_tokens_may_hold_nan() -> None:
    inputs = make_inputs(torch.float32, bias=True)
    clean = loss_and_grads(fused_loss, inputs)
    inputs[0][inputs[-1] == -100] = torch.nan
    for tensor, expected in zip(loss_and_grads(fused_loss, inputs), clean, strict=True):
        assert torch.equal(tensor, expected)


def test_any_ignore_index() -> None:
    hidden, weight, _, labels = make_inputs(torch.float32)
    expected = linear_cross_entropy(hidden, weight, labels)
    ignored = labels.masked_fill(labels == -100, 7)
    kept = labels != 7
    loss, count = linear_cross_entropy(hidden, weight, ignored, ignore_index=7)
    reference, _ = linear_cross_entropy(hidden, weight, labels.masked_fill(~kept, -100))
    assert count.item() == (ignored != 7).sum().item() <= expected[1].item()
    assert torch.equal(loss, reference)


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
def test_masked_vocabulary_gives_no_nan(dtype) -> None:
    inputs = make_inputs(dtype, bias=True)
    masked = slice(VOCABULARY // 2, VOCABULARY)
    inputs[-1] = inputs[-1].clamp(max=VOCABULARY // 2 - 1)
    inputs[2][masked] = -torch.inf
    loss, *grads = loss_and_grads(fused_loss, inputs)
    assert loss.isfinite()
    assert all(grad.isfinite().all() for grad in grads)
    assert torch.equal(grads[1][masked], torch.zeros_like(grads[1][masked]))
    assert torch.equal(grads[2][masked], torch.zeros_like(grads[2][masked]))


@pytest.mark.parametrize("masked", [slice(None), slice(0, 1)], ids=["every-word", "the-target"])
def test_impossible_target_has_infinite_loss_and_finite_gradients(masked) -> None:
    inputs = make_inputs(torch.float32, bias=True)
    inputs[-1][:] = 0
    inputs[2][masked] = -torch.inf
    loss, *grads = loss_and_grads(fused_loss, inputs)
    assert loss.item() == torch.inf
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_vocabulary_blocks_do_not_change_the_result(dtype, monkeypatch) -> None:
    inputs = make_inputs(dtype, bias=True)
    monkeypatch.setattr("lctrain_kernels.cross_entropy.products.VOCABULARY_BLOCK", 32)
    exact = [t if t.dtype == torch.int64 else t.double() for t in inputs]
    plain = loss_and_grads(full_logits_loss, inputs)
    reference = loss_and_grads(full_logits_loss, exact)
    blocks = loss_and_grads(fused_loss, inputs)
    assert_error_at_most_twice_plain(blocks, plain, reference)


@pytest.mark.parametrize("chunk_tokens", [1, 8, TOKENS, 1000, None])
def test_chunk_size_does_not_change_the_result(chunk_tokens) -> None:
    *tensors, labels = make_inputs(torch.float64)
    losses, grads = [], []
    for size in (chunk_tokens, 5):
        hidden, weight = (t.clone().requires_grad_() for t in tensors[:2])
        loss, _ = linear_cross_entropy(hidden, weight, labels, chunk_tokens=size)
        loss.backward()
        losses.append(loss.detach())
        grads.append((hidden.grad, weight.grad))
    assert_equal_in_float64(losses[0], losses[1])
    assert_equal_in_float64(grads[0], grads[1])


def test_weight_gradient_accumulates_over_chunks_in_float32() -> None:
    """In bfloat16 a sum of 1,000 equal terms would stop growing long before its end."""
    hidden = torch.ones(1000, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.zeros(1000, dtype=torch.int64)
    linear_cross_entropy(hidden, weight, labels, chunk_tokens=1)[0].backward()
    assert weight.grad.flatten().tolist() == [-500.0, 500.0]


def test_only_needed_gradients_are_computed() -> None:
    for needs in itertools.product([False, True], repeat=3):
        *tensors, labels = make_inputs(torch.float32, bias=True)
        for tensor, needed in zip(tensors, needs, strict=True):
            tensor.requires_grad_(needed)
        loss = fused_loss(*tensors, labels)
        assert loss.requires_grad == any(needs)
        if any(needs):
            loss.backward()
        assert [tensor.grad is not None for tensor in tensors] == list(needs)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_gradients(use_reentrant) -> None:
    inputs = make_inputs(torch.float32, bias=True)

    def checkpointed(*args: Tensor) -> Tensor:
        return checkpoint(fused_loss, *args, use_reentrant=use_reentrant)

    expected = loss_and_grads(fused_loss, inputs)
    for tensor, other in zip(loss_and_grads(checkpointed, inputs), expected, strict=True):
        assert torch.equal(tensor, other)


def test_used_twice_in_one_graph_gradients_add() -> None:
    hidden, weight, _, labels = make_inputs(torch.float64)
    weight.requires_grad_()
    loss = fused_loss(hidden, weight, None, labels)
    (loss + fused_loss(2 * hidden, weight, None, labels)).backward()
    exact = weight.detach().clone().requires_grad_()
    loss = full_logits_loss(hidden, exact, None, labels)
    (loss + full_logits_loss(2 * hidden, exact, None, labels)).backward()
    assert_equal_in_float64(weight.grad, exact.grad)


def test_compiled_graph_has_no_break() -> None:
    inputs = make_inputs(torch.float32, bias=True)
    compiled = torch.compile(fused_loss, fullgraph=True, backend="aot_eager")
    expected = loss_and_grads(fused_loss, inputs)
    for tensor, other in zip(loss_and_grads(compiled, inputs), expected, strict=True):
        assert torch.equal(tensor, other)


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_operators_satisfy_the_rules_of_torch_library(batch_invariant) -> None:
    hidden, weight, bias, labels = make_inputs(torch.float32, bias=True)
    tensors = (hidden, weight.requires_grad_(), bias, None, None, labels)
    options = (3.0, 0.5, -100, 0.1, 0.01, 0, VOCABULARY, "", 8, torch.float32)
    options = (*options, batch_invariant, "pytorch")
    needs = [False, True, False, False, False]
    opcheck = torch.library.opcheck
    opcheck(torch.ops.lctrain.linear_cross_entropy_sum.default, (*tensors, None, needs, *options))
    opcheck(torch.ops.lctrain.linear_cross_entropy_tokens.default, (*tensors, *options))


@pytest.mark.gpu
def test_no_synchronisation_with_the_device() -> None:
    inputs = make_inputs(torch.bfloat16, bias=True, device="cuda")
    loss_and_grads(fused_loss, inputs, reduction="mean")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss_and_grads(fused_loss, inputs, reduction="mean")
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_chunk_bounds_the_memory_of_the_logits() -> None:
    for vocabulary in (50_257, 128_256, 262_144):
        for budget in (None, 2**29):
            tokens = pick_chunk_tokens(32768, vocabulary, 4, torch.device("cpu"), budget)
            assert tokens == 128 or tokens * vocabulary * 4 <= (budget or 64 * 2**20)
            assert tokens % 128 == 0


def test_chunks_are_of_equal_size() -> None:
    device, budget = torch.device("cpu"), 2 * 2**30
    assert pick_chunk_tokens(32768, 128_256, 2, device, budget) == 8192
    assert pick_chunk_tokens(9000, 128_256, 2, device, budget) == 4608
    assert pick_chunk_tokens(5, 128_256, 2, device, budget) == 128


def test_peak_memory_is_a_chunk_and_not_all_logits() -> None:
    tokens, vocabulary, hidden_size = 2048, 4096, 8
    hidden = torch.randn(tokens, hidden_size, requires_grad=True)
    weight = torch.randn(vocabulary, hidden_size, requires_grad=True)
    labels = torch.randint(vocabulary, (tokens,))
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        linear_cross_entropy(hidden, weight, labels, chunk_tokens=128)[0].backward()
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    assert 0 < peak < tokens * vocabulary * 4 / 2


BAD_INPUTS = {
    "flat-hidden": ({"hidden": torch.ones(4)}, "hidden and weight must be"),
    "hidden-size": ({"hidden": torch.ones(4, 2)}, "hidden and weight must be"),
    "dtypes": ({"hidden": torch.ones(4, 3, dtype=torch.bfloat16)}, "same floating-point dtype"),
    "integers": ({"hidden": torch.ones(4, 3, dtype=torch.int64)}, "same floating-point dtype"),
    "label-count": ({"labels": torch.zeros(3, dtype=torch.int64)}, "labels must be int64"),
    "label-dtype": ({"labels": torch.zeros(4)}, "labels must be int64"),
    "label-high": ({"labels": torch.tensor([0, 5, -100, 1])}, "got 5 at position 1"),
    "label-negative": ({"labels": torch.tensor([0, 1, -1, 1])}, "got -1 at position 2"),
    "bias": ({"bias": torch.ones(4)}, "bias must have shape"),
    "reduction": ({"reduction": "median"}, "reduction must be one of sum, mean, none"),
    "softcap": ({"softcap": -1.0}, "softcap must be at least 0"),
    "smoothing": ({"label_smoothing": 1.0}, "label_smoothing must lie in"),
    "z-loss": ({"z_loss": -1.0}, "z_loss must be at least 0"),
    "bytes": ({"logits_bytes": 0}, "logits_bytes must be at least 1"),
    "weights": ({"token_weights": torch.ones(3)}, "token_weights must be floating point"),
    "weights-gradient": (
        {"token_weights": torch.ones(4, requires_grad=True)},
        "token_weights must be constant",
    ),
    "adapter": ({"adapter": (torch.ones(4, 2), torch.ones(4, 2))}, "adapter must be"),
    "backend": ({"backend": "cuda"}, "backend must be one of"),
    "backend-dtype": (
        {"backend": "triton"},
        "does not serve products of torch.float32, but of half",
    ),
    "chunk": ({"chunk_tokens": 0}, "chunk_tokens must be at least 1"),
}


@pytest.mark.parametrize(("change", "message"), BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_input_is_an_error_that_names_it(change, message) -> None:
    arguments = {
        "hidden": torch.ones(4, 3),
        "weight": torch.ones(5, 3),
        "labels": torch.zeros(4, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**{**arguments, **change})
