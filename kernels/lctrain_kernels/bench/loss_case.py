"""Times linear cross-entropy beside its own matrix products and other libraries' functions."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from lctrain_kernels import linear_cross_entropy
from lctrain_kernels.bench.measure import Timer, peak_bytes_of
from lctrain_kernels.bench.record import Result
from lctrain_kernels.cross_entropy import products
from lctrain_kernels.cross_entropy.chunks import pick_chunk_tokens
from lctrain_kernels.fused_backend import FusedCall, fused_backend

PRODUCTS, OURS, SMALL = "products", "lctrain", "lctrain_small"
TITLES = {
    PRODUCTS: "its matrix products alone",
    OURS: "lctrain",
    SMALL: "lctrain, logits_bytes=2**29",
    "liger": "Liger-Kernel",
    "quack": "QuACK",
    "cce": "cut-cross-entropy",
}
DISTRIBUTIONS = {
    "liger": "liger-kernel",
    "quack": "quack-kernels",
    "cce": "cut-cross-entropy",
}
SMALL_BYTES = 2**29
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class LossCase:
    """Sizes of a linear cross-entropy that is timed.

    Attributes:
        tokens: Number of tokens T.
        vocabulary: Number of tokens in the vocabulary V.
        hidden: Width of the hidden states E.
        frozen: Whether the output embedding (head) needs no gradient.
    """

    tokens: int
    vocabulary: int
    hidden: int
    frozen: bool = False

    @property
    def name(self) -> str:
        """Name of the case in records."""
        return f"linear_cross_entropy_{self.hidden}{'_frozen' if self.frozen else ''}"

    def inputs(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Draws hidden states [T, E], the head [V, E] and labels [T], the same ones every time."""
        draw = torch.Generator(device).manual_seed(0)
        options: dict[str, Any] = {"generator": draw, "device": device}
        hidden = torch.randn(self.tokens, self.hidden, dtype=dtype, **options)
        weight = torch.randn(self.vocabulary, self.hidden, dtype=dtype, **options) * 0.02
        labels = torch.randint(self.vocabulary, (self.tokens,), **options)
        return hidden.requires_grad_(), weight.requires_grad_(not self.frozen), labels


def loss_functions() -> dict[str, Callable[[], Loss]]:
    """Returns, by contender, a function that imports the library and returns its loss function.

    A loss function takes hidden states [T, E], head [V, E] and labels [T], and returns the summed
    loss.
    """

    def liger() -> Loss:
        name = "liger_kernel.ops.fused_linear_cross_entropy"
        function = importlib.import_module(name).LigerFusedLinearCrossEntropyFunction

        def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
            options = (None, None, -100, 0.0, 0.0, "sum")  # bias, ..., reduction
            found = function.apply(hidden, weight, labels, *options)
            return found[0] if isinstance(found, tuple) else found

        return loss

    def quack() -> Loss:
        function = importlib.import_module("quack.linear_cross_entropy")
        chunked = function.chunked_linear_cross_entropy
        return lambda hidden, weight, labels: chunked(hidden, weight, labels, reduction="sum")

    def cce() -> Loss:
        function = importlib.import_module("cut_cross_entropy").linear_cross_entropy
        return lambda hidden, weight, labels: function(hidden, weight, labels, reduction="sum")

    return {
        OURS: lambda: lambda x, w, y: linear_cross_entropy(x, w, y)[0],
        SMALL: lambda: lambda x, w, y: linear_cross_entropy(x, w, y, logits_bytes=SMALL_BYTES)[0],
        "liger": liger,
        "quack": quack,
        "cce": cce,
    }


def time_losses(
    case: LossCase,
    names: Sequence[str],
    device: torch.device,
    dtype: torch.dtype,
    timer: Timer,
    repetitions: int,
) -> list[Result]:
    """Times forward and backward of each contender, in turns, on the same tensors.

    Args:
        case: Sizes of the loss.
        names: Contenders, among TITLES.
        device: Device of the tensors.
        dtype: Dtype of hidden states and head.
        timer: Function that returns the milliseconds of a call.
        repetitions: Number of turns. The result is the median.
    """
    hidden, weight, labels = case.inputs(device, dtype)
    steps: dict[str, Callable[[], object]] = {}
    memory: dict[str, int | None] = {}
    failed: list[Result] = []
    functions = loss_functions()
    gradients = sum(x.numel() * x.element_size() for x in (hidden, weight) if x.requires_grad)
    step: Callable[[], object]
    for name in names:
        try:
            if name == PRODUCTS:
                step = matrix_products(hidden.detach(), weight.detach(), case.frozen)
            else:
                step = _loss_step(functions[name](), hidden, weight, labels)
            steps[name] = step
            peak = peak_bytes_of(step, device)
            memory[name] = None if peak is None or name == PRODUCTS else peak - gradients
        except Exception as error:  # record the error and time the others
            cause = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            steps.pop(name, None)
            failed.append(Result(case.name, name, "error", cause))
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repetitions):
        for name, step in steps.items():
            times[name].append(timer(step))
    good = [
        Result(case.name, name, "ok", step_ms=median(times[name]), peak_bytes=memory[name])
        for name in steps
    ]
    return good + failed


def _loss_step(
    loss: Loss, hidden: Tensor, weight: Tensor, labels: Tensor
) -> Callable[[], tuple[Tensor, ...]]:
    leaves = [tensor for tensor in (hidden, weight) if tensor.requires_grad]
    return lambda: torch.autograd.grad(loss(hidden, weight, labels), leaves)


def matrix_products(hidden: Tensor, weight: Tensor, frozen: bool) -> Callable[[], None]:
    """Returns a function that computes the products of lctrain's loss, in its chunks.

    They are the logits, the gradient of the hidden states and, unless the head is frozen, the
    gradient of the head, summed in float32. The logits themselves stand in for their gradient.

    Args:
        hidden: Hidden states [T, E].
        weight: Output embedding [V, E].
        frozen: Whether the head needs no gradient.
    """
    device, dtype = hidden.device, hidden.dtype
    backend = fused_backend("linear_cross_entropy", FusedCall(device, dtype))
    vocabulary = weight.shape[0]
    size = (dtype if backend == "triton" else torch.float32).itemsize
    chunk = pick_chunk_tokens(hidden.shape[0], vocabulary, size, device)
    logits = products.logits_buffer(chunk, vocabulary, dtype, backend, device)
    grad = torch.empty_like(hidden)
    total = None
    if not frozen:
        total = torch.empty(weight.shape, dtype=torch.float32, device=device)

    def run() -> None:
        for start in range(0, hidden.shape[0], chunk):
            part = hidden[start : start + chunk]
            out = logits[: part.shape[0]]
            products.project(part, weight, None, out)
            products.project_back(out, weight, grad[start : start + chunk])
            if total is not None:
                products.accumulate_outer(total, out, part, first=start == 0)

    return run
