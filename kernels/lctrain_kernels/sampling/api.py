"""most_probable, draw: a token per row of logits, and its log-probability."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lctrain_kernels.checks import require_tensors
from lctrain_kernels.fused_backend import FusedCall, fused_backend, triton_refuses
from lctrain_kernels.registry import FORWARD, implementation, implements


@torch._disable_dynamo
def most_probable(logits: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Returns the token with the largest logit of each row, and its log-probability.

    The first one of equal logits is taken. One kernel reads the logits in place of three that
    convert them, take their softmax, and look for the largest one. The call has no backward.

    Args:
        logits: Logits [B, V], floating point.
        backend: Implementation: "auto", "triton" or "pytorch".

    Returns:
        Tokens [B] int64 and their log-probabilities [B], float32 or the dtype of wider logits. The
        log-probability is NaN where the logits give no distribution: one is NaN or +inf, or all
        are -inf. The token means nothing then, but is one of the vocabulary.

    Raises:
        ValueError: if the logits are not [B, V] with a column, or `backend` does not serve them.
    """
    _check(logits)
    chosen = fused_backend("most_probable", FusedCall(logits.device, logits.dtype), backend)
    found: tuple[Tensor, Tensor] = implementation("most_probable", FORWARD, chosen)(
        logits.detach() if logits.requires_grad else logits
    )
    return found


def draws_on(logits: Tensor) -> bool:
    """Returns whether `draw` serves logits: on a GPU, in at most 32 bits."""
    return fused_backend("draw", FusedCall(logits.device, logits.dtype)) == "triton"


@torch._disable_dynamo
def draw(
    logits: Tensor, keys: Tensor, numbers: Tensor, temperature: float = 1.0, top_p: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Returns a token per row that is drawn from the softmax, and its log-probability.

    One kernel adds Gumbel noise to the logits and looks for the largest sum. The noise is that of
    `lctrain.generation.noise`, a function of a row's keys and of the word, up to rounding. There is
    a Triton kernel only: see draws_on.

    Args:
        logits: Logits [B, V], floating point.
        keys: Keys of each row's draw, [B, 3] int32.
        numbers: A random number of 32 bits for each word, [V] int32.
        temperature: Divisor of the logits, above 0.
        top_p: The fewest most probable tokens whose probabilities sum to this may be drawn.

    Returns:
        Tokens [B] int64, and their log-probabilities [B] float32 in the softmax over the
        temperature, before top_p. The latter are NaN where the logits give no distribution; the
        token means nothing then, but is one of the vocabulary.

    Raises:
        ValueError: if shapes or dtypes do not fit, or there is no kernel for the logits.
    """
    _check(logits)
    require_tensors(keys=keys, numbers=numbers)
    rows, words = logits.shape
    for name, tensor, shape in (("keys", keys, (rows, 3)), ("numbers", numbers, (words,))):
        if tensor.shape != shape or tensor.dtype != torch.int32:
            raise ValueError(
                f"{name} must be int32 of shape {shape}, got {tensor.dtype} of shape "
                f"{tuple(tensor.shape)}. Make them with lctrain.generation.noise."
            )
    if not (temperature > 0 and 0 < top_p <= 1):
        raise ValueError(
            f"temperature and top_p must be above 0, and top_p at most 1, got {temperature} and "
            f"{top_p}. most_probable chooses at temperature 0."
        )
    call = FusedCall(logits.device, logits.dtype)
    run = implementation("draw", FORWARD, fused_backend("draw", call, "triton"))
    found: tuple[Tensor, Tensor] = run(
        logits.detach() if logits.requires_grad else logits, keys, numbers, temperature, top_p
    )
    return found


def _check(logits: Tensor) -> None:
    """Raises a ValueError unless logits are [B, V] with a column."""
    require_tensors(logits=logits)
    if logits.dim() != 2 or not logits.shape[1] or not logits.is_floating_point():
        raise ValueError(
            f"logits must be floating point [B, V], got {logits.dtype} of shape "
            f"{tuple(logits.shape)}. Pass one row per token to choose."
        )


@implements("draw", FORWARD, "triton", triton_refuses())
def _triton_draw(*arguments: Any) -> tuple[Tensor, Tensor]:
    from lctrain_kernels.sampling import launch

    return launch.draw(*arguments)


@implements("most_probable", FORWARD, "triton", triton_refuses())
def _triton(logits: Tensor) -> tuple[Tensor, Tensor]:
    from lctrain_kernels.sampling import launch

    return launch.most_probable(logits)


@implements("most_probable", FORWARD, "pytorch")
def _pytorch(logits: Tensor) -> tuple[Tensor, Tensor]:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    tokens = logits.argmax(-1)
    return tokens, torch.log_softmax(logits, -1).gather(-1, tokens[:, None])[:, 0]
