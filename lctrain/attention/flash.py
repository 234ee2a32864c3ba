"""The attention function that transformers calls for attn_implementation="lctrain_flash"."""

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lctrain.attention.boundaries import Boundaries
from lctrain.attention.by_query import (
    attend_by_query,
    attend_pages_by_query,
    attends_by_query,
)
from lctrain.attention.cache_step import CacheStep, Packed, StepAttention, Stored
from lctrain.attention.cached import attend_cached, is_cached_rows
from lctrain.attention.compute_dtype import compute_dtype
from lctrain.attention.forward import (
    attend,
    backend_of,
    dropout_of,
    is_batch_invariant,
    is_causal_layer,
    read_documents,
    refuse_unknown,
    rows_in_cache,
    scale_of,
    spec_of,
    window_of,
)
from lctrain.attention.prefixes import add_prefixes, require_whole_groups
from lctrain.attention.shared import Part
from lctrain.attention.spec import FlashSpec

if TYPE_CHECKING:
    from lctrain_kernels.pack import Pack


def flash_attention_forward(
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
    deterministic: bool | None = None,
    lctrain_boundaries: Boundaries | None = None,
    lctrain_step: CacheStep | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Computes softmax attention within documents, on lctrain's kernels.

    Args:
        module: The attention layer; `is_causal` and the AttentionSpec are read from it.
        query: [B, H, S, D]. Under autocast, query and key are float32 and value has autocast's
            dtype.
        key: [B, Hk, Sk, D].
        value: [B, Hk, Sk, Dv].
        attention_mask: The result of flash_attention_mask.
        dropout: Probability of dropping an attention weight, 0.0 in eval mode.
            AttentionSpec.dropout overrides it.
        scaling: Factor of q.k; None means D^-0.5.
        sliding_window: Number of keys that a query sees to its left, its own key included. In a
            bidirectional layer the query sees as many keys to its right.
        softcap: c > 0 replaces a logit x by c tanh(x / c).
        is_causal: Whether attention is causal; None takes `module.is_causal`.
        s_aux: [H], attention sinks: one more logit in every softmax of the head.
        deterministic: Whether the backward must give the same bits in every run. True here or in
            AttentionSpec.deterministic is enough.
        lctrain_boundaries: Boundaries that the input hook of patch_model found.
        lctrain_step: Cache of continuous batching, which calls the kernels.
        **kwargs: `cu_seq_lens_q/k`, `max_length_q/k`, `document_ids`, `schedule` and
            `position_ids`; further arguments of the model are checked and not used.

    Returns:
        The output [B, S, H, Dv], zero at padding; and None in place of attention weights.

    Raises:
        ValueError: if an argument asks for something that the kernels do not have.
    """
    from lctrain_kernels.varlen.api import flash_attn_pack_func

    spec = spec_of(module, FlashSpec)
    sliding_window = narrower_window(spec, sliding_window)
    backend = "auto"
    if spec is not None:
        backend = backend_of(spec, query.device, compute_dtype(value), query.shape[-1])
    options: dict[str, Any] = {
        "softmax_scale": scale_of(query, scaling),
        "softcap": softcap or 0.0,
        "window_size": window_of(sliding_window, True),
        "learnable_sink": s_aux,
        "backend": backend,
    }
    causal = is_causal_layer(module, is_causal)
    invariant = is_batch_invariant(spec)
    if lctrain_step is not None:
        sizes, windowed = (query.shape[1], value.shape[3]), sliding_window is not None
        packed, stored = _on_cache(options, causal, invariant)
        attention = StepAttention(packed, stored, *sizes, causal, windowed, plans=not invariant)
        return lctrain_step.attend(module, (query, key, value), attention, kwargs), None
    refuse_unknown(kwargs)
    if causal and spec is not None and spec.backend != "hopper":
        if is_cached_rows(attention_mask):
            return attend_cached(query, key, value, attention_mask, False, options), None
        exact, rows = rows_in_cache(module, query, key, value, attention_mask, kwargs)
        if exact:
            return attend_cached(query, key, value, rows, True, options), None
    drop = causal or sliding_window is not None
    boundaries = read_documents(
        module, spec, lctrain_boundaries, query, key, attention_mask, kwargs, drop
    )
    spec = spec if spec is not None else FlashSpec()
    prefixes = boundaries.prefixes
    if prefixes is not None:
        require_whole_groups(prefixes, causal, sliding_window)
    options = {
        "dropout_p": dropout_of(module, spec, dropout),
        "softmax_scale": scale_of(query, scaling),
        "softcap": softcap or 0.0,
        "deterministic": spec.deterministic or bool(deterministic),
        "backend": backend,
    }
    if invariant:
        _require_whole_documents(boundaries, causal, softcap, options["dropout_p"])

    def kernel(part: Part, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if invariant and attends_by_query(q, backend):
            lengths = part.pack.cu_seqlens_q.diff().tolist()
            chosen = {
                "softmax_scale": options["softmax_scale"],
                "window_size": window_of(sliding_window, causal),
                "learnable_sink": s_aux,
            }
            return attend_by_query(q, k, v, lengths, part.pack.cu_seqlens_k.diff().tolist(), chosen)
        out, lse = flash_attn_pack_func(
            q,
            k,
            v,
            part.pack,
            dropout_seed=part.dropout_seed,
            first_head=part.first_head(q.shape[1]),
            causal=causal,
            window_size=window_of(sliding_window, causal),
            learnable_sink=part.of_heads(s_aux),
            **options,
        )
        return out if prefixes is None else add_prefixes(prefixes, q, k, v, out, lse, **options)

    dropout_p = options["dropout_p"]
    out = attend(kernel, query, key, value, boundaries, dropout_p=dropout_p, causal=causal)
    return out, None


def _on_cache(options: dict[str, Any], causal: bool, invariant: bool) -> tuple[Packed, Stored]:
    """Returns the functions of a StepAttention.

    Args:
        options: Keyword arguments of the kernels: scale, window, softcap, sink and backend.
        causal: Whether the layer attends causally.
        invariant: Whether the bits of a query may depend on its keys only. Decode steps then sum
            all keys of a request in the order of the training kernel, and take no plan.
    """
    from lctrain_kernels import flash_attn_with_kvcache
    from lctrain_kernels.varlen.api import flash_attn_pack_func

    def packed(q: Tensor, k: Tensor, v: Tensor, pack: "Pack") -> Tensor:
        if invariant and attends_by_query(q, options["backend"]):
            queries, keys = pack.cu_seqlens_q.diff().tolist(), pack.cu_seqlens_k.diff().tolist()
            return attend_by_query(q, k, v, queries, keys, options)
        return flash_attn_pack_func(q, k, v, pack, causal=causal, **options)[0]

    def stored(q: Tensor, k_cache: Tensor, v_cache: Tensor, **places: Any) -> Tensor:
        split = "exact" if invariant else "fixed"
        out = flash_attn_with_kvcache(
            q, k_cache, v_cache, causal=causal, split=split, **places, **options
        )
        assert isinstance(out, Tensor)
        if invariant and attends_by_query(q, options["backend"]):
            lengths, table = places["cache_seqlens"] + 1, places["block_table"]
            return attend_pages_by_query(q, k_cache, v_cache, lengths, table, options)
        return out

    return packed, stored


def _require_whole_documents(
    boundaries: Boundaries, causal: bool, softcap: float | None, dropout_p: float
) -> None:
    """Raises a ValueError if a batch-invariant layer would sum in another order than a decode step.

    Args:
        boundaries: Boundaries of the documents.
        causal: Whether attention is causal.
        softcap: Soft cap of the logits, or None.
        dropout_p: Probability of dropping an attention weight.
    """
    reason = None
    if boundaries.prefixes is not None:
        reason = "documents that share a prefix, whose parts are merged. Pack whole sequences"
    elif boundaries.share is not None:
        reason = "a pack that ranks share. Use trainer.context_parallel=1"
    elif not causal or softcap:
        reason = "attention that is not causal, or has a soft cap. Pass batch_invariant=False"
    elif dropout_p:
        reason = f"a dropout of {dropout_p}. Pass dropout=0.0"
    if reason is not None:
        raise ValueError(
            "a batch-invariant layer sums the keys of whole documents in one order, as a decode "
            f"step does, got {reason}."
        )


def narrower_window(spec: FlashSpec | None, sliding_window: int | None) -> int | None:
    """Returns the smaller of the windows of a layer's spec and of its model; None without any.

    Args:
        spec: Spec of the layer; None if it has none.
        sliding_window: Window of the model's layer; None without one.
    """
    if spec is None or spec.sliding_window is None:
        return sliding_window
    return min(spec.sliding_window, sliding_window or spec.sliding_window)
