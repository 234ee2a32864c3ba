"""find_documents: decides where the documents of a batch begin and end.

The input hook (the forward pre-hook of a patched model) calls it once per forward pass, and passes
the Boundaries to every layer. A layer calls `find_documents_of_layer` itself in two cases: if the
key/value cache is filled, since its number of keys may differ between layers; and if the layer is
called without the model. The result is then cached on the mask or position ids, which the next
layers get too.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lctrain.attention.boundaries import (
    Boundaries,
    find_segments,
    from_cu_seqlens,
    from_padding,
    from_rows,
    from_segments,
    is_packed,
)
from lctrain.attention.cached import cached_rows
from lctrain.attention.mask import UNPATCH

# Arguments by which other libraries describe documents, and which lctrain does not read.
_OTHER_NUMBERS = ("block_sequence_ids", "document_ids", "doc_ids", "segment_ids", "sequence_ids")


def find_documents(
    queries: tuple[int, int],
    keys: tuple[int, int],
    device: torch.device,
    *,
    pack: dict[str, Any] | None = None,
    real: Tensor | None = None,
    numbers: Tensor | None = None,
    drop_queries: bool = True,
) -> Boundaries:
    """Returns the boundaries of the documents in a batch.

    The first of `pack`, `numbers` and `real` that is given decides. Without any of them each row is
    one document.

    Args:
        queries: Shape (B, S) of the query rows.
        keys: Shape (B, Sk) of the key rows; the queries belong to the last keys of a row.
        device: Device of the rows.
        pack: `cu_seq_lens_q/k` and `max_length_q/k` by name, as in `PackedBatch.model_kwargs()`.
        real: [B, Sk] bool, True at keys that are not padding; None if there is no padding.
        numbers: [B, S] integers, the number of each token's document; 0 at padding. See
            `number_documents`.
        drop_queries: Whether to leave out queries at padding; see `from_padding`.

    Raises:
        ValueError: if `pack` is incomplete, or is given with a filled key/value cache.
    """
    if pack is not None:
        if queries != keys:
            raise ValueError(
                f"packed inputs must have as many keys as queries, got {keys[1]} and {queries[1]} "
                "(a filled cache or cross-attention). Pass use_cache=False, and generate without "
                "cu_seq_lens."
            )
        return from_cu_seqlens(pack, queries, keys, device)
    if numbers is not None:
        return from_segments(numbers)
    if real is not None:
        return from_padding(real, queries[1], drop_queries=drop_queries)
    return from_rows(queries[0], queries[1], keys[1], device)


def number_documents(position_ids: Tensor, batch: int, real: Tensor | None = None) -> Tensor | None:
    """Numbers the documents of rows whose position ids restart at every document.

    Args:
        position_ids: [B, S] or [1, S] integers. A document ends where the next position is not one
            higher.
        batch: Number of rows B.
        real: [B, S] bool, True at tokens that are not padding; None if there is no padding.

    Returns:
        [B, S] int64, the number of each token's document from 1; 0 at padding. None if no row holds
        more than one document.

    Raises:
        ValueError: if `position_ids` does not have two dimensions.
    """
    if position_ids.dim() != 2:
        raise ValueError(
            f"position_ids must be [batch, tokens], got {list(position_ids.shape)}. Pass "
            "cu_seq_lens_q/k and max_length_q/k to say where documents end."
        )
    return find_segments(position_ids.expand(batch, -1), real)


def divide_documents(numbers: Tensor, position_ids: Tensor) -> Tensor:
    """Splits numbered documents where their position ids restart, and numbers the pieces.

    Args:
        numbers: [B, S] integers, the number of each token's document; 0 at padding.
        position_ids: [B, S] or [1, S] integers.

    Returns:
        [B, S] int64, the number of each token's document after the split; 0 at padding.

    Raises:
        ValueError: if `position_ids` does not have two dimensions.
    """
    if position_ids.dim() != 2:
        raise ValueError(
            f"position_ids must be [batch, tokens] beside a mask that numbers documents, got "
            f"{list(position_ids.shape)}. Leave them out."
        )
    restarts = F.pad(position_ids.expand(numbers.shape).diff(dim=-1) != 1, (1, 0), value=False)
    begins = restarts.to(numbers.device) | F.pad(numbers.diff(dim=-1) != 0, (1, 0), value=False)
    return (begins.cumsum(-1) + 1).masked_fill(numbers == 0, 0)


def number_by_index(
    arguments: dict[str, Any], rows: tuple[int, int], real: Tensor | None = None
) -> Tensor | None:
    """Numbers the documents that the argument `seq_idx` describes.

    Args:
        arguments: Keyword arguments of the model or layer. `seq_idx`, [B, S] or [1, S] integers, is
            the index of each token's document, negative at padding.
        rows: Shape (B, S) of the tokens.
        real: [B, S] bool, True at tokens that are not padding; None if there is no padding.

    Returns:
        [B, S] int64, the number of each token's document from 1; 0 at padding. None if there is no
        `seq_idx`, or if `cu_seq_lens` describes the documents.

    Raises:
        ValueError: if `seq_idx` has another shape or dtype, or an argument describes documents that
            lctrain does not read.
    """
    if is_packed(arguments):
        return None
    for name in _OTHER_NUMBERS:
        value = arguments.get(name)
        # document_ids [N] of a PackedBatch is allowed: it keys dropout, and describes no documents.
        if isinstance(value, Tensor) and (name != "document_ids" or value.dim() > 1):
            raise ValueError(
                f"{name} must be None, got a tensor, which these kernels do not read. Say where "
                "documents end by cu_seq_lens_q/k and max_length_q/k, or by seq_idx."
            )
    index = arguments.get("seq_idx")
    if index is None:
        return None
    if (
        not isinstance(index, Tensor)
        or index.is_floating_point()
        or tuple(index.shape) not in (rows, (1, rows[1]))
    ):
        got = f"{index.dtype} {list(index.shape)}" if isinstance(index, Tensor) else repr(index)
        raise ValueError(
            f"seq_idx must be integers of the inputs' shape {list(rows)}, got {got}. Pass the "
            "index of each token's document, or cu_seq_lens_q/k and max_length_q/k."
        )
    index = index.expand(rows)
    padding = index < 0 if real is None else (index < 0) | ~real.to(index.device)
    numbers = F.pad(index.diff(dim=-1) != 0, (1, 0), value=False).cumsum(-1) + 1
    return numbers.masked_fill(padding, 0)


def find_documents_of_layer(
    mask: Tensor | None,
    arguments: dict[str, Any],
    queries: tuple[int, int],
    keys: tuple[int, int],
    device: torch.device,
    drop_queries: bool,
) -> Boundaries:
    """Returns the boundaries of the documents in one layer's rows, from the layer's arguments.

    Args:
        mask: The result of flash_attention_mask: [B, Sk] bool, [B, S] numbers of documents, or
            None.
        arguments: Keyword arguments of the layer. `cu_seq_lens_q/k`, `max_length_q/k`,
            `seq_idx` and `position_ids` are read.
        queries: Shape (B, S) of the query rows.
        keys: Shape (B, Sk) of the key rows.
        device: Device of the rows.
        drop_queries: Whether to leave out queries at padding; see `from_padding`.

    Raises:
        ValueError: if the arguments contradict one another.
    """
    if mask is not None and mask.dim() != 2:
        raise ValueError(
            f"attention_mask must be [batch, tokens], got {list(mask.shape)}. Describe documents "
            f"by cu_seq_lens and padding by a 2-D mask. {UNPATCH}"
        )
    is_padding = mask is not None and mask.dtype == torch.bool
    if arguments.get("seq_idx") is not None and queries != keys and not is_packed(arguments):
        refuse_index_of_cache(arguments)
    index = number_by_index(arguments, queries, mask if is_padding else None)
    if index is not None:
        if mask is not None and not is_padding:
            refuse_two_numbers()
        return find_documents(queries, keys, device, numbers=index)
    if is_packed(arguments):
        refuse_mask_of_pack(mask if is_padding else None)
        return find_documents(queries, keys, device, pack=arguments)
    if mask is not None:
        if mask.shape[1] != keys[1]:
            raise ValueError(
                f"attention_mask must cover the {keys[1]} keys, got {mask.shape[1]} (a cache of "
                f"fixed size). Use a DynamicCache. {UNPATCH}"
            )
        real, numbers = (mask, None) if is_padding else (None, mask)

        def find() -> Boundaries:
            return find_documents(
                queries, keys, device, real=real, numbers=numbers, drop_queries=drop_queries
            )

        return remember(mask, find, (queries, keys, drop_queries))
    position_ids = arguments.get("position_ids")
    if position_ids is None or queries != keys or queries[1] == 1:
        return find_documents(queries, keys, device)

    def find_restarts() -> Boundaries:
        numbers = number_documents(position_ids, queries[0])
        return find_documents(queries, keys, device, numbers=numbers)

    return remember(position_ids, find_restarts, (queries, keys))


def rows_of_mask(mask: Tensor, keys: int) -> Tensor | None:
    """Returns `cached_rows` of a mask over all keys, computed once for all layers of a call.

    Args:
        mask: [B, Sk] bool, True at keys that are not padding.
        keys: Number of keys Sk.
    """
    return remember(
        mask, lambda: cached_rows(mask, mask.shape[0], keys, mask.device), ("cached_rows", keys)
    )


def refuse_mask_of_pack(mask: Any) -> None:
    """Raises a ValueError if packed inputs (`cu_seq_lens`) come with a padding mask.

    Args:
        mask: The padding mask of the call; None if there is none.
    """
    if mask is not None:
        raise ValueError(
            "attention_mask must be None for packed inputs, got both a padding mask and "
            "cu_seq_lens. Drop the mask: a pack holds no padding. If you passed none, an outer "
            "model made it: call the patched language model by itself, model.get_decoder()."
        )


def refuse_two_numbers() -> None:
    """Raises a ValueError: both the mask and `seq_idx` number the documents."""
    raise ValueError(
        "attention_mask must be 0 or 1 beside seq_idx, got numbers of documents in both. Pass one "
        "of the two."
    )


def refuse_index_of_cache(arguments: dict[str, Any]) -> None:
    """Raises a ValueError if `seq_idx` is given while a key/value cache is filled.

    Args:
        arguments: Keyword arguments of the model or layer.
    """
    if arguments.get("seq_idx") is not None:
        raise ValueError(
            "seq_idx must be None on top of a filled key/value cache, got an index of documents. "
            "Pass use_cache=False and no past_key_values, or leave seq_idx out."
        )


@torch.compiler.disable
def remember(tensor: Any, find: Callable[[], Any], options: tuple[Any, ...]) -> Any:
    """Returns find(), which runs once per tensor: the result is stored as an attribute of `tensor`.

    All layers of a model get the same tensor.

    Args:
        tensor: The mask or position ids that find() reads.
        find: Function that computes the result.
        options: All other inputs of the computation; a part of the cache key.
    """
    if tensor.is_inference():
        return find()  # inference tensors have no _version that would reveal a change in place
    known = getattr(tensor, "_lctrain_known", {})
    key = (tensor._version, *options)
    if key not in known:
        known[key] = find()
        tensor._lctrain_known = known
    return known[key]
