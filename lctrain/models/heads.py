"""Runs models with one output per row, such as classifiers, on packs: one output per document.

Heads for sequence classification, question answering and next sentence prediction pool or normalise
over a row. So, before such a model runs, every document of a pack becomes a row of its own, padded
on the right; the attention kernels skip the padding. Heads with one output per token need no
change. Any other output with one entry per row raises an error if a row holds several documents.
"""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lctrain.attention.boundaries import (
    PACK_ARGUMENTS,
    Boundaries,
    Padding,
    find_places,
)
from lctrain.attention.documents import find_documents
from lctrain.attention.forward import BOUNDARIES_ARGUMENT, SPEC_ATTRIBUTE, is_causal_layer
from lctrain.models.code import says
from lctrain.models.unpadding import restore_rows

_PER_ROW = re.compile(r"For(SequenceClassification|QuestionAnswering|NextSentencePrediction)")
_NO_TOKENS = frozenset({"labels", "attention_mask"})


def pools_rows(model: nn.Module) -> bool:
    """Returns whether a model's head gives one output per row, as for sequence classification."""
    return any(_PER_ROW.search(base.__name__) for base in type(model).__mro__)


def refuse_choices(model: nn.Module) -> None:
    """Raises a ValueError if a model has a multiple-choice head.

    A pack does not say which documents are choices of one question.
    """
    if any("ForMultipleChoice" in base.__name__ for base in type(model).__mro__):
        raise ValueError(
            f"choices must come as rows [batch, choices, tokens], got a pack for "
            f"{type(model).__name__}: it does not say which documents are choices of one question. "
            "Pad the choices."
        )


def refuse_share(model: nn.Module, ranks: int) -> None:
    """Raises a ValueError if a model pools documents, whose tokens are divided over ranks.

    Args:
        model: A transformers model that is called with one rank's share of a pack.
        ranks: Number of ranks that share the pack.
    """
    if pools_rows(model) or _pooler_of(model) is not None:
        raise ValueError(
            "a model must give one output per token where ranks share a pack, got "
            f"{type(model).__name__}, which pools documents that are divided over {ranks} ranks. "
            "Use trainer.context_parallel=1, or a model without the pooling head."
        )


def holds_several(boundaries: Boundaries) -> bool:
    """Returns whether a row holds several documents, as far as known without synchronising."""
    if boundaries.shared_rows is not None:
        return boundaries.shared_rows
    return boundaries.pack.documents > boundaries.queries[0]


def to_rows(
    model: Any, inputs: dict[str, Any], boundaries: Boundaries
) -> tuple[dict[str, Any], Boundaries]:
    """Rewrites a model's inputs so that every document is a row, padded on the right.

    Args:
        model: The model, whose config has the padding token.
        inputs: Keyword arguments of the model. Tensors [B, S, ...] are cut into documents, except
            `labels`; other values do not change.
        boundaries: Boundaries of N documents in rows [B, S]; the longest has M tokens.

    Returns:
        The inputs with rows [N, M] and an attention mask, and the boundaries of these rows.

    Raises:
        ValueError: if the model has no padding token, and its head finds a row's last token by it.
    """
    config = model.config.get_text_config()
    padding = getattr(config, "pad_token_id", None)
    if padding is None and says(type(model).forward, "pad_token_id"):
        raise ValueError(
            f"pad_token_id must be set for packed inputs of {type(model).__name__}, got None: its "
            "head finds a document's last token by it. Set model.config.pad_token_id."
        )
    places = row_places(boundaries)
    rows = (boundaries.pack.documents, boundaries.pack.max_seqlen_q)
    kept = {
        name: value
        for name, value in inputs.items()
        if name not in (*PACK_ARGUMENTS, "document_ids", "schedule")
    }
    for name, value in kept.items():
        if not isinstance(value, Tensor) or value.dim() < 2 or name in _NO_TOKENS:
            continue
        if value.shape[1] == boundaries.queries[1] and value.shape[0] in (1, boundaries.queries[0]):
            filler = (padding or 0) if name == "input_ids" else 0
            kept[name] = spread(value, boundaries, places, rows, filler)
    real = torch.zeros(rows[0] * rows[1], dtype=torch.int64, device=places.device)
    kept["attention_mask"] = real.index_fill(0, places, 1).view(rows)
    former = boundaries.indices_q
    if former is None:
        former = torch.arange(places.shape[0], device=places.device)
    return kept, boundaries._replace(
        queries=rows,
        keys=rows,
        indices_q=places,
        indices_k=places,
        shared_rows=False,
        padding=Padding(boundaries.queries, former, type(model).__name__),
    )


def row_places(boundaries: Boundaries) -> Tensor:
    """Returns each token's index in the flattened rows [N * M] of `to_rows`, [T] int64."""
    document, position = find_places(boundaries)
    return document * boundaries.pack.max_seqlen_q + position


def spread(
    values: Tensor, boundaries: Boundaries, places: Tensor, rows: tuple[int, int], filler: float = 0
) -> Tensor:
    """Moves per-token values from packed rows to one row per document.

    Args:
        values: [B, S, ...], or [1, S, ...] for values that all rows share.
        boundaries: Boundaries of N documents in rows [B, S].
        places: [T] int64, the result of `row_places`.
        rows: Shape (N, M) of the new rows.
        filler: Value at padding.

    Returns:
        [N, M, ...].
    """
    values = values.expand(boundaries.queries[0], *values.shape[1:]).flatten(0, 1)
    if boundaries.indices_q is not None:
        values = values.index_select(0, boundaries.indices_q)
    empty = values.new_full((rows[0] * rows[1], *values.shape[1:]), filler)
    return empty.index_copy(0, places, values).unflatten(0, rows)


def keep_queries(model: nn.Module, boundaries: Boundaries, windows: bool) -> Boundaries:
    """Returns boundaries with which padding gets outputs too, if the model's head reads them.

    A head for question answering compares all positions of a row. Without a causal mask and
    windows, padding attends to all tokens of its row, as in transformers' own attention.

    Args:
        model: A patched model whose head gives one output per row.
        boundaries: Boundaries of documents in rows [B, S].
        windows: Whether rows reach beyond the windows of the model.

    Raises:
        ValueError: if the head compares positions, rows have padding, and the attention is causal
            or has windows.
    """
    places, rows = boundaries.indices_q, boundaries.queries
    compares = any("ForQuestionAnswering" in base.__name__ for base in type(model).__mro__)
    if not compares or places is None or holds_several(boundaries):
        return boundaries
    if places.shape[0] == rows[0] * rows[1]:
        return boundaries
    layers = (module for module in model.modules() if hasattr(module, SPEC_ATTRIBUTE))
    if windows or any(is_causal_layer(layer, None) for layer in layers):
        raise ValueError(
            f"rows must have no padding for {type(model).__name__}, got padding: its head compares "
            "all positions of a row, and its causal or windowed attention computes none at padding."
            " Pass one row at a time or a pack without padding, or call unpatch() first."
        )
    real = torch.zeros(rows[0] * rows[1], dtype=torch.bool, device=places.device)
    real = real.index_fill(0, places, True).view(rows)
    return find_documents(rows, rows, places.device, real=real, drop_queries=False)


def check_outputs(model: Any, args: tuple[Any, ...], inputs: dict[str, Any], output: Any) -> Any:
    """A forward hook (with_kwargs=True) that checks a model's outputs for packed documents.

    If the input hook packed padded rows, the outputs go back into rows (`restore_rows`). Each model
    has this hook once, before the user's own forward hooks.

    If the model is an encoder with a pooler, the hook replaces `pooler_output` by one entry per
    document, [N, E]. If `to_rows` has changed the rows of the model's inputs, the hook moves
    `hidden_states` back to the places of the inputs, with zeros at padding.

    Args:
        model: The model.
        args: Positional arguments of its forward.
        inputs: Keyword arguments of its forward.
        output: Output of its forward.

    Returns:
        The output; None if the call was not prepared by an input hook.

    Raises:
        ValueError: if an output has one entry per row although rows hold several documents, or
            one rank's share of a pack.
    """
    boundaries = inputs.get(BOUNDARIES_ARGUMENT)
    if boundaries is None:
        return None
    padding = boundaries.padding
    if padding is not None and padding.owner == type(model).__name__ and pools_rows(model):
        return _states_in_places(output, boundaries, padding)
    several = boundaries.share is not None or holds_several(boundaries)
    if several and not inputs.get("logits_to_keep"):
        output = _per_document(model, boundaries, output)
    return restore_rows(model, output, boundaries)


def _per_document(model: Any, boundaries: Boundaries, output: Any) -> Any:
    """Returns outputs for several documents per row, pooled by document, or raises; see above."""
    pooler = _pooler_of(model)
    if pooler is not None and getattr(output, "pooler_output", None) is not None:
        if boundaries.share is not None:
            refuse_share(model, boundaries.share.size)
        places = row_places(boundaries)
        rows = (boundaries.pack.documents, boundaries.pack.max_seqlen_q)
        output["pooler_output"] = pooler(spread(output[0], boundaries, places, rows))
    tokens = boundaries.queries[1]
    # Under TRL, outputs have one token less: it drops the last token, which has no target.
    shortest = tokens
    if getattr(model, "get_output_embeddings", lambda: None)() is not None:
        shortest = tokens - 1
    named = output.items() if hasattr(output, "items") else enumerate(_as_tuple(output))
    for name, value in named:
        if not isinstance(value, Tensor) or value.dim() == 0 or name == "loss":
            continue
        # With `in` instead of ==, torch.compile would recompile for each length, or fail.
        per_row = value.dim() == 1 or name == "pooler_output"
        per_row = per_row or not (value.shape[1] == tokens or value.shape[1] == shortest)
        if value.shape[0] == boundaries.queries[0] and per_row:
            raise ValueError(
                f"outputs must have one entry per token or per document for packed inputs, got "
                f"{name} {list(value.shape)} from {type(model).__name__} for "
                f"{boundaries.pack.documents} documents. Pass one document per row, "
                "with padding and an attention_mask."
            )
    return output


def _states_in_places(output: Any, boundaries: Boundaries, padding: Padding) -> Any:
    """Moves the hidden states of a head that ran on the rows of `to_rows` to the inputs' places.

    Args:
        output: The head's output, by name or as a tuple. Each hidden state is [N, M, E].
        boundaries: Boundaries of the rows [N, M].
        padding: The rows [B, S] of the inputs, and the places of their tokens.

    Returns:
        The output, with hidden states [B, S, E].
    """

    places = boundaries.indices_q
    assert places is not None

    def moved(value: Any) -> Any:
        if not isinstance(value, tuple):
            return value
        return tuple(moved_state(state) if isinstance(state, Tensor) else state for state in value)

    def moved_state(state: Tensor) -> Tensor:
        if tuple(state.shape[:2]) != boundaries.queries:
            return state
        empty = state.new_zeros((padding.rows[0] * padding.rows[1], *state.shape[2:]))
        tokens = state.flatten(0, 1).index_select(0, places.to(state.device))
        return empty.index_copy(0, padding.places, tokens).unflatten(0, padding.rows)

    if not hasattr(output, "items"):
        return tuple(moved(value) for value in output)
    for name, value in list(output.items()):
        output[name] = moved(value)
    return output


def _pooler_of(model: Any) -> Callable[[Tensor], Tensor] | None:
    """Returns an encoder's pooler, a function from states [B, S, E] to pooled output [B, E]."""
    pooler: Any = getattr(model, "pooler", None)
    if not isinstance(pooler, nn.Linear):
        return pooler
    activation: Any = getattr(model, "pooler_activation", None)  # ALBERT pools the first token
    return None if activation is None else lambda states: activation(pooler(states[:, 0]))


def _as_tuple(output: Any) -> tuple[Any, ...]:
    return tuple(output) if isinstance(output, tuple | list) else (output,)
