"""linear_cross_entropy: argument checks, options and reductions.

The reductions "sum" and "mean" compute the gradients in the forward; the backward scales them by
the upstream gradient, which is one number. The reduction "none" has an upstream gradient for every
token, so its backward computes each chunk of logits again. No tensor of shape [T, V] is ever
allocated.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lctrain_kernels.checks import require_tensors
from lctrain_kernels.cross_entropy.chunks import pick_chunk_tokens
from lctrain_kernels.cross_entropy.mean import mean_over
from lctrain_kernels.cross_entropy.operators import cross_entropy_sum, cross_entropy_tokens
from lctrain_kernels.cross_entropy.options import LossOptions, VocabularyShard
from lctrain_kernels.fused_backend import FusedCall, fused_backend

REDUCTIONS = ("sum", "mean", "none")


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
    logits_bytes: int | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    token_weights: Tensor | None = None,
    adapter: tuple[Tensor, Tensor] | None = None,
    shard: VocabularyShard | None = None,
    return_lse: bool = False,
    batch_invariant: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, ...]:
    """Returns the cross-entropy of `hidden @ weight.T` and `labels`, without storing all logits.

    With `z = logit_scale * (hidden @ weight.T + bias)` the logits are `z`, or
    `softcap * tanh(z / softcap)` if `softcap` is positive. T is the number of tokens, E the hidden
    size, V the vocabulary size.

    Inputs of matrix products have the dtype of `hidden`, or autocast's dtype under autocast. On a
    GPU half-precision inputs give half-precision logits. All other arithmetic is float32 (float64
    for float64 inputs), also the sums over tokens in the gradients of `weight` and `bias`. The
    function never synchronises with a GPU.

    Args:
        hidden: Hidden states [T, E], floating point.
        weight: Output embedding [V, E], in the dtype of `hidden` (any dtype under autocast). If it
            needs no gradient, one product and a buffer of its size are saved.
        labels: Token ids [T] int64, in [0, V) or `ignore_index`.
        bias: Bias of the logits, [V], floating point, or None. An entry of -inf removes a token
            from the vocabulary.
        softcap: Bound of the logits as in Gemma 2; 0 turns it off.
        logit_scale: Factor of the logits. Cohere calls it `logit_scale`; Granite's
            `logits_scaling` is its inverse.
        ignore_index: Label of tokens that have no part in the loss and in the gradients.
        reduction: "sum", "mean" over the tokens that are not ignored, or "none", which gives
            ignored tokens a loss of 0.
        chunk_tokens: Number of tokens per chunk of logits; None derives it from `logits_bytes`.
        logits_bytes: Size of a chunk of logits, in bytes. None takes 64 MiB on a CPU. On a GPU
            None takes 2 GiB, or a quarter of the memory that is free at the first call if that is
            less.
        label_smoothing: Fraction of the target's probability that is spread over the vocabulary, in
            [0, 1), as in torch.nn.functional.cross_entropy.
        z_loss: Factor of the squared logsumexp that each token adds to the loss.
        token_weights: Constant factor of each token's loss, [T], floating point, or None. "mean"
            still divides by the number of tokens that are not ignored.
        adapter: Low-rank adapter (low [T, R], up [V, R]) of the output embedding, as in LoRA:
            `low @ up.T` is added to `hidden @ weight.T`.
        shard: Rows of the output embedding on this rank, if the vocabulary is divided over ranks.
        return_lse: Whether to also return the logsumexp of each token.
        batch_invariant: Whether the bits of a token's loss depend on its own hidden state only, as
            those of `batch_invariant_linear`. Without `adapter` and `shard`.
        backend: Implementation of the pass over the logits: "auto", "triton" or "pytorch".

    Returns:
        - The loss, float32 (float64 for float64 inputs): 0-dim, or [T] for "none".
        - The number of labels that are not `ignore_index`, int64, 0-dim, on the labels' device.
        - With `return_lse`, the logsumexp [T], 0 for ignored tokens. It has gradients only if
          `reduction` is "none".

        If all tokens are ignored, a sum is 0 and a "mean" is NaN, as in
        torch.nn.functional.cross_entropy; all gradients are 0. A token all of whose logits are -inf
        has an infinite loss and no gradient.

    Raises:
        ValueError: if arguments do not fit together, or, on a CPU, if a label is outside the
            vocabulary. On a GPU labels are not checked.
    """
    _check(hidden, weight, labels, bias, reduction, adapter)
    _check_numbers(softcap, label_smoothing, z_loss, chunk_tokens, logits_bytes)
    _check_token_weights(token_weights, labels)
    _check_batch_invariant(batch_invariant, adapter, shard)
    matmul_dtype = _matmul_dtype(hidden)
    call = FusedCall(hidden.device, matmul_dtype)
    backend = fused_backend("linear_cross_entropy", call, backend)
    if chunk_tokens is None:
        size = (matmul_dtype if backend == "triton" else torch.float32).itemsize
        chunk_tokens = pick_chunk_tokens(
            hidden.shape[0], weight.shape[0], size, hidden.device, logits_bytes
        )
    options = LossOptions(
        softcap=float(softcap),
        logit_scale=float(logit_scale),
        ignore_index=ignore_index,
        label_smoothing=float(label_smoothing),
        z_loss=float(z_loss),
        first_word=0 if shard is None else shard.first_word,
        num_words=weight.shape[0] if shard is None else shard.num_words,
        group_name="" if shard is None else shard.group.group_name,
        chunk_tokens=chunk_tokens,
        matmul_dtype=matmul_dtype,
        batch_invariant=batch_invariant,
        backend=backend,
    )
    low, up = (None, None) if adapter is None else adapter
    tensors = (hidden, weight, bias, low, up, labels)
    num_valid_tokens = (labels != ignore_index).sum()
    if token_weights is not None:
        wide = torch.promote_types(matmul_dtype, torch.float32)
        token_weights = token_weights.to(wide).contiguous()
    if reduction == "none":
        loss, lse, _ = cross_entropy_tokens(*tensors, *options.arguments())
        if token_weights is not None:
            loss = loss * token_weights
    else:
        differentiable = torch.is_grad_enabled()
        needs = [
            differentiable and tensor is not None and tensor.requires_grad
            for tensor in tensors[:-1]
        ]
        loss, lse, *_ = cross_entropy_sum(*tensors, token_weights, needs, *options.arguments())
        if reduction == "mean":
            loss = mean_over(loss, num_valid_tokens)
    return (loss, num_valid_tokens, lse) if return_lse else (loss, num_valid_tokens)


def _matmul_dtype(hidden: Tensor) -> torch.dtype:
    """Returns the dtype of the products' inputs: autocast's if it is on, else that of `hidden`.

    Autocast does not change float64.
    """
    device_type = hidden.device.type
    if hidden.dtype != torch.float64 and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return hidden.dtype


def _check(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    reduction: str,
    adapter: tuple[Tensor, Tensor] | None,
) -> None:
    require_tensors(hidden=hidden, weight=weight, labels=labels)
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
    if adapter is not None:
        low, up = adapter
        fits = low.dim() == up.dim() == 2 and low.shape[1] == up.shape[1]
        if not fits or low.shape[0] != hidden.shape[0] or up.shape[0] != weight.shape[0]:
            raise ValueError(
                f"adapter must be [{hidden.shape[0]}, R] and [{weight.shape[0]}, R], got "
                f"{tuple(low.shape)} and {tuple(up.shape)}. Pass lora_A's output and lora_B's "
                "weight."
            )


def _check_token_weights(token_weights: Tensor | None, labels: Tensor) -> None:
    if token_weights is None:
        return
    if token_weights.shape != labels.shape or not token_weights.is_floating_point():
        raise ValueError(
            f"token_weights must be floating point of shape {tuple(labels.shape)}, got "
            f"{token_weights.dtype} of shape {tuple(token_weights.shape)}. Pass one per token."
        )
    if token_weights.requires_grad:
        raise ValueError(
            "token_weights must be constant, got a tensor that requires a gradient. Detach it, or "
            "multiply the losses of reduction='none'."
        )


def _check_batch_invariant(
    batch_invariant: bool, adapter: tuple[Tensor, Tensor] | None, shard: VocabularyShard | None
) -> None:
    if not isinstance(batch_invariant, bool):
        raise ValueError(f"batch_invariant must be True or False, got {batch_invariant!r}.")
    if batch_invariant and not (adapter is None and shard is None):
        raise ValueError(
            f"{'shard' if adapter is None else 'adapter'} must be None with batch_invariant=True, "
            "whose product is one of whole rows. Merge the adapter, or gather the vocabulary."
        )


def _check_numbers(
    softcap: float,
    label_smoothing: float,
    z_loss: float,
    chunk_tokens: int | None,
    logits_bytes: int | None,
) -> None:
    if softcap < 0.0:
        raise ValueError(f"softcap must be at least 0, got {softcap}. Use 0 to turn it off.")
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(
            f"label_smoothing must lie in [0, 1), got {label_smoothing}. Use 0 to turn it off."
        )
    if z_loss < 0.0:
        raise ValueError(f"z_loss must be at least 0, got {z_loss}. Use 0 to turn it off.")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(
            f"chunk_tokens must be at least 1, got {chunk_tokens}. Use None to have it picked."
        )
    if logits_bytes is not None and logits_bytes < 1:
        raise ValueError(
            f"logits_bytes must be at least 1, got {logits_bytes}. Use None to have it picked."
        )
