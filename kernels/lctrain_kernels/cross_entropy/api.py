"""Linear projection and cross-entropy in one operation that never holds all the logits.

The logits of T tokens over a vocabulary of V are computed for a chunk of tokens at a time and
thrown away; only two numbers per token are kept. The backward computes each chunk of logits
again, from the upstream gradient of every token, so that every reduction has exact gradients
(implementations that compute the gradient in the forward know only one upstream number). It is one
more matrix product per chunk, and in exchange nothing of size [V, E] lives between forward and
backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lctrain_kernels.cross_entropy.operators import linear_cross_entropy_forward

REDUCTIONS = ("sum", "mean", "none")
CHUNK_MULTIPLE = 128
# Bytes of one chunk of float32 logits. Each chunk of the backward reads and writes the whole
# gradient of the weight, so an accelerator takes large chunks; a CPU takes chunks near its cache.
ACCELERATOR_CHUNK_BYTES = 512 * 2**20
CPU_CHUNK_BYTES = 64 * 2**20


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float = 0.0,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "sum",
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of `labels` under `softmax(logits)`, without the [T, V] tensor of logits.

    With `z = logit_scale * (hidden @ weight.T + bias)` the logits are `z`, or
    `softcap * tanh(z / softcap)` where `softcap` is positive. Matrix products take their inputs in
    the dtype of `hidden`, or in autocast's dtype where that is on; everything else, with the sums
    over chunks in the gradients of `weight` and `bias`, is float32 (float64 for float64 inputs).
    Nothing here synchronises with an accelerator.

    Args:
        hidden: [T, E], floating point.
        weight: [V, E], the output embedding, with the dtype of `hidden` (any under autocast).
        labels: [T] int64, in [0, V) or `ignore_index`.
        bias: [V], floating point, or None. Entries of -inf remove a word from the vocabulary.
        softcap: bound of the logits as in Gemma 2; 0 turns it off.
        logit_scale: factor of the logits as in Cohere and, as `1 / logits_scaling`, Granite.
        ignore_index: label of tokens that count neither in the loss nor in the gradients.
        reduction: "sum", "mean" (over the valid tokens) or "none" (0 for ignored tokens).
        chunk_tokens: tokens whose logits exist at one time; None picks it from V.

    Returns:
        The loss, float32 (float64 for float64 inputs), 0-dim, or [T] for "none"; and the number of
        labels that are not `ignore_index`, int64 0-dim, on the device of `labels`. Without a valid
        token the loss and all gradients are 0. A token all of whose logits are -inf has an
        infinite loss and no gradient.

    Raises:
        ValueError: for arguments that do not fit together. A label outside the vocabulary is a
            ValueError on the CPU and a device-side assertion on an accelerator.
    """
    _check(hidden, weight, labels, bias, softcap, reduction, chunk_tokens)
    if chunk_tokens is None:
        chunk_tokens = pick_chunk_tokens(weight.shape[0], hidden.device.type)
    token_loss, _, _ = linear_cross_entropy_forward(
        hidden,
        weight,
        bias,
        labels,
        float(softcap),
        float(logit_scale),
        ignore_index,
        chunk_tokens,
        _matmul_dtype(hidden),
    )
    num_valid_tokens = (labels != ignore_index).sum()
    if reduction == "none":
        return token_loss, num_valid_tokens
    loss = token_loss.sum()
    if reduction == "mean":
        loss = loss / num_valid_tokens.clamp(min=1)
    return loss, num_valid_tokens


def pick_chunk_tokens(vocabulary: int, device_type: str = "cpu") -> int:
    """Tokens per chunk for which float32 logits stay within the byte budget of the device.

    Args:
        vocabulary: V.
        device_type: "cpu", or the type of an accelerator.

    Returns:
        A multiple of 128, at least 128.
    """
    budget = CPU_CHUNK_BYTES if device_type == "cpu" else ACCELERATOR_CHUNK_BYTES
    return max(budget // (4 * vocabulary) // CHUNK_MULTIPLE, 1) * CHUNK_MULTIPLE


def _matmul_dtype(hidden: Tensor) -> torch.dtype:
    """Autocast's dtype where it is on (but it leaves float64 alone), else that of `hidden`."""
    device_type = hidden.device.type
    if hidden.dtype != torch.float64 and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return hidden.dtype


def _check(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    softcap: float,
    reduction: str,
    chunk_tokens: int | None,
) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            "hidden and weight must be [T, E] and [V, E], got "
            f"{tuple(hidden.shape)} and {tuple(weight.shape)}. "
            "Flatten the batch dimensions of hidden."
        )
    if labels.shape != hidden.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"labels must be int64 of shape ({hidden.shape[0]},), got {labels.dtype} of shape "
            f"{tuple(labels.shape)}. Pass one label for each row of hidden."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}. "
            "Pass one value for each row of weight."
        )
    if not hidden.is_floating_point() or (
        hidden.dtype != weight.dtype and not torch.is_autocast_enabled(hidden.device.type)
    ):
        raise ValueError(
            "hidden and weight must have the same floating-point dtype outside autocast, got "
            f"{hidden.dtype} and {weight.dtype}. Convert one of them or use torch.autocast."
        )
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}.")
    if softcap < 0.0:
        raise ValueError(f"softcap must be at least 0, got {softcap}. Use 0 to turn it off.")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(
            f"chunk_tokens must be at least 1, got {chunk_tokens}. Use None to have it picked."
        )
