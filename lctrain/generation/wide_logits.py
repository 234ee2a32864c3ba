"""wide_logits: gives rollouts logits in the dtype of the trainer's logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lctrain.loss.output_head import UnverifiedHeadError, check_projection

HALF = (torch.bfloat16, torch.float16)


@contextmanager
def wide_logits(model: Any) -> Iterator[None]:
    """Context manager: a model's output embedding returns logits in the dtype of the trainer's.

    Where linear_cross_entropy has float32 logits of half-precision weights, so have rollouts: with
    logits in bfloat16, log-probabilities would differ from the trainer's by their rounding. On a
    GPU, the logits of both have half precision, and nothing changes. Nor does it under autocast,
    or for an output embedding with hooks, adapters or sharded weights.

    Args:
        model: A causal LM of transformers, without gradients.
    """
    find = getattr(model, "get_output_embeddings", None)
    head: Any = None if find is None else find()
    if not _is_wider_in_training(head):
        yield
        return
    head.forward = partial(_project, head)
    try:
        yield
    finally:
        vars(head).pop("forward", None)  # another thread may have removed it


def _is_wider_in_training(head: Any) -> bool:
    """Returns whether the trainer has float32 logits of a half-precision output embedding."""
    from lctrain_kernels.fused_backend import FusedCall, fused_backend

    try:
        check_projection(head)
    except UnverifiedHeadError:
        return False
    weight = head.weight
    if weight.dtype not in HALF or torch.is_autocast_enabled(weight.device.type):
        return False
    call = FusedCall(weight.device, weight.dtype)
    return (
        head._compiled_call_impl is None
        and fused_backend("linear_cross_entropy", call) == "pytorch"
    )


def _project(head: nn.Linear, hidden: Tensor) -> Tensor:
    """Returns logits [..., V], float32 for hidden states [..., E] in the dtype of the weight."""
    from lctrain_kernels.cross_entropy.products import project

    if hidden.dtype != head.weight.dtype:
        return nn.functional.linear(hidden, head.weight, head.bias)
    rows = hidden.flatten(0, -2)
    out = torch.empty(len(rows), head.weight.shape[0], dtype=torch.float32, device=hidden.device)
    project(rows, head.weight, None, out)
    if head.bias is not None:
        out += head.bias
    return out.unflatten(0, hidden.shape[:-1])
