"""most_probable: the most probable token of each row of logits, and its log-probability."""

from __future__ import annotations

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
    require_tensors(logits=logits)
    if logits.dim() != 2 or not logits.shape[1] or not logits.is_floating_point():
        raise ValueError(
            f"logits must be floating point [B, V], got {logits.dtype} of shape "
            f"{tuple(logits.shape)}. Pass one row per token to choose."
        )
    chosen = fused_backend("most_probable", FusedCall(logits.device, logits.dtype), backend)
    found: tuple[Tensor, Tensor] = implementation("most_probable", FORWARD, chosen)(
        logits.detach() if logits.requires_grad else logits
    )
    return found


@implements("most_probable", FORWARD, "triton", triton_refuses())
def _triton(logits: Tensor) -> tuple[Tensor, Tensor]:
    from lctrain_kernels.greedy import launch

    return launch.most_probable(logits)


@implements("most_probable", FORWARD, "pytorch")
def _pytorch(logits: Tensor) -> tuple[Tensor, Tensor]:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    tokens = logits.argmax(-1)
    return tokens, torch.log_softmax(logits, -1).gather(-1, tokens[:, None])[:, 0]
