"""PagedStep: the CacheStep of one forward pass over the rows of a PagedCache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lctrain.attention.cache_step import StepAttention
from lctrain.attention.cached import MOST_QUERIES
from lctrain.generation.paged_rows import PagedRows
from lctrain.generation.pages import PAGE
from lctrain.generation.prefill import boundaries
from lctrain.generation.shared_pages import SharedPages
from lctrain.transfer import upload

if TYPE_CHECKING:
    from lctrain_kernels.pack import Pack


class PagedStep:
    """Stores the new tokens of all rows, and attends to the cache.

    One or a few new tokens per row are for the decode kernels. More are packs: of the new tokens,
    or, if rows hold tokens, of all keys, which are gathered. Padding is a document of its own in a
    pack, and is not stored.

    Args:
        rows: Pages of the rows, with room for the new tokens.
        shared: Finds the pages that rows have in common.
        padding: Padding on the left of each row's new tokens.
        known: For each row, how many of its first tokens a row before it stores.
        tokens: Tokens S of each row in the pass, padding counted.
        attended: Is called with the index of each layer whose attention was computed.
    """

    lengths: Tensor | None = None

    def __init__(
        self,
        rows: PagedRows,
        shared: SharedPages,
        padding: Sequence[int],
        known: Sequence[int],
        tokens: int,
        attended: Callable[[int], None],
    ) -> None:
        self._rows = rows
        self._shared = shared
        self._padding = padding
        self._known = known
        self._tokens = tokens
        self._attended = attended
        self._device = rows.pool.layer(0)[0].device
        self._stored = upload(torch.tensor(rows.stored, dtype=torch.int32), self._device)
        self._host_table = rows.table()
        self._table = upload(self._host_table, self._device)
        self._plans: dict[bool, Any] = {}
        self._pack: Pack | None = None

    @property
    def positions(self) -> Tensor:
        """Position of each token in its row, [B, S] int64; 0 at padding."""
        begins = upload(torch.tensor(self._padding), self._device)
        place = torch.arange(self._tokens, device=self._device)
        return (self._stored.long() - begins)[:, None].add(place).clamp(min=0)

    def attend(
        self,
        module: nn.Module,
        states: tuple[Tensor, Tensor, Tensor],
        attention: StepAttention,
        arguments: dict[str, Any],
    ) -> Tensor:
        """Returns the output of a layer, [B, S, H', W]; see CacheStep.

        Args:
            module: The attention layer.
            states: Queries [B, H, S, D], and new keys and values [B, Hk, S, D].
            attention: Attention of the layer.
            arguments: Further keyword arguments of the layer.

        Raises:
            ValueError: if keys and values have another shape or dtype than the cache.
        """
        layer, shape = int(module.layer_idx), self._rows.pool.shape  # type: ignore[arg-type]
        query, key, value = states
        given = (key.shape[1], key.shape[3], value.shape[3], value.dtype)
        if layer >= shape.layers or given != (*shape[1:3], shape.head_dim, shape.dtype):
            raise ValueError(
                f"a PagedCache must be for the model and the precision that it was made with, keys "
                f"[{shape.heads}, {shape.head_dim}] in {shape.dtype} in {shape.layers} layers, got "
                f"[{key.shape[1]}, {key.shape[3]}] in {value.dtype} in layer {layer}. Make it from "
                "this model, under the same autocast."
            )
        keys, values = self._rows.pool.layer(layer)
        q, k, v = (x.transpose(1, 2).to(keys.dtype) for x in (query, key, value))
        # A batch-invariant layer, which takes no plans, has decode steps of one query only.
        few = self._tokens == 1 or (self._tokens <= MOST_QUERIES and attention.plans)
        if few and any(self._rows.stored) and not any(self._padding):
            out = self._decode(q, k, v, (keys, values), attention)
        else:
            out = self._prefill(q, k, v, (keys, values), attention)
        self._attended(layer)
        return out

    def _decode(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pages: tuple[Tensor, Tensor],
        attention: StepAttention,
    ) -> Tensor:
        plan = {"plan": self._plan(attention.windowed)} if attention.plans else {}
        return attention.stored(
            q, *pages, k=k, v=v, cache_seqlens=self._stored, block_table=self._table, **plan
        )

    def _plan(self, windowed: bool) -> Any:
        """Returns the plan of layers with or without a window, made once per pass."""
        from lctrain_kernels.decode.plan import make_decode_plan

        if windowed not in self._plans:
            rows, shared = self._rows, None
            if not windowed and self._tokens == 1:
                shared = self._shared.find(rows.version, rows.stored, self._host_table)
            if shared is not None:
                shared = shared._replace(
                    prefix=upload(shared.prefix, self._device),
                    members=upload(shared.members, self._device),
                    groups=upload(shared.groups, self._device),
                )
            self._plans[windowed] = make_decode_plan(
                self._stored,
                self._table.shape[1] * PAGE,
                rows.pool.shape.head_dim,
                rows.pool.shape.dtype,
                seqlen_q=self._tokens,
                new_tokens=self._tokens,
                shared_prefixes=shared,
            )
        return self._plans[windowed]

    def _prefill(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pages: tuple[Tensor, Tensor],
        attention: StepAttention,
    ) -> Tensor:
        if self._pack is None:
            self._make_pack()
        assert self._pack is not None
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        stores = [store.flatten(0, 1) for store in pages]
        for store, new in zip(stores, (k, v), strict=True):
            store.index_copy_(0, self._slots, new.index_select(0, self._new))
        if self._keys is not None:
            k, v = (store.index_select(0, self._keys) for store in stores)
        out = attention.packed(q, k, v, self._pack)
        return out.unflatten(0, (-1, self._tokens))

    def _make_pack(self) -> None:
        """Makes the pack of the new tokens, in which the padding of a row comes before the row."""
        from lctrain_kernels.pack import checked_pack

        rows, tokens = self._rows, self._tokens
        new, slots, queries, lengths, keys = [], [], [], [], []
        filled = any(rows.stored)
        for row, (stored, pad) in enumerate(zip(rows.stored, self._padding, strict=True)):
            end = stored + tokens - pad
            begin = max(stored, self._known[row])
            new.append(torch.arange(end - begin) + (row + 1) * tokens - (end - begin))
            slots.append(rows.slots(row, begin, end))
            queries += [pad, tokens - pad]
            lengths += [0, end] if filled else [pad, tokens - pad]
            if filled:
                keys.append(rows.slots(row, 0, end))
        self._new, self._slots = (upload(torch.cat(parts), self._device) for parts in (new, slots))
        self._keys = upload(torch.cat(keys), self._device) if filled else None
        begins = upload(boundaries(queries), self._device)
        self._pack = checked_pack(
            begins,
            upload(boundaries(lengths), self._device) if filled else begins,
            sum(queries),
            sum(lengths),
            self._device,
            max_seqlen_q=max(queries),
            max_seqlen_k=max(lengths),
        )
