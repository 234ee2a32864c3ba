"""Prepares a model for dual chunk attention: checks, default options, and the input hook."""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from lctrain.attention.boundaries import Boundaries
from lctrain.attention.cache_step import STEP_ARGUMENT
from lctrain.attention.cached import MOST_QUERIES
from lctrain.attention.documents import find_documents
from lctrain.attention.dual_chunk import (
    DUAL_CHUNK_ARGUMENT,
    DualChunkInputs,
    dual_chunk_logit_scale,
    dual_chunk_positions,
    length_logit_scale,
    refuse_for_dual_chunk,
)
from lctrain.attention.forward import BOUNDARIES_ARGUMENT
from lctrain.attention.spec import DualChunkSpec
from lctrain.models.cache import given_cache, given_rows
from lctrain.models.code import parameters
from lctrain.models.differential_fit import refuse_differential_layers
from lctrain.models.frequencies import follows_length, require_document_frequencies
from lctrain.models.inputs import InputHook
from lctrain.models.rotary import find_rotary, probe_layers, require_half_split
from lctrain.models.window import configured_window
from lctrain.warn import warn_caller


def fit_dual_chunk(model: Any, spec: DualChunkSpec) -> DualChunkSpec:
    """Checks that a model supports dual chunk attention, and fills in missing options.

    Args:
        model: A transformers model that attention="flash" supports.
        spec: Options from the user.

    Returns:
        The spec with `chunk_size`, `local_size` and `window` set, see `follow_window`.

    Raises:
        ValueError: if the model does not use rotary embeddings as Llama does, has differential
            layers or layers that are not causal over all keys, counts positions itself, or has no
            known window.
    """
    refuse_differential_layers(model)
    spec = follow_window(model.config, spec)
    rotary = find_rotary(model)
    for probe in probe_layers(model, rotary):
        arguments = probe.arguments
        causal = arguments.get("is_causal")
        refuse_for_dual_chunk(
            probe.layer,
            causal=getattr(probe.layer, "is_causal", True) if causal is None else causal,
            sliding_window=arguments.get("sliding_window"),
            softcap=arguments.get("softcap"),
            s_aux=arguments.get("s_aux"),
        )
        require_half_split(probe)
    _require_fixed_frequencies(rotary, spec)
    require_document_frequencies(model)
    if "position_ids" not in parameters(model):
        raise ValueError(
            f"model must take position_ids for dual chunk attention, got {type(model).__name__}, "
            "which counts them itself. Patch it with attention='flash'."
        )
    return spec


def follow_window(config: Any, spec: DualChunkSpec) -> DualChunkSpec:
    """Fills in `window`, `chunk_size` and `local_size` from a model's config, where they are None.

    Warns if `chunk_size` exceeds the window, since the model was not trained on such relative
    positions.

    Args:
        config: A transformers configuration.
        spec: Options from the user.

    Raises:
        ValueError: if `spec` has no window and the config states none.
    """
    published = getattr(config, "dual_chunk_attention_config", None) or {}
    window = spec.window or configured_window(config)
    if window is None:
        raise ValueError(
            f"window must be given for {type(config).__name__}, which does not say what the model "
            "was trained on (max_position_embeddings). Pass window= to patch_model."
        )
    chunk_size, local_size = spec.chunk_size, spec.local_size
    if chunk_size is None:
        chunk_size = published.get("chunk_size", window - 1)
        local_size = published.get("local_size") if local_size is None else local_size
    if local_size is None:
        local_size = (chunk_size + 1) // 8
    if chunk_size > window:
        warn_caller(
            f"chunk_size should be below the trained window of {window} tokens, got {chunk_size}: "
            f"relative positions from {window} to {chunk_size} occur, which the model has never "
            "seen, and long texts are read the worse for it. Leave chunk_size out, or pass window= "
            "if the model was trained on longer texts than its config says.",
        )
    return dataclasses.replace(spec, window=window, chunk_size=chunk_size, local_size=local_size)


def _require_fixed_frequencies(rotary: Any, spec: DualChunkSpec) -> None:
    """Raises a ValueError if chunks are so long that the model's RoPE changes its frequencies.

    Args:
        rotary: The model's rotary embedding.
        spec: Options with all sizes set.
    """
    kind = getattr(rotary, "rope_type", "default")
    if not follows_length(kind):
        return
    trained, reach = rotary.original_max_seq_len, spec.chunk
    if kind == "longrope":
        trained = rotary.config.rope_parameters["original_max_position_embeddings"]
        assert spec.chunk_size is not None
        reach = spec.chunk_size + 1  # longest document whose output is that of plain attention
    if reach > trained:
        raise ValueError(
            f"chunks must hold at most the {trained} tokens from which on rope_type {kind!r} "
            f"changes its frequencies, got {reach}. Pass window={trained}, or a smaller chunk_size."
        )


class DualChunkHook(InputHook):
    """The input hook for dual chunk attention: also sets the positions for RoPE.

    The user's position ids are read to find the documents, and are then replaced: by positions
    counted from the start of each document, cached tokens included, modulo the chunk length. RoPE
    depends only on differences of positions, so the user's first position does not matter. The hook
    also passes DualChunkInputs to all layers.

    Args:
        model: A transformers model that `fit_dual_chunk` accepts.
        spec: Options with all sizes set.
    """

    def __init__(self, model: Any, spec: DualChunkSpec) -> None:
        super().__init__(model, spec)
        self.spec = spec
        rotary = find_rotary(model)
        # The name is stored, so that a rotary embedding that is replaced later is found too.
        self.rotary = next(name for name, module in model.named_modules() if module is rotary)

    def __call__(
        self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Returns the arguments for the model's forward; None leaves them unchanged."""
        prepared = super().__call__(model, args, kwargs)
        if prepared is None:
            return None
        _, inputs = prepared
        if DUAL_CHUNK_ARGUMENT in inputs:
            return prepared
        boundaries = inputs.get(BOUNDARIES_ARGUMENT)
        if boundaries is None:
            boundaries = inputs[BOUNDARIES_ARGUMENT] = _continued_boundaries(inputs)
        inputs["position_ids"] = dual_chunk_positions(self.spec, boundaries)
        inputs[DUAL_CHUNK_ARGUMENT] = DualChunkInputs(
            model.get_submodule(self.rotary), dual_chunk_logit_scale(self.spec, boundaries)
        )
        return (), inputs

    def _refuse_lengths(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        """Does nothing: RoPE uses the frequencies of short texts, whatever the lengths."""

    def _leave_to_layers(
        self, model: nn.Module, inputs: dict[str, Any], tokens: Tensor
    ) -> dict[str, Any]:
        """Adds positions and DualChunkInputs to the inputs of a call on a cache.

        A CacheStep counts the positions of every request from 0. In a cache of fixed size, the
        mask says where the keys of a row begin and end. A call with many queries gets boundaries
        too, so that the kernels of packs compute it.

        Args:
            model: The model.
            inputs: Keyword arguments of the model.
            tokens: Tokens or embeddings of the call, [B, S, ...].
        """
        if DUAL_CHUNK_ARGUMENT in inputs:
            return inputs  # from the hook of the outer model
        inputs = super()._leave_to_layers(model, inputs, tokens)
        rotary, scale = model.get_submodule(self.rotary), None
        step = inputs.get(STEP_ARGUMENT)
        if step is not None:
            counted = getattr(step, "positions", None)  # of rows, which may have padding
            positions = (inputs["position_ids"] if counted is None else counted) % self.spec.chunk
            if step.lengths is not None:
                scale = length_logit_scale(self.spec, step.lengths)
        else:
            rows = given_rows(inputs)
            assert rows is not None
            first, end = rows.flatten(1).long()  # both [B]
            queries = tokens.shape[1]
            begin = (end - queries - first)[:, None]
            positions = begin + torch.arange(queries, device=rows.device)
            positions = positions.clamp(min=0) % self.spec.chunk
            scale = length_logit_scale(self.spec, end - first)
            if queries > MOST_QUERIES and not torch.compiler.is_compiling():
                boundaries = _boundaries_of_rows(rows, queries)
                inputs = inputs | {BOUNDARIES_ARGUMENT: boundaries}
                scale = dual_chunk_logit_scale(self.spec, boundaries)
        if self.rotaries:
            self._tell_lengths(model, positions)
        return inputs | {
            "position_ids": positions,
            DUAL_CHUNK_ARGUMENT: DualChunkInputs(rotary, scale),
        }

    def _tell_lengths(self, model: nn.Module, lengths: Tensor) -> None:
        """Sets every document's length to 1, so that RoPE uses the frequencies of short texts.

        Args:
            model: The model.
            lengths: [B, S], lengths of the documents, which are not used.
        """
        super()._tell_lengths(model, torch.ones_like(lengths))


def _continued_boundaries(inputs: dict[str, Any]) -> Boundaries:
    """Returns the boundaries of a batch whose first keys are in the key/value cache.

    Each row is one document.

    Args:
        inputs: Keyword arguments of the model.
    """
    tokens = inputs.get("input_ids")
    tokens = inputs["inputs_embeds"] if tokens is None else tokens
    rows, queries = tokens.shape[:2]
    keys = int(given_cache(inputs).get_seq_length()) + queries
    mask, shapes = inputs.get("attention_mask"), ((rows, queries), (rows, keys))
    if mask is None:
        return find_documents(*shapes, tokens.device)
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[1] < keys:
        shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"attention_mask must be [batch, tokens] and cover the {keys} keys in the cache and "
            f"the input, got {shape}. Pass one value per token, those in the cache included."
        )
    # As in transformers, column i is the row's token i, and the mask may have further columns.
    real = mask[:, :keys].to(device=tokens.device, dtype=torch.bool)
    return find_documents(*shapes, tokens.device, real=real)


def _boundaries_of_rows(rows: Tensor, queries: int) -> Boundaries:
    """Returns the boundaries of the last queries of rows in a cache of fixed size.

    Synchronises with the device.

    Args:
        rows: Result of cached_rows, [2, B, 1, 1].
        queries: Queries S of each row.
    """
    first, end = rows.flatten(1)
    keys = int(end.max())
    column = torch.arange(keys, device=rows.device)
    real = (column >= first[:, None]) & (column < end[:, None])
    batch = rows.shape[1]
    return find_documents((batch, queries), (batch, keys), rows.device, real=real)
