"""merge_attn_states: merges the attention of the same queries over two disjoint sets of keys.

lctrain.attention.prefixes merges the attention to a shared prefix and to the suffix itself.
"""

import torch
from torch import Tensor

from lctrain_kernels.checks import require_tensors


def merge_attn_states(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the attention over both sets of keys, from the output and lse over each set.

    Both results are differentiable in all four arguments.

    Args:
        out_a: Attention output over the first set of keys, [T, H, D].
        lse_a: Log-sum-exp of the logits over the first set, [H, T] float32, natural logarithm;
            -inf where a query saw no key.
        out_b: Attention output over the second set of keys, [T, H, D].
        lse_b: Log-sum-exp of the logits over the second set, [H, T] float32.

    Returns:
        out [T, H, D] in out_a's dtype and lse [H, T]. A query that saw no key in either set has
        out = 0 and lse = -inf.

    Raises:
        ValueError: if shapes do not fit.
    """
    require_tensors(out_a=out_a, lse_a=lse_a, out_b=out_b, lse_b=lse_b)
    expected = (out_a.shape[1], out_a.shape[0])
    if out_a.shape != out_b.shape or not tuple(lse_a.shape) == tuple(lse_b.shape) == expected:
        raise ValueError(
            "merge_attn_states needs outputs of one shape [T, H, D] and lse of shape [H, T], got "
            f"{tuple(out_a.shape)}, {tuple(lse_a.shape)}, {tuple(out_b.shape)}, "
            f"{tuple(lse_b.shape)}."
        )
    # The result does not depend on the shift, so the shift needs no gradient.
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
