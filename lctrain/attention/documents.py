"""find_documents: the one place that decides where the documents of a batch begin and end.

The input hook of a patched model asks once per forward pass, and its answer goes to every layer. A
layer asks for itself where no hook has: on top of a filled cache, in which layers may hold
different numbers of keys, and in a call by itself. The answer is then remembered for the next
layers, which are given the same tensors.
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
from lctrain.attention.mask import UNPATCH


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
    """Returns the documents of rows, from what is known of them.

    Args:
        queries: (B, S) of the query rows.
        keys: (B, Sk) of the key rows; the queries are the last ones of a row.
        device: Device of the rows.
        pack: The arguments of a pack, `cu_seq_lens_q` and the others; nothing else is read then.
        real: [B, Sk] bool, True at real keys; None if there is no padding.
        numbers: [B, S] integers, 0 at padding, else the number of the token's document; wins over
            `real`. See `number_documents`.
        drop_queries: As in `from_padding`.

    Raises:
        ValueError: if a pack is incomplete or has a filled cache.
    """
    if pack is not None:
        if queries != keys:
            raise ValueError(
                f"packed inputs must have as many keys as queries, got {keys[1]} and {queries[1]} "
                "(a filled cache or cross-attention). Pass use_cache=False, and generate without "
                "cu_seq_lens."
            )
        return from_cu_seqlens(pack, queries, keys)
    if numbers is not None:
        return from_segments(numbers)
    if real is not None:
        return from_padding(real, queries[1], drop_queries=drop_queries)
    return from_rows(queries[0], queries[1], keys[1], device)


def number_documents(position_ids: Tensor, batch: int, real: Tensor | None = None) -> Tensor | None:
    """Numbers the documents of rows whose positions restart.

    Args:
        position_ids: [B, S] or [1, S] integers; a document ends where the next is not one higher.
        batch: B.
        real: [B, S] bool, True at real tokens; None if there is no padding.

    Returns:
        [B, S] int64, 0 at padding; None if no row holds more than one document.

    Raises:
        ValueError: if positions are not one per token.
    """
    if position_ids.dim() != 2:
        raise ValueError(
            f"position_ids must be [batch, tokens], got {list(position_ids.shape)}. Pass "
            "cu_seq_lens_q/k and max_length_q/k to say where documents end."
        )
    return find_segments(position_ids.expand(batch, -1), real)


def divide_documents(numbers: Tensor, position_ids: Tensor) -> Tensor:
    """Numbers documents again, where restarting positions divide them further.

    Args:
        numbers: [B, S] integers, 0 at padding, else the number of the token's document.
        position_ids: [B, S] or [1, S] integers.

    Returns:
        [B, S] int64, 0 at padding.

    Raises:
        ValueError: if positions are not one per token.
    """
    if position_ids.dim() != 2:
        raise ValueError(
            f"position_ids must be [batch, tokens] beside a mask that numbers documents, got "
            f"{list(position_ids.shape)}. Leave them out."
        )
    restarts = F.pad(position_ids.expand(numbers.shape).diff(dim=-1) != 1, (1, 0), value=False)
    begins = restarts.to(numbers.device) | F.pad(numbers.diff(dim=-1) != 0, (1, 0), value=False)
    return (begins.cumsum(-1) + 1).masked_fill(numbers == 0, 0)


def find_documents_of_layer(
    mask: Tensor | None,
    arguments: dict[str, Any],
    queries: tuple[int, int],
    keys: tuple[int, int],
    device: torch.device,
    drop_queries: bool,
) -> Boundaries:
    """Returns the documents of one layer's rows, from the arguments that the layer is given.

    Args:
        mask: What flash_attention_mask returned: [B, Sk] bool, or [B, S] numbers of documents.
        arguments: Arguments of the layer: those of a pack, or `position_ids`.
        queries: (B, S) of the query rows.
        keys: (B, Sk) of the key rows.
        device: Device of the rows.
        drop_queries: As in `from_padding`.

    Raises:
        ValueError: if the arguments contradict one another.
    """
    if mask is not None and mask.dim() != 2:
        raise ValueError(
            f"attention_mask must be [batch, tokens], got {list(mask.shape)}. Describe documents "
            f"by cu_seq_lens and padding by a 2-D mask. {UNPATCH}"
        )
    is_padding = mask is not None and mask.dtype == torch.bool
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

        return _remember(mask, find, (queries, keys, drop_queries))
    position_ids = arguments.get("position_ids")
    if position_ids is None or queries != keys or queries[1] == 1:
        return find_documents(queries, keys, device)

    def find_restarts() -> Boundaries:
        numbers = number_documents(position_ids, queries[0])
        return find_documents(queries, keys, device, numbers=numbers)

    return _remember(position_ids, find_restarts, (queries, keys))


def refuse_mask_of_pack(mask: Any) -> None:
    """Raises a ValueError for a padding mask beside a pack's arguments."""
    if mask is not None:
        raise ValueError(
            "attention_mask must be None for packed inputs, got both a padding mask and "
            "cu_seq_lens. Drop the mask: a pack holds no padding. If you passed none, an outer "
            "model made it: call the patched language model by itself, model.get_decoder()."
        )


@torch.compiler.disable
def _remember(tensor: Any, find: Callable[[], Boundaries], options: tuple[Any, ...]) -> Boundaries:
    """Calls find() once per forward, since all layers get the same tensor."""
    if tensor.is_inference():
        return find()  # has no version by which to notice a change in place
    known = getattr(tensor, "_lctrain_known", {})
    key = (tensor._version, *options)
    if key not in known:
        known[key] = find()
        tensor._lctrain_known = known
    return known[key]
