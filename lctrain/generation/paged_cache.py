"""PagedCache: a cache of transformers whose rows share pages, for beam search and samples."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from lctrain.generation.paged_rows import PagedRows, Prompt
from lctrain.generation.paged_step import PagedStep
from lctrain.generation.pages import CacheShape
from lctrain.generation.road import find_cache
from lctrain.generation.shared_pages import SharedPages
from lctrain.models.continued_rows import refuse_numbers
from lctrain.models.inputs import PLAIN_INPUTS
from lctrain.pluralize import pluralize

SHARING = ("auto", "always", "never")


class PagedCache(Cache):
    """Keys and values in pages, with one page table for all layers of a patched model.

        cache = lctrain.PagedCache(model)
        model.generate(**prompts, num_beams=4, past_key_values=cache)

    Rows with the same tokens share pages: the beams or samples of a prompt, and prompts that begin
    alike. Beam search reorders the page table, and moves no keys. A page is copied when a row
    appends to it while another row refers to it, which only the last, partly filled page can be.
    A page without a row is free for others.

    Args:
        model: A patched causal LM of transformers in eval mode, or a model of PEFT around one. The
            cache is for this model, and for the autocast in which it is made.
        pages: Number of pages, of 64 tokens each; None for a pool that grows. While it grows, the
            old and the new pages are in memory together.
        shared_prefixes: Whether a decode step reads the pages that rows share once for all of them:
            "auto", where that takes less time; "always"; or "never".

    Raises:
        ValueError: if the model cannot read a paged cache, or an argument does not fit.
    """

    def __init__(
        self, model: Any, *, pages: int | None = None, shared_prefixes: str = "auto"
    ) -> None:
        if pages is not None and (not isinstance(pages, int) or pages < 1):
            raise ValueError(
                f"pages must be an int of at least 1, or None, got {pages!r}. Leave it out for a "
                "pool that grows."
            )
        if shared_prefixes not in SHARING:
            raise ValueError(
                f"shared_prefixes must be one of {', '.join(SHARING)}, got {shared_prefixes!r}. "
                "Leave it out for 'auto'."
            )
        shape = _shape_of(model)
        super().__init__(layers=[_PagedLayer(self) for _ in range(shape.layers)])
        self._rows = PagedRows(shape, next(model.parameters()).device, pages)
        self._shared = SharedPages(shared_prefixes, self._rows.pool, model.device)
        self._columns = 0
        self._expected = -1

    @property
    def used_pages(self) -> int:
        """Number of pages that rows use."""
        return self._rows.pool.pages - self._rows.pool.free

    @property
    def batch_size(self) -> int:
        """Number of rows; -1 before the first tokens."""
        return len(self._rows.stored) or -1

    def begin_step(self, model: nn.Module, inputs: dict[str, Any], tokens: Tensor) -> PagedStep:
        """Returns the CacheStep of a forward pass, for whose tokens there are pages.

        The input hook of a patched model calls this.

        Args:
            model: The model.
            inputs: Its keyword arguments.
            tokens: Tokens or embeddings of the call, [B, S, ...].

        Raises:
            ValueError: if the inputs do not continue the rows of the cache, or it is full.
        """
        _require_inference(model)
        batch, count = tokens.shape[:2]
        if not self._columns:
            self._rows.clear(batch)
        if batch != len(self._rows.stored):
            raise ValueError(
                f"the key/value cache must have a row per row of the input ({batch}), got a "
                f"PagedCache with {pluralize(len(self._rows.stored), 'row')}. Call its reset(), or "
                "make a new one for each batch."
            )
        padding = self._padding(inputs.get("attention_mask"), batch, count)
        new = [count - pad for pad in padding]
        known = [0] * batch
        if any(self._rows.stored):
            self._rows.extend(new)
        else:
            known = self._rows.begin(_prompts(inputs, padding, count))

        def attended(layer: int) -> None:
            self._expected = layer + 1
            if self._expected == len(self.layers):
                self._rows.store(new)
                self._columns += count

        self._expected = 0
        return PagedStep(self._rows, self._shared, padding, known, count, attended)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Returns the new keys and values as they are: the attention of the layer stores them.

        Args:
            key_states: [B, Hk, S, D].
            value_states: [B, Hk, S, D].
            layer_idx: Index of the layer.
            *args: Not used.
            **kwargs: Not used.

        Raises:
            ValueError: if the layer does not belong to a patched model.
        """
        if layer_idx != self._expected:  # the attention of the layer before has not come here
            raise ValueError(
                "a PagedCache must be read by a patched model, got a layer whose attention does "
                "not. Call lctrain.patch_model(model) first, or generate with a DynamicCache."
            )
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Returns the tokens of a row in the cache, padding counted."""
        return self._columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Returns -1: rows have no longest length."""
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Returns the length and the offset of a mask over the keys.

        Transformers asks before the layers of a model without a CacheStep, which the layers refuse
        then. A pass with a CacheStep has a mask.
        """
        self._expected = -1
        return self._columns + query_length, 0

    def reset(self) -> None:
        """Forgets all rows, and frees their pages."""
        self._rows.clear()
        self._columns = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Makes row i a copy of row beam_idx[i], for beam search. No keys or values move.

        Args:
            beam_idx: [rows] integers.
        """
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Replaces each row by a number of rows that share its pages."""
        rows = range(len(self._rows.stored))
        self._rows.select([row for row in rows for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Replaces the rows by those of the indices, [n] integers."""
        chosen = torch.as_tensor(indices).flatten().tolist()
        count = len(self._rows.stored)
        wrong = [row for row in chosen if not -count <= row < count]
        if wrong:
            raise ValueError(
                f"indices must name rows from 0 to {count - 1}, got {wrong[0]}. Pass the index of "
                "a row in the cache."
            )
        self._rows.select([row % count for row in chosen])

    def crop(self, tokens_to_remove: int) -> None:
        """Removes tokens from the end of all rows.

        Args:
            tokens_to_remove: The number of tokens, negated, as in transformers.
        """
        if tokens_to_remove > 0 or -tokens_to_remove > self._columns:
            raise ValueError(
                f"tokens_to_remove must be from {-self._columns} to 0, got {tokens_to_remove}. "
                "Pass -n to remove the last n tokens."
            )
        self._rows.crop(-tokens_to_remove)
        self._columns += tokens_to_remove

    def _padding(self, mask: Any, batch: int, count: int) -> list[int]:
        """Returns the padding on the left of each row's new tokens; raises for other padding."""
        seen, stored = self._columns, self._rows.stored
        columns = seen + count
        if mask is None and all(tokens == seen for tokens in stored):
            return [0] * batch
        if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[1] < columns:
            got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(
                f"attention_mask must be [batch, tokens] and cover the {columns} keys in the cache "
                f"and the input, got {got}. Pass one value per token, those in the cache included."
            )
        if count > 1:
            refuse_numbers(mask)
        real = mask[:, :columns].bool().expand(batch, -1)
        new = real[:, seen:].sum(1)
        ends = torch.arange(count, device=mask.device) >= count - new[:, None]
        whole = (real[:, seen:] == ends).all(1)
        found = torch.stack((real[:, :seen].sum(1), new, whole)).tolist()
        for tokens, before, more, is_whole in zip(stored, *found, strict=True):
            if before != tokens or not is_whole or (tokens and more != count):
                raise ValueError(
                    "padding must be on the left of a row with a PagedCache, and stay the same for "
                    "the tokens in it, got other padding. Set the tokenizer's padding_side to "
                    "'left', or use a DynamicCache."
                )
        return [count - more for more in found[1]]


class _PagedLayer(CacheLayerMixin):
    """What transformers asks a layer of a PagedCache for; the cache itself has the rest.

    Args:
        cache: The cache.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, cache: PagedCache) -> None:
        super().__init__()
        self._cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Does nothing: the pages are there."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> NoReturn:
        """Raises: a page table serves all layers."""
        raise ValueError(
            "a PagedCache must be updated as a whole, got a call of one layer. Call the cache's "
            "update(), with layer_idx."
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Returns the length and the offset of a mask over the keys."""
        return self._cache.get_mask_sizes(query_length, 0)

    def get_seq_length(self) -> int:
        """Returns the tokens of a row in the cache, padding counted."""
        return self._cache.get_seq_length()

    def get_max_length(self) -> int:
        """Returns -1: rows have no longest length."""
        return -1


def _shape_of(model: Any) -> CacheShape:
    """Returns the shape of a model's cache; raises a ValueError if it cannot read pages."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = getattr(base, "config", None)
    if config is None:
        raise ValueError(
            f"model must be a causal LM of transformers, got {type(model).__name__}. Pass "
            "module.model of a LongContextModule."
        )
    if model.training:
        raise ValueError(
            "model must be in eval mode for a PagedCache, got training mode. Call model.eval()."
        )
    text = config.get_text_config(decoder=True)
    found: CacheShape | str
    if config.is_encoder_decoder:
        found = "it has an encoder and a decoder"
    elif getattr(text, "attention_chunk_size", None) is not None:
        found = "its layers attend within chunks"
    else:
        with torch.no_grad():
            found = find_cache(model)
    if isinstance(found, CacheShape):
        return found
    remedy = "Leave past_key_values out, for a DynamicCache."
    if found == "it is not patched":
        remedy = "Call lctrain.patch_model(model) first."
    raise ValueError(
        "a PagedCache must be for a patched causal LM whose layers attend to one cache of all "
        f"keys, got {type(base).__name__}: {found}. {remedy}"
    )


def _require_inference(model: nn.Module) -> None:
    """Raises a ValueError in a compiled forward, in training mode, and where gradients are kept."""
    reason = None
    if torch.compiler.is_compiling():
        reason = "a compiled forward. Call the model that torch.compile got"
    elif model.training:
        reason = "training mode. Call model.eval()"
    elif torch.is_grad_enabled():
        reason = "a pass that keeps gradients. Call it under torch.no_grad()"
    if reason is not None:
        raise ValueError(f"a PagedCache must be read in inference, got {reason}.")


def _prompts(inputs: dict[str, Any], padding: list[int], count: int) -> list[Prompt | int]:
    """Returns what empty rows begin with, without padding; see PagedRows.begin.

    Args:
        inputs: Keyword arguments of the model. If there are others than tokens and positions, such
            as images, tokens alone do not say what keys are.
        padding: Padding on the left of each row.
        count: Tokens S of each row, padding counted.
    """
    ids, positions = inputs.get("input_ids"), inputs.get("position_ids")
    given = {name for name, value in inputs.items() if isinstance(value, Tensor)}
    plain = ids is not None and given <= PLAIN_INPUTS
    counted = positions is None or (isinstance(positions, Tensor) and positions.dim() == 2)
    lengths = [count - pad for pad in padding]
    if not (plain and counted):
        return list(lengths)
    assert ids is not None
    place = torch.arange(count)[None] if positions is None else positions.cpu()
    place = place.expand(len(padding), -1)
    rows: list[Prompt | int] = []
    for row, pad, length, where in zip(ids.cpu(), padding, lengths, place, strict=True):
        # Positions count up: the input hook refuses others.
        rows.append(Prompt(tuple(row[pad:].tolist()), int(where[pad])) if length else 0)
    return rows
