"""The attention function that transformers calls for attn_implementation="lctrain_dual_chunk".

The model's RoPE rotates queries and keys at (position in the document) modulo c, where c =
chunk_size - local_size is the length of a chunk. The input hook, a forward pre-hook of the model,
sets these positions, since the model computes RoPE before its first layer. The kernel then rotates
the queries further, to the relative positions of dual chunk attention. Keys need no second
rotation, so a key/value cache can hold them as they are.
"""

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from lctrain.attention.boundaries import Boundaries, find_positions
from lctrain.attention.cached import cache_arguments
from lctrain.attention.forward import (
    attend,
    backend_of,
    dropout_of,
    lost_boundaries,
    read_documents,
    refuse_unknown,
    rows_in_cache,
    scale_of,
    spec_of,
)
from lctrain.attention.shared import Part
from lctrain.attention.spec import DualChunkSpec

DUAL_CHUNK_ARGUMENT = "lctrain_dual_chunk"


class DualChunkInputs(NamedTuple):
    """Inputs of dual chunk attention that all layers share in one forward pass.

    Attributes:
        rotary: The model's rotary embedding.
        logit_scale: [N] float32, the factor of each document's logits; None applies no factor.
    """

    rotary: nn.Module
    logit_scale: Tensor | None

    def inv_freq(self) -> Tensor:
        """Returns the rotary frequencies of queries and keys, [D / 2] float32.

        For rope types whose frequencies depend on the length ('dynamic', 'longrope'), these are the
        frequencies of short documents.
        """
        kind = getattr(self.rotary, "rope_type", "default")
        follows = "dynamic" in kind or kind == "longrope"
        return cast(Tensor, self.rotary.original_inv_freq if follows else self.rotary.inv_freq)


def dual_chunk_positions(spec: DualChunkSpec, boundaries: Boundaries) -> Tensor:
    """Returns the position at which RoPE rotates each token, [B, S] int64.

    The position is counted from the document's start, modulo the chunk length. Does not synchronise
    with the device.
    """
    return find_positions(boundaries) % spec.chunk


def dual_chunk_logit_scale(spec: DualChunkSpec, boundaries: Boundaries) -> Tensor | None:
    """Returns the factor of each document's logits, [N] float32; None with scale="none".

    The factor is (scale_coefficient * ln(n / window) + 1)^2 for a document of n > window keys, and
    1 for a shorter one. Keys in a cache count. Does not synchronise with the device.
    """
    if spec.scale == "none":
        return None
    assert spec.window is not None
    lengths = boundaries.pack.cu_seqlens_k.diff().float()
    growth = (lengths / spec.window).clamp(min=1.0).log()
    return (spec.scale_coefficient * growth + 1.0).square()


def dual_chunk_attention_forward(
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
    lctrain_boundaries: Boundaries | None = None,
    lctrain_dual_chunk: DualChunkInputs | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Computes causal attention within documents, with relative positions of at most chunk_size.

    Args:
        module: The attention layer, which carries a DualChunkSpec.
        query: [B, H, S, D], rotated at `dual_chunk_positions`.
        key: [B, Hk, Sk, D], rotated in the same way; keys of a cache come first.
        value: [B, Hk, Sk, D].
        attention_mask: Ignored, since the boundaries say which keys are visible.
        dropout: Probability of dropping an attention weight, 0.0 in eval mode.
            DualChunkSpec.dropout overrides it.
        scaling: Factor of q.k; None means D^-0.5.
        sliding_window: Must be None.
        softcap: Must be None or 0.
        is_causal: Must be True; None takes `module.is_causal`, which must be True too.
        s_aux: Must be None.
        lctrain_boundaries: Boundaries that the input hook found.
        lctrain_dual_chunk: Inputs that the input hook prepared.
        **kwargs: Further arguments of the model, which are checked and not used.

    Returns:
        The output [B, S, H, D], zero at padding; and None in place of attention weights.

    Raises:
        ValueError: if an argument asks for something that the kernels do not have, or the layer was
            called without the input hook.
    """
    from lctrain_kernels import dual_chunk_attn_with_kvcache
    from lctrain_kernels.dual_chunk.api import dual_chunk_attn_pack_func

    refuse_unknown(kwargs)
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    refuse_for_dual_chunk(
        module, causal=causal, sliding_window=sliding_window, softcap=softcap, s_aux=s_aux
    )
    spec = spec_of(module, DualChunkSpec)
    if lctrain_boundaries is None or lctrain_dual_chunk is None or spec is None:
        raise lost_boundaries(module)
    chunk_size, local_size = spec.chunk_size, spec.local_size
    assert chunk_size is not None
    assert local_size is not None
    inv_freq = lctrain_dual_chunk.inv_freq()
    logit_scale = lctrain_dual_chunk.logit_scale
    cached, rows = rows_in_cache(module, query, key, value, attention_mask, kwargs)
    per_row = logit_scale is None or logit_scale.shape[0] == query.shape[0]
    if cached and per_row and spec.backend != "hopper":
        operands, places = cache_arguments(query, key, value, rows, True)
        found = dual_chunk_attn_with_kvcache(
            *operands,
            inv_freq=inv_freq.to(device=query.device, dtype=torch.float32),
            chunk_size=chunk_size,
            local_size=local_size,
            logit_scale=None if logit_scale is None else logit_scale.to(query.device),
            softmax_scale=scale_of(query, scaling),
            backend=spec.backend,
            **places,
        )
        assert isinstance(found, Tensor)
        return found, None
    boundaries = read_documents(
        module, spec, lctrain_boundaries, query, key, attention_mask, kwargs, drop_queries=True
    )

    dropout_p = dropout_of(module, spec, dropout)

    def kernel(part: Part, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scale = part.of_documents(logit_scale)
        out, _ = dual_chunk_attn_pack_func(
            q,
            k,
            v,
            part.pack,
            inv_freq=inv_freq.to(device=q.device, dtype=torch.float32),
            chunk_size=chunk_size,
            local_size=local_size,
            logit_scale=None if scale is None else scale.to(q.device),
            dropout_p=dropout_p,
            dropout_seed=part.dropout_seed,
            first_head=part.first_head(q.shape[1]),
            softmax_scale=scale_of(query, scaling),
            backend=backend_of(spec, q.device, q.dtype, q.shape[-1]),
        )
        return out

    return attend(kernel, query, key, value, boundaries, dropout_p=dropout_p), None


def refuse_for_dual_chunk(
    layer: nn.Module,
    *,
    causal: bool,
    sliding_window: int | None,
    softcap: float | None,
    s_aux: Tensor | None,
) -> None:
    """Raises a ValueError if a layer needs attention that the dual chunk kernels do not have.

    Args:
        layer: The attention layer.
        causal: Whether the layer attends causally; must be True.
        sliding_window: Must be None.
        softcap: Must be None or 0.
        s_aux: Must be None.
    """
    found = {
        "a sliding window": sliding_window is not None,
        "softcapped logits": bool(softcap),
        "attention sinks": s_aux is not None,
        "attention to the future": not causal,
    }
    for meaning, wanted in found.items():
        if wanted:
            raise ValueError(
                f"layers must attend causally to all keys for dual chunk attention, got {meaning} "
                f"in {type(layer).__name__}. Patch the model with attention='flash', which has "
                "that, or take it out of the model's config."
            )
