"""Attention over the paged key/value cache of transformers' continuous batching.

transformers has two layouts of a batch. With a block table, every request has one query, and the
decode kernels write the new keys into the pages and read them there. Otherwise, the cache gathers
the keys of all requests, and queries and keys are packs.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lctrain.attention.cache_step import StepAttention

if TYPE_CHECKING:
    from lctrain_kernels.pack import Pack

PAGED_CACHE = "PagedAttentionCache"
"""Class name of transformers' paged cache."""


def paged_cache(arguments: Mapping[str, Any]) -> Any:
    """Returns the paged cache among a model's arguments; None if there is none.

    Args:
        arguments: Keyword arguments of a model.
    """
    cache = arguments.get("cache")
    return cache if type(cache).__name__ == PAGED_CACHE else None


class PagedForward:
    """The CacheStep of one forward pass: builds each pack once, for all layers of the pass.

    The input hook passes it to the layers. A layer that gets none was not reached through the
    patched model.
    """

    lengths: Tensor | None = None

    def __init__(self) -> None:
        self._packs: dict[tuple[int, int], tuple[Tensor, Pack]] = {}

    def pack(self, queries: Tensor, keys: Tensor, cu_seqlens_q: Tensor, found: PagedKeys) -> Pack:
        """Returns the pack of the requests and of one document of padding.

        transformers pads batches for CUDA graphs. Its padding is the last document of the pack,
        which has no token in a batch without padding. So nothing is read from the device, unless
        the checks of the kernels read values there.

        Args:
            queries: Queries [T, H, D].
            keys: Keys [Tk, Hk, D].
            cu_seqlens_q: Cumulative numbers of queries, [N + 1] integers.
            found: Keys of the layer.
        """
        from lctrain_kernels.checks import reads_values
        from lctrain_kernels.pack import checked_pack

        key = (id(found.cu_seqlens_k), len(keys))
        if key not in self._packs:
            longest_q, longest_k = found.longest_q, found.longest_k
            if reads_values(queries.device):  # the check of a bound counts the padding, too
                longest_q = max(longest_q, len(queries) - int(cu_seqlens_q[-1]))
                longest_k = max(longest_k, len(keys) - int(found.cu_seqlens_k[-1]))
            pack = checked_pack(
                F.pad(cu_seqlens_q.int(), (0, 1), value=len(queries)),
                F.pad(found.cu_seqlens_k.int(), (0, 1), value=len(keys)),
                len(queries),
                len(keys),
                queries.device,
                max_seqlen_q=longest_q,
                max_seqlen_k=longest_k,
            )
            self._packs[key] = (found.cu_seqlens_k, pack)  # the tensor lives as long as its id
        return self._packs[key][1]

    def attend(
        self,
        module: nn.Module,
        states: tuple[Tensor, Tensor, Tensor],
        attention: StepAttention,
        arguments: dict[str, Any],
    ) -> Tensor:
        """Returns the output of a layer, [1, T, H', W]; see CacheStep.

        It is of no meaning at queries that belong to no request. The cache changes `arguments`.

        Raises:
            ValueError: if values have another head dim than keys.
        """
        query, key, value = states
        if value.shape[-1] != key.shape[-1]:
            raise ValueError(
                "continuous batching must have values of the keys' head dim, got "
                f"{value.shape[-1]} and {key.shape[-1]}. Call generate() instead."
            )
        found = _read_keys(module, key, value, arguments)
        q = query.squeeze(0).transpose(0, 1)
        if found.table is None or found.pages is None:
            pack = self.pack(q, found.k, arguments["cu_seq_lens_q"], found)
            return attention.packed(q, found.k, found.v, pack)[None]
        requests = found.table.shape[0]
        out = attention.stored(
            q[:requests, None],
            *found.pages,
            k=found.k[:requests, None],
            v=found.v[:requests, None],
            cache_seqlens=found.cu_seqlens_k.diff().int() - 1,  # -1 for padding: it has no key
            block_table=found.table.int(),
        )
        return F.pad(out.transpose(0, 1), (0, 0, 0, 0, 0, len(q) - requests))


class PagedKeys(NamedTuple):
    """Keys and values of one layer, as its cache gives them.

    Attributes:
        k: Keys [Tk, Hk, D]: with a block table, the new ones; otherwise all keys of all requests.
        v: Values, in the shape of k.
        cu_seqlens_k: Cumulative numbers of keys, the new ones counted, [N + 1] integers.
        longest_q: Largest number of queries of a request.
        longest_k: Largest number of keys of a request.
        table: Pages of each request, [N, pages per request] integers, -1 where unused; or None.
        pages: Keys and values of the cache, each [pages, page, Hk, D]; None without a table.
    """

    k: Tensor
    v: Tensor
    cu_seqlens_k: Tensor
    longest_q: int
    longest_k: int
    table: Tensor | None
    pages: tuple[Tensor, Tensor] | None


def _read_keys(
    module: nn.Module, key: Tensor, value: Tensor, arguments: dict[str, Any]
) -> PagedKeys:
    """Updates the cache, if the layer has not done so, and returns its keys.

    Layers update the cache themselves from transformers 5.24 on. In its old releases, the cache
    has other attributes and arguments.

    Args:
        module: The attention layer.
        key: New keys [1, Hk, T, D], or all keys if the layer has updated the cache.
        value: Values, in the shape of key.
        arguments: Keyword arguments of the layer, changed in place.
    """
    cache: Any = arguments.pop("cache", None)
    if cache is not None and _names_indices(type(cache).update):
        return _read_groups(cache, module, key, value, arguments)
    if cache is not None:
        key, value = cache.update(
            key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=arguments
        )
    table = arguments.get("block_table")
    k, v = (x.squeeze(0).transpose(0, 1) for x in (key, value))
    return PagedKeys(
        k,
        v,
        arguments["cu_seq_lens_k"],
        arguments["max_length_q"],
        arguments["max_length_k"],
        table,
        None if table is None else (arguments["k_cache"], arguments["v_cache"]),
    )


@functools.cache
def _names_indices(update: Callable[..., Any]) -> bool:
    """Returns whether a cache's `update` takes the indices by name, as in transformers 5.17."""
    return "read_index" in inspect.signature(update).parameters


def _read_groups(
    cache: Any, module: nn.Module, key: Tensor, value: Tensor, arguments: dict[str, Any]
) -> PagedKeys:
    """Does the work of _read_keys for the cache of transformers 5.17.

    The cache has groups of layers. A layer's tensors are those of its place in the group.
    """
    group, place = cache.layer_index_to_group_indices[module.layer_idx]
    full = cache.sliding_windows[module.layer_idx] == 1
    kind = "full_attention" if full else "sliding_attention"
    cu_seqlens_k, longest_k = (
        given[kind] if isinstance(given, dict) else given
        for given in (arguments["cu_seq_lens_k"], arguments["max_seqlen_k"])
    )
    lengths = (cu_seqlens_k, arguments["max_seqlen_q"], longest_k)
    table = arguments.get("block_table")
    if table is None:
        indices = {name: arguments[name] for name in ("read_index", "write_index")}
        k, v = cache.update(
            key_states=key, value_states=value, layer_idx=module.layer_idx, **indices
        )
        return PagedKeys(k, v, *lengths, None, None)
    k, v = (x.squeeze(0).transpose(0, 1) for x in (key, value))
    shape = (-1, cache.block_size, *k.shape[1:])
    pages = (cache.key_cache[place].view(shape), cache.value_cache[place].view(shape))
    return PagedKeys(k, v, *lengths, table[group], pages)


def paged_mask(device: torch.device) -> Tensor:
    """Returns a mask that transformers passes on to the layers as it is: a result of cached_rows.

    Without it, transformers would look for packed documents in the position ids, which reads them
    from the device.

    Args:
        device: Device of the layers.
    """
    return torch.zeros((2, 1, 1, 1), dtype=torch.int32, device=device)
