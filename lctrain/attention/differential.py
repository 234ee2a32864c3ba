"""The attention function that transformers calls for attn_implementation="lctrain_differential".

Two query heads form one differential head, with the two branches softmax(q1 k1') v - lambda
softmax(q2 k2') v. The two published versions pair their H query heads and Hk key/value heads
differently:

- Version 2 pairs query heads 2 h and 2 h + 1, which share a key head and a value head.
- Version 1, in the layout of transformers' DiffLlama, pairs query heads h and h + H / 2. Key head g
  belongs to the first branch and key head g + Hk / 2 to the second. Both branches use value heads g
  and g + Hk / 2, concatenated to one value of width 2 D.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lctrain.attention.boundaries import Boundaries
from lctrain.attention.cache_step import CacheStep, StepAttention
from lctrain.attention.cached import cache_arguments, is_cached_rows
from lctrain.attention.forward import (
    attend,
    backend_of,
    dropout_of,
    is_causal_layer,
    read_documents,
    refuse_unknown,
    rows_in_cache,
    scale_of,
    spec_of,
    window_of,
)
from lctrain.attention.prefixes import refuse_groups
from lctrain.attention.shared import Part
from lctrain.attention.spec import DifferentialSpec

if TYPE_CHECKING:
    from lctrain_kernels.pack import Pack


def differential_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    lctrain_lambda: Tensor | None = None,
    lctrain_halves: bool = False,
    lctrain_boundaries: Boundaries | None = None,
    lctrain_step: CacheStep | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Computes differential attention within documents; one kernel launch does both branches.

    Args:
        module: The attention layer; `is_causal` and the DifferentialSpec are read from it.
        query: [B, H, S, D], with an even number of heads. Under autocast, query and key are float32
            and value has autocast's dtype.
        key: [B, Hk, Sk, D].
        value: [B, Hk, Sk, D].
        attention_mask: The result of flash_attention_mask.
        dropout: Probability of dropping an attention weight of a branch, 0.0 in eval mode.
            DifferentialSpec.dropout overrides it.
        scaling: Factor of q.k; None means D^-0.5.
        sliding_window: Number of keys that a query sees to its left, its own key included.
        softcap: Must be None or 0.
        is_causal: Whether attention is causal; None takes `module.is_causal`.
        s_aux: Must be None.
        lctrain_lambda: Lambda from the differential layer, a floating-point scalar or
            [B, S, H / 2].
        lctrain_halves: True pairs query heads h and h + H / 2 (version 1), False 2 h and 2 h + 1
            (version 2).
        lctrain_boundaries: Boundaries that the input hook of patch_model found.
        lctrain_step: Cache of continuous batching, which calls the kernels.
        **kwargs: `cu_seq_lens_q/k`, `max_length_q/k` and `position_ids`; further arguments of the
            model are checked and not used.

    Returns:
        The output, zero at padding: [B, S, H / 2, D], or [B, S, H / 2, 2 D] with `lctrain_halves`;
        and None in place of attention weights.

    Raises:
        ValueError: if an argument asks for something that the kernels do not have, or the layer is
            not differential.
    """
    from lctrain_kernels import diff_attn_with_kvcache
    from lctrain_kernels.differential.api import diff_attn_pack_func

    _refuse_for_differential(module, softcap=softcap, s_aux=s_aux, lam=lctrain_lambda)
    assert lctrain_lambda is not None
    lam = lctrain_lambda
    spec = spec_of(module, DifferentialSpec)
    causal = is_causal_layer(module, is_causal)
    backend = "auto" if spec is None else spec.backend
    cached_options: dict[str, Any] = {
        "softmax_scale": scale_of(query, scaling),
        "window_size": window_of(sliding_window, True),
        "backend": backend,
    }

    def split(q: Tensor, k: Tensor, v: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        if lctrain_halves:
            return q.chunk(2, 1), (*k.chunk(2, 1), torch.cat(v.chunk(2, 1), -1))
        return (q[:, 0::2], q[:, 1::2]), (k, k, v)

    def stored(q: Tensor, k_cache: Tensor, v_cache: Tensor, **places: Any) -> Tensor:
        rows = lam  # of a pack of requests [1, T, H / 2], or of rows as q has them
        if lam.dim() > 0 and lam.shape[:2] != q.shape[:2]:
            rows = lam.transpose(0, 1)[: len(q)]
        return diff_attn_with_kvcache(
            q, k_cache, v_cache, rows, halves=lctrain_halves, **places, **cached_options
        )

    if lctrain_step is not None:

        def packed(q: Tensor, k: Tensor, v: Tensor, pack: "Pack") -> Tensor:
            (q1, q2), (k1, k2, v) = split(q, k, v)
            per_query = lam.flatten(0, 1) if lam.dim() > 0 else lam
            return diff_attn_pack_func(q1, q2, k1, k2, v, per_query, pack, **cached_options)[0]

        sizes = (query.shape[1] // 2, value.shape[3] * (2 if lctrain_halves else 1))
        windowed = sliding_window is not None
        attention = StepAttention(packed, stored, *sizes, causal, windowed, plans=True)
        return lctrain_step.attend(module, (query, key, value), attention, kwargs), None
    refuse_unknown(kwargs)
    fixed = is_cached_rows(attention_mask)
    cached, rows = rows_in_cache(module, query, key, value, attention_mask, kwargs)
    if (cached or fixed) and causal and backend != "hopper":
        rows = attention_mask if fixed else rows
        operands, places = cache_arguments(query, key, value, rows, not fixed)
        return stored(*operands, **places), None
    drop = causal or sliding_window is not None
    boundaries = read_documents(
        module, spec, lctrain_boundaries, query, key, attention_mask, kwargs, drop
    )
    refuse_groups(boundaries.prefixes, "differential")
    spec = spec if spec is not None else DifferentialSpec()
    if lam.dim() > 0:
        lam = lam.flatten(0, 1)
        real = boundaries.indices_q
        lam = lam if real is None else lam.index_select(0, real)

    per_query = (lam,) if lam.dim() > 0 else ()
    dropout_p = dropout_of(module, spec, dropout)

    def kernel(part: Part, q1: Tensor, q2: Tensor, *others: Tensor) -> Tensor:
        *lams, k1, k2, v = others
        out, _, _ = diff_attn_pack_func(
            q1,
            q2,
            k1,
            k2,
            v,
            lams[0] if lams else lam,
            part.pack,
            dropout_p=dropout_p,
            dropout_seed=part.dropout_seed,
            first_head=part.first_head(q1.shape[1]),
            causal=causal,
            window_size=window_of(sliding_window, causal),
            softmax_scale=scale_of(query, scaling),
            backend=backend_of(spec, q1.device, q1.dtype),
        )
        # `attend` expects heads of width D, so a head of version 1, 2 D wide, becomes two heads.
        return out.unflatten(2, (-1, value.shape[-1])).flatten(1, 2)

    out = attend(
        kernel,
        query,
        key,
        value,
        boundaries,
        dropout_p=dropout_p,
        causal=causal,
        split=split,
        per_query=per_query,
    )
    return out.unflatten(2, (query.shape[1] // 2, -1)).flatten(3), None


def _refuse_for_differential(
    layer: nn.Module, *, softcap: float | None, s_aux: Tensor | None, lam: Tensor | None
) -> None:
    found = {"softcapped logits": bool(softcap), "attention sinks": s_aux is not None}
    for meaning, wanted in found.items():
        if wanted:
            raise ValueError(
                f"layers must attend by plain softmax for differential attention, got {meaning} in "
                f"{type(layer).__name__}. Patch the model with attention='flash', which has that, "
                "or take it out of the model's config."
            )
    if lam is None:
        raise ValueError(
            "layers must be differential for attention='differential', got "
            f"{type(layer).__name__}, which gives no lambda. Patch a DiffLlama or what "
            "lctrain.models.differential.to_differential returns, and call the model itself, not "
            "its layers."
        )
