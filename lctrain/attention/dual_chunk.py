"""The attention function that transformers calls for attn_implementation="lctrain_dual_chunk".

The model's RoPE rotates queries and keys at (position in the document) modulo c, where c =
chunk_size - local_size is the length of a chunk. The input hook, a forward pre-hook of the model,
sets these positions, since the model computes RoPE before its first layer. The kernel then rotates
the queries further, to the relative positions of dual chunk attention. Keys need no second
rotation, so a key/value cache can hold them as they are.
"""

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from lctrain.attention.boundaries import Boundaries, find_positions
from lctrain.attention.cache_step import CacheStep, StepAttention
from lctrain.attention.cached import MOST_QUERIES, cache_arguments, is_cached_rows
from lctrain.attention.forward import (
    attend,
    backend_of,
    dropout_of,
    lost_boundaries,
    read_documents,
    refuse_fixed_size,
    refuse_unknown,
    rows_in_cache,
    scale_of,
    spec_of,
)
from lctrain.attention.shared import Part
from lctrain.attention.spec import DualChunkSpec

if TYPE_CHECKING:
    from lctrain_kernels.pack import Pack

DUAL_CHUNK_ARGUMENT = "lctrain_dual_chunk"

PREFIX_COST = 2.0
"""Cost of shared prefixes in multiples of flash attention's, which is 9 us beyond its reads.

Measured on an H200: steps of 16 and 64 requests behind 16,384 tokens in pages of 64, 32/8 heads of
128, with and without sharing. By the lines through both numbers of requests, sharing adds 10 us
more to a step of dual chunk attention than to one of flash attention: small kernels cut ranges."""


class DualChunkInputs(NamedTuple):
    """Inputs of dual chunk attention that all layers share in one forward pass.

    Attributes:
        rotary: The model's rotary embedding.
        logit_scale: [N] float32, the factor of each document's logits; None applies no factor, or
            with a CacheStep, that of the keys so far.
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
    return length_logit_scale(spec, boundaries.pack.cu_seqlens_k.diff())


def length_logit_scale(spec: DualChunkSpec, lengths: Tensor) -> Tensor | None:
    """Returns `dual_chunk_logit_scale` of documents of the given lengths.

    Args:
        spec: Options with all sizes set.
        lengths: Number of keys of each document, [N] integers.
    """
    if spec.scale == "none":
        return None
    assert spec.window is not None
    growth = (lengths.float() / spec.window).clamp(min=1.0).log()
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
    lctrain_step: CacheStep | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Computes causal attention within documents, with relative positions of at most chunk_size.

    Args:
        module: The attention layer, which carries a DualChunkSpec.
        query: [B, H, S, D], rotated at `dual_chunk_positions`.
        key: [B, Hk, Sk, D], rotated in the same way; keys of a cache come first.
        value: [B, Hk, Sk, D].
        attention_mask: The result of flash_attention_mask. Boundaries say which keys are visible,
            or in a cache of fixed size, the mask.
        dropout: Probability of dropping an attention weight, 0.0 in eval mode.
            DualChunkSpec.dropout overrides it.
        scaling: Factor of q.k; None means D^-0.5.
        sliding_window: Must be None.
        softcap: Must be None or 0.
        is_causal: Must be True; None takes `module.is_causal`, which must be True too.
        s_aux: Must be None.
        lctrain_boundaries: Boundaries that the input hook found.
        lctrain_dual_chunk: Inputs that the input hook prepared.
        lctrain_step: Cache of continuous batching, which calls the kernels.
        **kwargs: Further arguments of the model, which are checked and not used.

    Returns:
        The output [B, S, H, D], zero at padding; and None in place of attention weights.

    Raises:
        ValueError: if an argument asks for something that the kernels do not have, or the layer was
            called without the input hook.
    """
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    refuse_for_dual_chunk(
        module, causal=causal, sliding_window=sliding_window, softcap=softcap, s_aux=s_aux
    )
    spec, fixed = spec_of(module, DualChunkSpec), is_cached_rows(attention_mask)
    known = lctrain_boundaries is not None or fixed or lctrain_step is not None
    if spec is None or lctrain_dual_chunk is None or not known:
        raise lost_boundaries(module)
    inv_freq = lctrain_dual_chunk.inv_freq().to(device=query.device, dtype=torch.float32)
    chunks = _Chunks(spec, inv_freq, scale_of(query, scaling))
    logit_scale = lctrain_dual_chunk.logit_scale
    if lctrain_step is not None:
        factors: dict[str, Any] = {} if logit_scale is None else {"logit_scale": logit_scale}
        packed, stored = partial(chunks.packed, **factors), partial(chunks.stored, **factors)
        attention = StepAttention(
            *(packed, stored, query.shape[1], value.shape[3]), plans=True, prefix_cost=PREFIX_COST
        )
        return lctrain_step.attend(module, (query, key, value), attention, kwargs), None
    refuse_unknown(kwargs)
    cached, rows = rows_in_cache(module, query, key, value, attention_mask, kwargs)
    if attention_mask is not None and fixed:
        if spec.backend == "hopper":
            refuse_fixed_size(attention_mask)
        if lctrain_boundaries is None or query.shape[2] <= MOST_QUERIES:
            cached, rows = True, attention_mask
            logit_scale = length_logit_scale(spec, (rows[1] - rows[0]).flatten())
        else:
            key, value = (x[:, :, : lctrain_boundaries.keys[1]] for x in (key, value))
            attention_mask = None
    per_row = logit_scale is None or logit_scale.shape[0] == query.shape[0]
    if cached and per_row and spec.backend != "hopper":
        operands, places = cache_arguments(query, key, value, rows, not fixed)
        return chunks.stored(*operands, logit_scale=logit_scale, **places), None
    boundaries = read_documents(
        module, spec, lctrain_boundaries, query, key, attention_mask, kwargs, drop_queries=True
    )

    dropout_p = dropout_of(module, spec, dropout)

    def kernel(part: Part, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return chunks.packed(
            q,
            k,
            v,
            part.pack,
            logit_scale=part.of_documents(logit_scale),
            backend=backend_of(spec, q.device, q.dtype, q.shape[-1]),
            dropout_p=dropout_p,
            dropout_seed=part.dropout_seed,
            first_head=part.first_head(q.shape[1]),
        )

    return attend(kernel, query, key, value, boundaries, dropout_p=dropout_p), None


class _Chunks(NamedTuple):
    """The dual chunk kernels with the options of one layer.

    Attributes:
        spec: Options with all sizes set.
        inv_freq: Rotary frequencies, [D / 2] float32.
        softmax_scale: Factor of q.k.
    """

    spec: DualChunkSpec
    inv_freq: Tensor
    softmax_scale: float

    def packed(self, q: Tensor, k: Tensor, v: Tensor, pack: "Pack", **options: Any) -> Tensor:
        """Returns the attention of packed tokens, [T, H, D].

        Args:
            q: [T, H, D].
            k: [Tk, Hk, D].
            v: [Tk, Hk, D].
            pack: The documents.
            **options: Options of dual_chunk_attn_pack_func. Without `logit_scale`, the factors are
                those of the documents' lengths.
        """
        from lctrain_kernels.dual_chunk.api import dual_chunk_attn_pack_func

        if "logit_scale" not in options:
            options["logit_scale"] = length_logit_scale(self.spec, pack.cu_seqlens_k.diff())
        return dual_chunk_attn_pack_func(q, k, v, pack, **self._options(options))[0]

    def stored(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, **options: Any) -> Tensor:
        """Returns the attention of queries over a cache, [B, S, H, D].

        Args:
            q: [B, S, H, D].
            k_cache: Keys of the cache.
            v_cache: Values of the cache.
            **options: Further arguments of dual_chunk_attn_with_kvcache. Without `logit_scale`,
                the factors are those of `cache_seqlens` and the new tokens.
        """
        from lctrain_kernels import dual_chunk_attn_with_kvcache

        if "logit_scale" not in options:
            lengths = options["cache_seqlens"] + q.shape[1]
            options["logit_scale"] = length_logit_scale(self.spec, lengths)
        out = dual_chunk_attn_with_kvcache(q, k_cache, v_cache, **self._options(options))
        assert isinstance(out, Tensor)
        return out

    def _options(self, given: dict[str, Any]) -> dict[str, Any]:
        """Returns all options of a call; the factors are moved to the frequencies' device."""
        scale = given["logit_scale"]
        return {
            "inv_freq": self.inv_freq,
            "chunk_size": self.spec.chunk_size,
            "local_size": self.spec.local_size,
            "softmax_scale": self.softmax_scale,
            "backend": self.spec.backend,
            **given,
            "logit_scale": None if scale is None else scale.to(self.inv_freq.device),
        }


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
