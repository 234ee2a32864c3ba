"""InputHook: finds the documents in a patched model's inputs, once per forward pass."""

from typing import Any

import torch
from torch import Tensor, nn

from lctrain.attention.boundaries import (
    Boundaries,
    find_lengths,
    is_packed,
)
from lctrain.attention.cache_step import STEP_ARGUMENT
from lctrain.attention.documents import (
    refuse_index_of_cache,
)
from lctrain.attention.forward import BOUNDARIES_ARGUMENT
from lctrain.attention.paged import PagedForward, paged_cache, paged_mask
from lctrain.attention.prefixes import admit_groups, longest_document, refuse_model
from lctrain.attention.spec import AttentionSpec
from lctrain.models.adapters import refuse_virtual_tokens
from lctrain.models.architectures import (
    counts_positions_by_mask,
    counts_positions_itself,
    embeddings_read_mask,
    has_windows,
)
from lctrain.models.cache import (
    forgets_keys,
    give_rows,
    given_cache,
    given_rows,
    refuse_full,
    stepping_cache,
)
from lctrain.models.code import parameters
from lctrain.models.continued_rows import (
    continued_lengths,
    is_filled,
    refuse_numbers,
    refuse_restart,
)
from lctrain.models.frequencies import (
    attach_crossing,
    attach_frequencies,
    detach_frequencies,
    length_dependent,
)
from lctrain.models.heads import holds_several, keep_queries, pools_rows, refuse_choices, to_rows
from lctrain.models.holes import refuse_holes, row_length_within_windows
from lctrain.models.positions import (
    first_position,
    position_limit,
    require_first_position,
    require_positions,
)
from lctrain.models.read_boundaries import read_boundaries, refuse_unread
from lctrain.models.shared_attention import covered_tokens, give_positions, read_share
from lctrain.models.unpadding import find_unpadded, is_packable, is_padded, row_positions, unpad
from lctrain.models.window import cache_window, refuse_cut_keys
from lctrain.pluralize import pluralize

PLAIN_INPUTS = frozenset(
    {"input_ids", "attention_mask", "position_ids", "cache_position", "logits_to_keep"}
)
"""Tensors among a causal LM's inputs beside which token ids and positions determine all keys."""

_LONGER = "Split or truncate longer ones, or choose a model with rotary embeddings."


class InputHook:
    """A forward pre-hook (with_kwargs=True) of a patched model and of the models inside it.

    The hook checks the inputs, and adds the Boundaries of the documents as a keyword argument,
    which transformers passes on to the attention function. In training and for packs, it sets
    use_cache=False: transformers fills a key/value cache by default, and a cache does not keep
    documents apart. The hook of an inner model does nothing if the outer model's hook has run.

    Args:
        model: The transformers model that gets the hook.
        spec: Options of the model's attention.

    Attributes:
        implementation: Name of the attention in transformers, such as "lctrain_flash".
        first_position: Position id of a document's first token; above 0 for models that count
            positions themselves, as RoBERTa does.
        first_counted: The same for models that count positions themselves; None for others.
        reads_mask: Whether the embeddings depend on a row's attention mask.
        counts_by_mask: Whether positions that are not given come from a row's attention mask.
        position_limit: Number of positions in the model's table; None without a table.
        pools_rows: Whether the model's head gives one output per row.
        rotaries: Names of rotary embeddings whose frequencies depend on the document's length.
        names: Names of the forward's positional parameters.
        within_windows: Length up to which rows lie within a window; None without windows.
        cache_window: Keys that layers with windows keep in a cache; None without windows.
        windowed: Whether layers attended within windows when the model was patched.
        unpads: Whether rows with padding become one pack; UnpadSwap sets it.
    """

    def __init__(self, model: nn.Module, spec: AttentionSpec) -> None:
        self.implementation = spec.implementation
        self.first_position = first_position(model)
        self.first_counted = self.first_position if counts_positions_itself(model) else None
        self.reads_mask = embeddings_read_mask(model)
        self.counts_by_mask = counts_positions_by_mask(model)
        self.position_limit = position_limit(model)
        self.pools_rows = pools_rows(model)
        self.within_windows = row_length_within_windows(model, spec)
        self.cache_window = cache_window(model.config)
        self.windowed = has_windows(model)
        self.unpads = False
        self.rotaries = tuple(length_dependent(model))
        for name in self.rotaries:
            attach_frequencies(model.get_submodule(name))
        if self.rotaries:
            attach_crossing(model)
        self.names = tuple(
            name
            for name, parameter in parameters(model).items()
            if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        )

    def __call__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Returns the arguments for the model's forward; None leaves them unchanged."""
        given = kwargs.get(BOUNDARIES_ARGUMENT)
        if len(args) > len(self.names) or (given is not None and not self.unpads):
            return None
        inputs = dict(zip(self.names, args, strict=False)) | kwargs
        tokens = inputs.get("input_ids")
        tokens = inputs.get("inputs_embeds") if tokens is None else tokens
        if not isinstance(tokens, Tensor) or tokens.dim() < 2:
            return None  # the model raises its own error
        if tokens.dim() > (2 if tokens is inputs.get("input_ids") else 3):
            return None  # input [B, choices, S]; the inner model's hook gets rows [B * choices, S]
        if given is not None:
            packs = is_padded(given) and is_packable(model, inputs)
            return ((), self._unpad(model, inputs, tokens, given)) if packs else None
        self._refuse(model, inputs)
        rows = (tokens.shape[0], tokens.shape[1])
        if not self.windowed and forgets_keys(inputs):
            refuse_cut_keys(model)
        refuse_full(inputs, *rows, self.cache_window)
        give_rows(inputs, *rows)
        stepping = stepping_cache(inputs)
        if stepping is not None and STEP_ARGUMENT not in inputs:
            self._turn_cache_off(model, inputs)
            refuse_index_of_cache(inputs)
            refuse_restart(inputs, tokens.shape[1])
            return (), self._leave_to_layers(model, inputs, tokens)
        if paged_cache(inputs) is not None or given_rows(inputs) is not None:
            self._refuse_lengths(model, inputs)
            return (), self._leave_to_layers(model, inputs, tokens)
        admit_groups(inputs, is_packed(inputs))
        if is_packed(inputs):
            self._give_positions(model, inputs, tokens)
        self._turn_cache_off(model, inputs)
        mask = inputs.get("attention_mask")
        if is_filled(given_cache(inputs)):
            refuse_restart(inputs, tokens.shape[1])
            refuse_numbers(mask)
            refuse_index_of_cache(inputs)
            if self.rotaries:
                self._tell_lengths(model, continued_lengths(inputs, tokens))
            return (), inputs  # each layer finds its boundaries, since cached keys may differ
        if torch.compiler.is_exporting():
            refuse_unread(inputs)
        positions = inputs.get("position_ids")
        boundaries = self._read(model, inputs, tokens)
        if inputs.get("position_ids") is not positions:  # the mask or seq_idx numbers documents
            self._require_positions(model)
            inputs["position_ids"] = inputs["position_ids"] + self.first_position
        if inputs.get("attention_mask") is None and "attention_mask" in self.names:
            # Without a mask, transformers would read the position ids on the device.
            inputs["attention_mask"] = torch.ones(
                tokens.shape[:2], dtype=torch.int64, device=tokens.device
            )
        if self.position_limit is not None:
            longest = longest_document(boundaries.prefixes, boundaries.pack)
            require_positions(model, longest, "documents", _LONGER, self.position_limit)
        if boundaries.prefixes is not None:
            refuse_model(model, self.implementation, bool(self.rotaries), self.pools_rows)
        several = holds_several(boundaries)
        if several:
            refuse_choices(model)
            if inputs.get("input_ids") is None and not torch.compiler.is_compiling():
                refuse_virtual_tokens()
            if positions is not None:
                self._require_own_positions(model, positions, boundaries)
        if self.pools_rows and (several or (self.unpads and is_padded(boundaries))):
            if not several and positions is None:
                inputs["position_ids"] = row_positions(self.first_counted, inputs, tokens)
            inputs, boundaries = to_rows(model, inputs, boundaries)
        elif self.unpads and is_padded(boundaries) and is_packable(model, inputs):
            return (), self._unpad(model, inputs, tokens, boundaries)
        self._tell_documents(model, inputs, boundaries)
        inputs[BOUNDARIES_ARGUMENT] = boundaries
        return (), inputs

    def _refuse_lengths(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        """Raises a ValueError if RoPE needs the lengths of rows that only the layers know."""
        if self.rotaries:
            what = "continuous batching" if given_rows(inputs) is None else "a cache of fixed size"
            raise ValueError(
                f"{what} must come with RoPE frequencies that do not depend on lengths, got those "
                f"of {type(model).__name__}. Call generate() with a DynamicCache instead."
            )

    def _leave_to_layers(
        self, model: nn.Module, inputs: dict[str, Any], tokens: Tensor
    ) -> dict[str, Any]:
        """Returns the inputs of a call whose layers find their keys in the cache themselves.

        Args:
            model: The model.
            inputs: Keyword arguments of the model, with a paged cache, or with a mask that says
                where the keys lie in a cache of fixed size.
            tokens: Tokens or embeddings of the call, [B, S, ...].
        """
        if STEP_ARGUMENT in inputs:
            return inputs
        if (cache := stepping_cache(inputs)) is not None:
            step = cache.begin_step(model, inputs, tokens)
            if self.counts_by_mask and inputs.get("position_ids") is None:
                inputs = inputs | {"position_ids": step.positions}
        elif paged_cache(inputs) is not None:
            step = PagedForward()
        else:
            return inputs
        return inputs | {STEP_ARGUMENT: step, "attention_mask": paged_mask(tokens.device)}

    def _read(self, model: nn.Module, inputs: dict[str, Any], tokens: Tensor) -> Boundaries:
        """Returns the boundaries of the inputs' documents; see `read_boundaries`."""
        mask, rows = inputs.get("attention_mask"), (tokens.shape[0], tokens.shape[1])
        if (shared := read_share(model, inputs, tokens, read_boundaries)) is not None:
            return shared
        beyond = self.within_windows is not None and rows[1] > self.within_windows
        windows = type(model).__name__ if beyond else None
        if self.unpads and isinstance(mask, Tensor) and tuple(mask.shape) == rows:
            others = [inputs.get(name) for name in ("position_ids", "seq_idx", "cu_seq_lens_q")]
            found = find_unpadded(mask, tokens.device, windows)
            if found is not None and all(other is None for other in others):
                if self.position_limit is not None and self.first_counted is None:
                    require_positions(model, rows[1], "rows", _LONGER, self.position_limit)
                return found
        found = read_boundaries(inputs, *rows, tokens.device)
        if windows is not None and found.indices_q is not None:
            refuse_holes(found, windows)
        return keep_queries(model, found, beyond) if self.pools_rows else found

    def _unpad(
        self, model: nn.Module, inputs: dict[str, Any], tokens: Tensor, boundaries: Boundaries
    ) -> dict[str, Any]:
        inputs, boundaries = unpad(model, inputs, tokens, boundaries, self.first_counted)
        self._tell_documents(model, inputs, boundaries)
        return inputs

    def rest(self, model: nn.Module) -> None:
        """Removes what the hook set on a model whose attention was changed to another one."""
        if self.rotaries:
            detach_frequencies(model)

    def _tell_documents(
        self, model: nn.Module, inputs: dict[str, Any], boundaries: Boundaries
    ) -> None:
        """Calls `_tell_lengths` with the documents' lengths, if a rotary embedding reads them."""
        if self.rotaries:
            position_ids = inputs.get("position_ids")
            if position_ids is not None and position_ids.dim() == 3:  # [axes, B, S]
                position_ids = position_ids.amax(0)
            self._tell_lengths(model, find_lengths(boundaries, position_ids))

    def _tell_lengths(self, model: nn.Module, lengths: Tensor) -> None:
        """Sets the length of each token's document on the model's rotary embeddings.

        Args:
            model: The model.
            lengths: [B, S] integers.
        """
        for name in self.rotaries:
            attach_frequencies(model.get_submodule(name)).lengths = lengths

    def _refuse(self, model: Any, inputs: dict[str, Any]) -> None:
        now = model.config._attn_implementation
        if now != self.implementation:
            raise ValueError(
                f"the patched model's attention must be {self.implementation}, got {now}: it was "
                "changed under the patch. Call unpatch() before set_attn_implementation()."
            )
        if inputs.get("output_attentions"):
            raise ValueError(
                "output_attentions must be False, got True: the kernels never form the weights. "
                "Call unpatch() and load the model with attn_implementation='eager' to see them."
            )
        if inputs.get("encoder_hidden_states") is not None:
            raise ValueError(
                "encoder_hidden_states must be None, got a tensor: cross-attention is not patched. "
                "Call unpatch() first."
            )

    def _require_positions(self, model: nn.Module) -> None:
        if "position_ids" not in self.names or self.reads_mask:
            raise ValueError(
                "packed inputs must go to a model whose positions restart at 0 per document, got "
                f"{type(model).__name__}, which counts them itself. Pass padded rows with an "
                "attention_mask."
            )

    def _require_own_positions(
        self, model: nn.Module, positions: Tensor, boundaries: Boundaries
    ) -> None:
        """Raises a ValueError if packed documents get other positions than each would get alone.

        Args:
            model: The model.
            positions: Position ids of the call, [B, S] or [1, S] integers.
            boundaries: Boundaries of the documents.
        """
        if "position_ids" not in self.names:
            self._require_positions(model)
        elif self.first_position:
            require_first_position(model, positions, boundaries, self.first_position)

    def _give_positions(self, model: nn.Module, inputs: dict[str, Any], tokens: Tensor) -> None:
        self._require_positions(model)
        covered = covered_tokens(inputs)
        if covered is not None and covered != tokens.shape[1]:
            raise ValueError(
                f"cu_seq_lens_q must cover the {pluralize(tokens.shape[1], 'token')} of the row, "
                "got boundaries "
                f"for {covered}. Prompt tuning and p-tuning put virtual tokens in front of a row, "
                "where a pack has no document: train LoRA on packs, or one document per row."
            )
        counted = give_positions(inputs, tokens.shape[1])
        positions = inputs.get("position_ids")
        if self.first_position and isinstance(positions, Tensor):
            # A pack counts from 0, which such a model never uses.
            from_zero = positions.flatten()[:1] == counted
            inputs["position_ids"] = positions + from_zero * self.first_position

    def _turn_cache_off(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        packed = is_packed(inputs)
        if packed and (inputs.get("use_cache") or given_cache(inputs) is not None):
            raise ValueError(
                "use_cache must be False for packed inputs, got a key/value cache: it would hold "
                "the keys of all documents as one. Generate from one document per row. Prefix "
                "tuning passes such a cache: train LoRA on packs instead."
            )
        if (
            "use_cache" in self.names
            and inputs.get("use_cache") is None
            and given_cache(inputs) is None
            and (packed or model.training)
        ):
            inputs["use_cache"] = False
