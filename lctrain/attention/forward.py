"""The attention function of lctrain_flash: what transformers' layers call instead of SDPA."""

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lctrain.attention.boundaries import (
    Boundaries,
    find_segments,
    from_cu_seqlens,
    from_padding,
    from_rows,
    from_segments,
    is_packed,
)
from lctrain.attention.mask import UNPATCH
from lctrain.attention.spec import AttentionSpec

SPEC_ATTRIBUTE = "lctrain_attention_spec"
BOUNDARIES_ARGUMENT = "lctrain_boundaries"

_REFUSED = {
    "position_bias": "a bias per pair of positions",
    "attention_bias": "a bias per pair of positions",
    "relative_position_bias": "a bias per pair of positions",
    "head_mask": "a mask over heads",
    "indices": "a choice of keys per query (sparse attention)",
    "block_indices": "a choice of keys per query (sparse attention)",
    "block_table": "a paged key/value cache (continuous batching)",
    "cache": "a paged key/value cache (continuous batching)",
}
_HARMLESS = frozenset({"num_items_in_batch", "inputs_embeds", "hidden_states", "labels"})


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
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attends within documents, on lctrain's kernels.

    Args:
        module: The attention layer; `is_causal` and the AttentionSpec are read from it.
        query: [B, H, S, D].
        key: [B, Hk, Sk, D]; under autocast float32 like query, while value is low precision.
        value: [B, Hk, Sk, Dv].
        attention_mask: What flash_attention_mask returned.
        dropout: Probability of dropping a weight, 0.0 in eval mode; AttentionSpec.dropout wins.
        scaling: Factor of q.k; default D^-0.5.
        sliding_window: Keys that a query sees to its left, itself among them; bidirectional layers
            see as many to the right.
        softcap: c > 0 replaces a logit x by c tanh(x / c).
        is_causal: Default: the module's own.
        s_aux: [H], attention sinks: one more logit in every softmax of its head.
        deterministic: Same bits in every run; AttentionSpec.deterministic wins if set.
        lctrain_boundaries: From the input hook of patch_model.
        **kwargs: `cu_seq_lens_q/k`, `max_length_q/k`, `document_ids`, `schedule`, `position_ids`,
            and what the model passes along for others.

    Returns:
        [B, S, H, Dv], zero at padding, and None in place of attention weights.

    Raises:
        ValueError: for every argument that the kernels cannot honour.
    """
    _refuse_unknown(kwargs)
    spec = getattr(module, SPEC_ATTRIBUTE, None)
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    queries, keys = (query.shape[0], query.shape[2]), (key.shape[0], key.shape[2])
    if lctrain_boundaries is None:
        if spec is not None and queries == keys:
            raise ValueError(
                f"{type(module).__name__} must be reached through the patched model, got a call "
                "that lost the document boundaries on the way. Call the model itself, not its "
                f"layers; if you did, this architecture drops keyword arguments. {UNPATCH}"
            )
        drop = causal or sliding_window is not None
        lctrain_boundaries = _find_boundaries(attention_mask, kwargs, queries, keys, drop, query)
    if lctrain_boundaries.queries != queries or lctrain_boundaries.keys != keys:
        raise ValueError(
            f"queries and keys must have the {lctrain_boundaries.queries} rows and tokens of the "
            f"model's input, got {queries} and {keys} in {type(module).__name__}. {UNPATCH}"
        )
    spec = spec if spec is not None else AttentionSpec()
    if spec.dropout is not None:
        dropout = spec.dropout if module.training else 0.0
    out = _attend(
        query,
        key,
        value,
        lctrain_boundaries,
        dropout_p=dropout,
        softmax_scale=scaling,
        causal=causal,
        window_size=_window(sliding_window, causal),
        softcap=softcap or 0.0,
        deterministic=spec.deterministic or bool(deterministic),
        learnable_sink=s_aux,
        backend=spec.backend,
    )
    return out, None


def _refuse_unknown(kwargs: dict[str, Any]) -> None:
    if kwargs.get("output_attentions"):
        raise ValueError(
            "output_attentions must be False, got True: the kernels never form the weights. "
            f"{UNPATCH}"
        )
    for name, value in kwargs.items():
        if value is None or name in _HARMLESS:
            continue
        meaning = _REFUSED.get(name)
        if meaning is None and isinstance(value, Tensor) and value.is_floating_point():
            meaning = "a tensor whose meaning is not known here"
        if meaning is not None:
            raise ValueError(
                f"{name} must be None, got {meaning}, which these kernels do not have. {UNPATCH}"
            )


def _find_boundaries(
    mask: Tensor | None,
    kwargs: dict[str, Any],
    queries: tuple[int, int],
    keys: tuple[int, int],
    drop_queries: bool,
    query: Tensor,
) -> Boundaries:
    """For models that were loaded by name, without patch_model: the same rules, layer by layer."""
    if mask is not None and mask.dim() != 2:
        raise ValueError(
            f"attention_mask must be [batch, tokens], got {tuple(mask.shape)}. Describe documents "
            f"by cu_seq_lens and padding by a 2-D mask. {UNPATCH}"
        )
    if is_packed(kwargs):
        if mask is not None and mask.dtype == torch.bool:
            raise ValueError(
                "attention_mask must be None for packed inputs, got both a padding mask and "
                "cu_seq_lens. Drop the mask: a pack holds no padding."
            )
        if queries != keys:
            raise ValueError(
                f"packed inputs must have as many keys as queries, got {keys[1]} and {queries[1]} "
                "(a filled cache or cross-attention). Pass use_cache=False, and generate without "
                "cu_seq_lens."
            )
        return from_cu_seqlens(kwargs, queries, keys)
    if mask is not None:
        if mask.shape[1] != keys[1]:
            raise ValueError(
                f"attention_mask must cover the {keys[1]} keys, got {mask.shape[1]} (a cache of "
                f"fixed size). Use a DynamicCache. {UNPATCH}"
            )
        return cast(Boundaries, _remember(mask, _from_mask, queries[1], drop_queries))
    position_ids = kwargs.get("position_ids")
    if position_ids is not None and queries == keys and queries[1] > 1:
        if position_ids.dim() != 2:
            raise ValueError(
                f"position_ids must be [batch, tokens], got {tuple(position_ids.shape)}. Pass "
                "cu_seq_lens_q/k and max_length_q/k to say where documents end."
            )
        packed = _remember(position_ids, _from_positions, queries[0])
        if packed is not None:
            return packed
    return from_rows(queries[0], queries[1], keys[1], query.device)


def _from_mask(mask: Tensor, queries: int, drop_queries: bool) -> Boundaries:
    if mask.dtype == torch.bool:
        return from_padding(mask, queries, drop_queries=drop_queries)
    return from_segments(mask)


def _from_positions(position_ids: Tensor, batch: int) -> Boundaries | None:
    segments = find_segments(position_ids)
    return None if segments is None else from_segments(segments.expand(batch, -1))


@torch.compiler.disable
def _remember(
    tensor: Any, find: Callable[..., Boundaries | None], *options: Any
) -> Boundaries | None:
    """find(tensor, *options), once per forward: all layers of a model are given the same tensor."""
    if tensor.is_inference():
        return find(tensor, *options)  # has no version by which to notice a change in place
    known = getattr(tensor, "_lctrain_known", {})
    key = (tensor._version, *options)
    if key not in known:
        known[key] = find(tensor, *options)
        tensor._lctrain_known = known
    return known[key]


def _window(sliding_window: int | None, causal: bool) -> tuple[int, int]:
    if sliding_window is None:
        return (-1, -1)
    return (sliding_window - 1, 0 if causal else sliding_window - 1)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, boundaries: Boundaries, **options: Any
) -> Tensor:
    """[B, H, S, D] -> [B, S, H, Dv]: drop padding, flatten, call the kernels, put padding back."""
    from lctrain.kernels import flash_attn_varlen_func

    head_dim, value_dim = query.shape[-1], value.shape[-1]
    if options["softmax_scale"] is None:
        options["softmax_scale"] = head_dim**-0.5
    dtype = _compute_dtype(value)
    width = max(head_dim, value_dim)  # multi-head latent attention: Dv differs from D
    q = _tokens(query, boundaries.indices_q, dtype, width)
    k = _tokens(key, boundaries.indices_k, dtype, width)
    v = _tokens(value, boundaries.indices_k, dtype, width)
    attended = flash_attn_varlen_func(
        q,
        k,
        v,
        boundaries.cu_seqlens_q,
        boundaries.cu_seqlens_k,
        boundaries.max_seqlen_q,
        boundaries.max_seqlen_k,
        document_ids=boundaries.document_ids,
        schedule=boundaries.schedule,
        **options,
    )
    out = cast(Tensor, attended)[..., :value_dim]
    if boundaries.indices_q is not None:
        rows = out.new_zeros((boundaries.queries[0] * boundaries.queries[1], *out.shape[1:]))
        out = rows.index_copy(0, boundaries.indices_q, out)
    return out.unflatten(0, boundaries.queries)


def _tokens(states: Tensor, indices: Tensor | None, dtype: torch.dtype, width: int) -> Tensor:
    """[B, H, S, D] -> [T, H, width]."""
    tokens = states.transpose(1, 2).flatten(0, 1)
    tokens = tokens if indices is None else tokens.index_select(0, indices)
    if width != tokens.shape[-1]:
        tokens = F.pad(tokens, (0, width - tokens.shape[-1]))
    return tokens.to(dtype)


def _compute_dtype(value: Tensor) -> torch.dtype:
    """v's dtype: under autocast rotary embeddings leave q and k in float32, v is cast already."""
    device = value.device.type
    if value.dtype == torch.float32 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return value.dtype
