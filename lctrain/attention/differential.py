"""Differential attention in transformers' layers: the attention function of both versions.

A pair of query heads is one differential head: softmax(q1 k1') v - lambda softmax(q2 k2') v. In
version 2 the pairs are heads (2 h, 2 h + 1), which share a key and a value. In version 1, as
transformers' DiffLlama lays it out, they are heads (h, h + H / 2); with K key/value heads, key head
g belongs to the first branch and g + K / 2 to the second, and the value of both is value heads g
and g + K / 2 side by side.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from lctrain.attention.boundaries import Boundaries
from lctrain.attention.forward import (
    attend,
    backend_of,
    dropout_of,
    is_causal_layer,
    read_documents,
    refuse_unknown,
    scale_of,
    spec_of,
    window_of,
)
from lctrain.attention.spec import DifferentialSpec


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
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attends differentially within documents, both branches in one launch.

    Args:
        module: The attention layer; `is_causal` and the DifferentialSpec are read from it.
        query: [B, H, S, D], an even number of heads.
        key: [B, Hk, Sk, D]; under autocast float32 like query, while value is low precision.
        value: [B, Hk, Sk, D].
        attention_mask: The result of flash_attention_mask.
        dropout: Probability of dropping a weight of a branch, 0.0 in eval mode;
            DifferentialSpec.dropout wins.
        scaling: Factor of q.k; default D^-0.5.
        sliding_window: Keys that a query sees to its left, itself among them.
        softcap: Must be None or 0.
        is_causal: Default: the module's own.
        s_aux: Must be None.
        lctrain_lambda: Floating, a scalar or [B, S, H / 2], from the differential layer.
        lctrain_halves: The pairs are heads (h, h + H / 2), those of version 1, and not
            (2 h, 2 h + 1), those of version 2.
        lctrain_boundaries: Boundaries that the input hook of patch_model found.
        **kwargs: `cu_seq_lens_q/k`, `max_length_q/k`, `position_ids`, and what the model passes
            along for others.

    Returns:
        [B, S, H / 2, D], with `lctrain_halves` [B, S, H / 2, 2 D], zero at padding, and None in
        place of attention weights.

    Raises:
        ValueError: for every argument that the kernels cannot honour, and for layers that are not
            differential.
    """
    from lctrain.kernels import diff_attn_varlen_func

    refuse_unknown(kwargs)
    _refuse_for_differential(module, softcap=softcap, s_aux=s_aux, lam=lctrain_lambda)
    assert lctrain_lambda is not None
    lam = lctrain_lambda
    spec = spec_of(module, DifferentialSpec)
    causal = is_causal_layer(module, is_causal)
    drop = causal or sliding_window is not None
    boundaries = read_documents(
        module, spec, lctrain_boundaries, query, key, attention_mask, kwargs, drop
    )
    spec = spec if spec is not None else DifferentialSpec()
    if lam.dim() > 0:
        lam = lam.flatten(0, 1)
        real = boundaries.indices_q
        lam = lam if real is None else lam.index_select(0, real)

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if lctrain_halves:
            (q1, q2), (k1, k2) = q.chunk(2, 1), k.chunk(2, 1)
            v = torch.cat(v.chunk(2, 1), -1)
        else:
            q1, q2, k1, k2 = q[:, 0::2], q[:, 1::2], k, k
        out = diff_attn_varlen_func(
            q1,
            q2,
            k1,
            k2,
            v,
            lam,
            dropout_p=dropout_of(module, spec, dropout),
            softmax_scale=scale_of(query, scaling),
            causal=causal,
            window_size=window_of(sliding_window, causal),
            backend=backend_of(spec, q.device, q.dtype),
            **boundaries.as_arguments(queries=""),
        )
        # `attend` keeps columns of D; the 2 D of version 1 travel as two heads.
        return cast(Tensor, out).unflatten(2, (-1, value.shape[-1])).flatten(1, 2)

    out = attend(kernel, query, key, value, boundaries)
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
