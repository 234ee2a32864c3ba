"""Code shared by the attention functions, which transformers' layers call instead of SDPA."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lctrain.attention.boundaries import Boundaries
from lctrain.attention.documents import find_documents_of_layer
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


Spec = TypeVar("Spec", bound=AttentionSpec)


def spec_of(module: nn.Module, kind: type[Spec]) -> Spec | None:
    """Returns the AttentionSpec of a layer, or None if it has none of this class.

    A model that was loaded by name keeps its layers' specs when it is given another attention.
    """
    spec = getattr(module, SPEC_ATTRIBUTE, None)
    return spec if isinstance(spec, kind) else None


def backend_of(
    spec: AttentionSpec, device: torch.device, dtype: torch.dtype, head_dim: int = 1
) -> str:
    """Returns the backend to pass to the kernels for tensors of this device, dtype and head dim.

    This is the backend of the spec, with one exception. "auto" with `deterministic` becomes
    "triton" where Hopper kernels would be taken whose gradients differ between runs: those of all
    attentions but "flash".
    """
    from lctrain.kernels import select_backend

    if spec.kind == "flash" or spec.backend != "auto" or not spec.deterministic:
        return spec.backend
    serving = select_backend(device, dtype, head_dim=head_dim, warn=False)
    return "triton" if serving == "hopper" else "auto"


def refuse_unknown(kwargs: dict[str, Any]) -> None:
    """Raises a ValueError for every argument of a layer that the kernels cannot honour."""
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
    """Returns the error for a layer that was called without its model's input hook."""
    return ValueError(
        f"{type(module).__name__} must be reached through the patched model, got a call that lost "
        "the document boundaries on the way. Call the model itself, not its layers; if you did, "
        f"this architecture drops keyword arguments. {UNPATCH}"
    )


def require_rows(
    module: nn.Module, boundaries: Boundaries, queries: tuple[int, int], keys: tuple[int, int]
) -> None:
    """Raises a ValueError unless the layer has the (B, S) rows that the boundaries describe."""
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
    """Returns the documents of a layer's rows: those of the input hook, else what the layer finds.

    Args:
        module: The layer.
        spec: That the layer carries.
        given: Boundaries from the input hook.
        query: [B, H, S, D].
        key: [B, Hk, Sk, D].
        mask: What flash_attention_mask returned.
        arguments: All others of the layer.
        drop_queries: As in `lctrain.attention.boundaries.from_padding`.

    Raises:
        ValueError: if the boundaries were lost on the way, or describe other rows, or the layer
            belongs to a model of transformers that was never checked.
    """
    if spec is None and type(module).__module__.startswith(("transformers.", "transformers_mod")):
        raise ValueError(
            f"the attention must be named when a model is loaded or by set_attn_implementation(), "
            f"which check the model, got {type(module).__name__} of a model that was not checked: "
            "its config was changed. Call lctrain.patch_model(model)."
        )
    queries, keys = (query.shape[0], query.shape[2]), (key.shape[0], key.shape[2])
    if given is None:
        if spec is not None and queries == keys:
            raise lost_boundaries(module)
        given = find_documents_of_layer(mask, arguments, queries, keys, query.device, drop_queries)
    require_rows(module, given, queries, keys)
    return given


def is_causal_layer(module: nn.Module, is_causal: bool | None) -> bool:
    """Returns whether a layer attends causally: as the call says, else as the module does."""
    return bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)


def dropout_of(module: nn.Module, spec: AttentionSpec, dropout: float) -> float:
    """Returns the probability of dropping a weight: the spec's in training, else the call's."""
    if spec.dropout is None:
        return dropout
    return spec.dropout if module.training else 0.0


def scale_of(query: Tensor, scaling: float | None) -> float:
    """Returns the factor of q.k: the call's, else D^-0.5."""
    return query.shape[-1] ** -0.5 if scaling is None else scaling


def window_of(sliding_window: int | None, causal: bool) -> tuple[int, int]:
    """Returns the (left, right) keys that a query sees beside its own; -1 is unbounded."""
    if sliding_window is None:
        return (-1, -1)
    return (sliding_window - 1, 0 if causal else sliding_window - 1)


Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]


def attend(
    kernel: Kernel, query: Tensor, key: Tensor, value: Tensor, boundaries: Boundaries
) -> Tensor:
    """Drops padding, flattens, calls the kernel, puts padding back.

    Args:
        kernel: (q [T, H, D], k [Tk, Hk, D], v [Tk, Hk, D]) -> [T, H, D].
        query: [B, H, S, D].
        key: [B, Hk, Sk, D].
        value: [B, Hk, Sk, Dv].
        boundaries: Boundaries of the documents.

    Returns:
        [B, S, H, Dv] in the dtype of `value`, that of autocast where it is on; zero at padding.
    """
    value_dim = value.shape[-1]
    dtype = _compute_dtype(value)
    width = max(query.shape[-1], value_dim)  # multi-head latent attention: Dv differs from D
    q = _tokens(query, boundaries.indices_q, dtype, width)
    k = _tokens(key, boundaries.indices_k, dtype, width)
    v = _tokens(value, boundaries.indices_k, dtype, width)
    out = kernel(q, k, v)[..., :value_dim]
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
    """Returns v's dtype. Under autocast q and k are float32 after RoPE, but v is cast already."""
    device = value.device.type
    if value.dtype == torch.float32 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return value.dtype
