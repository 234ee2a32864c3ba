"""merge_attn_states: joins attention over two disjoint sets of keys."""

import torch
from torch import Tensor


def merge_attn_states(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the attention over both sets of keys; differentiable in all four arguments.

    Args:
        out_a: [T, H, D], normalised output over the first set.
        lse_a: [H, T] float32, natural logarithm of its softmax denominator; -inf where a query saw
            no key.
        out_b: [T, H, D], over the second set.
        lse_b: [H, T] float32.

    Returns:
        out [T, H, D] in out_a's dtype and lse [H, T]; where both sets are empty, 0 and -inf.

    Raises:
        ValueError: if shapes do not fit.
    """
    expected = (out_a.shape[1], out_a.shape[0])
    if out_a.shape != out_b.shape or not tuple(lse_a.shape) == tuple(lse_b.shape) == expected:
        raise ValueError(
            "merge_attn_states needs outputs of one shape [T, H, D] and lse of shape [H, T], got "
            f"{tuple(out_a.shape)}, {tuple(lse_a.shape)}, {tuple(out_b.shape)}, "
            f"{tuple(lse_b.shape)}."
        )
    # The result does not depend on the shift, so it carries no gradient.
    shift = torch.maximum(lse_a, lse_b).detach()
    shift = shift.masked_fill(shift == float("-inf"), 0.0)
    weight_a, weight_b = torch.exp(lse_a - shift), torch.exp(lse_b - shift)
    total = weight_a + weight_b
    empty = total == 0
    safe_total = total.masked_fill(empty, 1.0)
    lse = (shift + torch.log(safe_total)).masked_fill(empty, float("-inf"))
    share_a, share_b = ((w / safe_total).t()[..., None] for w in (weight_a, weight_b))
    out = out_a.to(share_a.dtype) * share_a + out_b.to(share_b.dtype) * share_b
    return out.to(out_a.dtype), lse
