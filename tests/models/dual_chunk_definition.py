"""Dual chunk attention by its definition, inside a transformers model: the tests' reference.

All tokens get position 0, where RoPE does nothing. The attention function then rotates the query of
each (query, key) pair by the relative position in the paper's table (arXiv 2402.17463).
"""

from typing import Any

import torch
from torch import Tensor, nn

from tests.models.families import outputs

_NAME = "dual_chunk_definition"


def defined_outputs(
    model: nn.Module,
    documents: list[Tensor],
    chunk_size: int,
    local_size: int,
    logit_scales: list[float] | None = None,
) -> Tensor:
    """Returns the outputs [T, V] of the documents, from one forward per document."""
    from transformers import AttentionInterface

    AttentionInterface.register(_NAME, _attend)
    before = model.config._attn_implementation
    model.set_attn_implementation(_NAME)
    found = []
    try:
        for index, tokens in enumerate(documents):
            positions = relative_positions(len(tokens), chunk_size, local_size)
            found.append(
                outputs(
                    model,
                    input_ids=tokens[None],
                    position_ids=torch.zeros_like(tokens)[None],
                    use_cache=False,
                    relative=(positions, next(rotary_embeddings(model)).inv_freq.float()),
                    logit_scale=1.0 if logit_scales is None else logit_scales[index],
                )[0]
            )
    finally:
        model.set_attn_implementation(before)
    return torch.cat(found)


def rotary_embeddings(model: nn.Module) -> Any:
    return (module for module in model.modules() if hasattr(module, "inv_freq"))


def relative_positions(length: int, chunk_size: int, local_size: int) -> Tensor:
    """Returns the relative position of each (query, key) pair, [S, S] int64.

    Entries of keys after their query have no meaning.
    """
    chunk = chunk_size - local_size
    rows = []
    for i in range(length):
        row = []
        for j in range(length):
            apart = i // chunk - j // chunk
            if apart == 0:
                at = i % chunk
            elif apart == 1:
                at = min(i % chunk + chunk, chunk_size)
            else:
                at = min(2 * chunk - 1, chunk_size)
            row.append(at - j % chunk)
        rows.append(row)
    return torch.tensor(rows)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    relative: tuple[Tensor, Tensor],
    logit_scale: float,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    positions, inv_freq = relative
    groups = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    angles = positions[..., None].to(query.dtype) * inv_freq.to(query.dtype)  # [S, S, D / 2]
    first, second = query[..., :, None, :].chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    moved = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    logits = (moved * key[..., None, :, :]).sum(-1) * scaling * logit_scale
    length = positions.shape[0]
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    weights = logits.masked_fill(~seen, float("-inf")).softmax(-1)
    return (weights @ value).transpose(1, 2), None
