"""Steps that lctrain's attention functions share: options, documents, and the kernel call."""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lctrain.attention.boundaries import Boundaries, is_packed
from lctrain.attention.cached import MOST_QUERIES, is_cached_rows
from lctrain.attention.compute_dtype import compute_dtype
from lctrain.attention.documents import find_documents_of_layer, rows_of_mask
from lctrain.attention.mask import UNPATCH
from lctrain.attention.shared import Kernel, Part, Split, attend_shared
from lctrain.attention.spec import AttentionSpec, FlashSpec

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


Spec = TypeVar("Spec", bound=AttentionSpec)


def spec_of(module: nn.Module, kind: type[Spec]) -> Spec | None:
    """Returns the AttentionSpec of a layer; None if it is not an instance of `kind`.

    A layer can carry a spec of another class: `set_attn_implementation` changes the attention of a
    model and leaves the specs of its layers.
    """
    spec = getattr(module, SPEC_ATTRIBUTE, None)
    return spec if isinstance(spec, kind) else None


def backend_of(
    spec: AttentionSpec, device: torch.device, dtype: torch.dtype, head_dim: int = 1
) -> str:
    """Returns the backend to pass to the kernels for tensors of this device, dtype and head dim.

    The result is `spec.backend`, with two exceptions for backend="auto". "triton" takes the place
    of the Hopper kernels of dual chunk or differential attention with deterministic=True, since
    their gradients differ between runs; and of those of flash attention with batch_invariant=True,
    whose order of sums no decode kernel has.
    """
    from lctrain.kernels import select_backend

    differs = spec.deterministic if spec.kind != "flash" else is_batch_invariant(spec)
    if spec.backend != "auto" or not differs:
        return spec.backend
    serving = select_backend(device, dtype, head_dim=head_dim, warn=False)
    return "triton" if serving == "hopper" else "auto"


def is_batch_invariant(spec: AttentionSpec | None) -> bool:
    """Returns whether a layer's spec asks for bits that depend on no other document."""
    return isinstance(spec, FlashSpec) and spec.batch_invariant


def refuse_unknown(kwargs: dict[str, Any]) -> None:
    """Raises a ValueError if a layer's keyword arguments ask for something the kernels lack.

    Args:
        kwargs: Keyword arguments that the model passed to the layer beyond the documented ones.
    """
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


def lost_boundaries(module: nn.Module) -> ValueError:
    """Returns the error for a layer that got no Boundaries from its model's input hook."""
    return ValueError(
        f"{type(module).__name__} must be reached through the patched model, got a call that lost "
        "the document boundaries on the way. Call the model itself, not its layers; if you did, "
        f"this architecture drops keyword arguments. {UNPATCH}"
    )


def refuse_fixed_size(mask: Tensor | None) -> None:
    """Raises a ValueError if the mask of a layer is a result of cached_rows.

    Args:
        mask: Mask of a layer whose attention reads no cache of fixed size.
    """
    if is_cached_rows(mask):
        raise ValueError(
            "the key/value cache must hold exactly the tokens seen so far, got one of fixed size. "
            f"Use a DynamicCache. {UNPATCH}"
        )


def reads_cache(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    arguments: dict[str, Any],
) -> bool:
    """Returns whether the decode kernels compute a layer's call on top of a filled DynamicCache.

    Args:
        module: The attention layer; `training` is read.
        query: [B, H, S, D].
        key: [B, Hk, Sk, D].
        value: [B, Hk, Sk, Dv].
        mask: The result of flash_attention_mask.
        arguments: Keyword arguments of the layer.
    """
    return (
        query.shape[2] < key.shape[2]
        and query.shape[2] <= MOST_QUERIES
        and not torch.is_grad_enabled()
        and not module.training
        and key.dtype == value.dtype
        and query.shape[3] == key.shape[3] == value.shape[3]
        and (mask is None or (mask.dtype == torch.bool and mask.shape[1] == key.shape[2]))
        and not is_packed(arguments)
        and arguments.get("seq_idx") is None
    )


def rows_in_cache(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    arguments: dict[str, Any],
) -> tuple[bool, Tensor | None]:
    """Returns (whether the decode kernels compute a layer's call, cached_rows or None).

    The arguments are those of reads_cache. A row with padding between its tokens is left to the
    kernels of packs.
    """
    if not reads_cache(module, query, key, value, mask, arguments):
        return False, None
    rows = None if mask is None else rows_of_mask(mask, key.shape[2])
    return mask is None or rows is not None, rows


def require_rows(
    module: nn.Module, boundaries: Boundaries, queries: tuple[int, int], keys: tuple[int, int]
) -> None:
    """Raises a ValueError unless the boundaries describe rows of the layer's shapes.

    Args:
        module: The attention layer, named in the message.
        boundaries: Boundaries of the documents.
        queries: Shape (B, S) of the layer's query rows.
        keys: Shape (B, Sk) of the layer's key rows.
    """
    if boundaries.queries != queries or boundaries.keys != keys:
        raise ValueError(
            f"queries and keys must have the {boundaries.queries} rows and tokens of the model's "
            f"input, got {queries} and {keys} in {type(module).__name__}. {UNPATCH}"
        )


def read_documents(
    module: nn.Module,
    spec: AttentionSpec | None,
    given: Boundaries | None,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    arguments: dict[str, Any],
    drop_queries: bool,
) -> Boundaries:
    """Returns the boundaries of a layer's documents.

    Boundaries from the input hook are checked and returned. If there are none, they are found from
    the layer's mask and arguments.

    Args:
        module: The attention layer.
        spec: Spec of the layer; None if it has none.
        given: Boundaries from the input hook; None if the hook passed none.
        query: [B, H, S, D].
        key: [B, Hk, Sk, D].
        mask: The result of flash_attention_mask.
        arguments: The other keyword arguments of the layer.
        drop_queries: Whether to leave out queries at padding; see
            `lctrain.attention.boundaries.from_padding`.

    Raises:
        ValueError: if the model did not pass the boundaries on to the layer, the boundaries
            describe rows of other shapes, or the layer belongs to a transformers model that
            patch_model or transformers' loading never checked.
    """
    if spec is None and type(module).__module__.startswith(("transformers.", "transformers_mod")):
        raise ValueError(
            f"the attention must be named when a model is loaded or by set_attn_implementation(), "
            f"which check the model, got {type(module).__name__} of a model that was not checked: "
            "its config was changed. Call lctrain.patch_model(model)."
        )
    refuse_fixed_size(mask)
    queries, keys = (query.shape[0], query.shape[2]), (key.shape[0], key.shape[2])
    if given is None:
        if spec is not None and queries == keys:
            raise lost_boundaries(module)
        given = find_documents_of_layer(mask, arguments, queries, keys, query.device, drop_queries)
    require_rows(module, given, queries, keys)
    return given


def is_causal_layer(module: nn.Module, is_causal: bool | None) -> bool:
    """Returns whether a layer attends causally: `is_causal`, or if None, `module.is_causal`."""
    return bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)


def dropout_of(module: nn.Module, spec: AttentionSpec, dropout: float) -> float:
    """Returns the probability of dropping an attention weight.

    This is `spec.dropout` in training mode and 0 in eval mode. If `spec.dropout` is None, it is the
    `dropout` of the call.
    """
    if spec.dropout is None:
        return dropout
    return spec.dropout if module.training else 0.0


def scale_of(query: Tensor, scaling: float | None) -> float:
    """Returns the factor of q.k: `scaling`, or D^-0.5 if it is None."""
    return query.shape[-1] ** -0.5 if scaling is None else scaling


def window_of(sliding_window: int | None, causal: bool) -> tuple[int, int]:
    """Returns FlashAttention's window_size (left, right): keys on each side of the query's own key.

    -1 means no limit.
    """
    if sliding_window is None:
        return (-1, -1)
    return (sliding_window - 1, 0 if causal else sliding_window - 1)


def attend(
    kernel: Kernel,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    boundaries: Boundaries,
    *,
    dropout_p: float = 0.0,
    causal: bool = True,
    split: Split = lambda q, k, v: ((q,), (k, v)),
    per_query: Sequence[Tensor] = (),
) -> Tensor:
    """Calls a kernel on the tokens without padding, and puts its output back into rows.

    Queries, keys and values get one head width: the wider of D and Dv, filled up with zeros.

    Args:
        kernel: Function (part, *queries, *per_query, *keys) -> [T, H, W], where `part` is a Part,
            and queries and keys are those that `split` returns; by default (part, q, k, v). q is
            [T, H, W], k and v are [Tk, Hk, W]. T and Tk count tokens without padding, and W is the
            larger of D and Dv.
        query: [B, H, S, D].
        key: [B, Hk, Sk, D].
        value: [B, Hk, Sk, Dv].
        boundaries: Boundaries of the documents; they say which tokens are padding.
        dropout_p: Probability of dropping an attention weight.
        causal: Whether attention is causal.
        split: Function from q, k and v to the queries and keys of the kernel.
        per_query: Further tensors of the kernel, [T, H'] per query and head.

    Returns:
        [B, S, H, Dv], zero at padding, in the dtype of `value`; under autocast in autocast's dtype
        if `value` is float32.
    """
    value_dim = value.shape[-1]
    dtype = compute_dtype(value)
    width = max(query.shape[-1], value_dim)  # in multi-head latent attention Dv differs from D
    q = _tokens(query, boundaries.indices_q, dtype, width)
    k = _tokens(key, boundaries.indices_k, dtype, width)
    v = _tokens(value, boundaries.indices_k, dtype, width)
    if boundaries.share is None:
        queries, keys = split(q, k, v)
        out = kernel(Part(boundaries.pack), *queries, *per_query, *keys)
    else:
        out = attend_shared(
            kernel, split, (q, k, v), per_query, boundaries, dropout_p=dropout_p, causal=causal
        )
    out = out[..., :value_dim]
    if boundaries.indices_q is not None:
        rows = out.new_zeros((boundaries.queries[0] * boundaries.queries[1], *out.shape[1:]))
        out = rows.index_copy(0, boundaries.indices_q, out)
    return out.unflatten(0, boundaries.queries)


def _tokens(states: Tensor, indices: Tensor | None, dtype: torch.dtype, width: int) -> Tensor:
    """Returns states [B, H, S, D] as tokens [T, H, width] without padding, cast to `dtype`.

    Columns beyond D are zero.
    """
    tokens = states.transpose(1, 2).flatten(0, 1)
    tokens = tokens if indices is None else tokens.index_select(0, indices)
    if width != tokens.shape[-1]:
        tokens = F.pad(tokens, (0, width - tokens.shape[-1]))
    return tokens.to(dtype)
