"""greedy_tokens: the most likely next token at chosen positions of a forward pass."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lctrain.loss.causal_lm import probe
from lctrain.loss.output_head import find_output_head

NO_TOKEN = -1
"""Prediction of logits without a distribution."""


def greedy_tokens(model: nn.Module, model_kwargs: Mapping[str, Any], positions: Tensor) -> Tensor:
    """Returns the most likely next token at chosen positions of a forward pass.

    If the model's output head is verified (see `find_output_head`), only the logits of these
    positions are computed. To test whether greedy decoding after a prompt gives an expected answer,
    run prompt and answer in one pass. Then compare the prediction before each token of the answer
    with that token.

    Args:
        model: A transformers causal LM, as in `causal_lm_loss`.
        model_kwargs: Keyword arguments of a forward pass over `input_ids` [B, S].
        positions: [n] int64, indices into the flattened [B * S] tokens.

    Returns:
        [n] int64, the predicted token ids; NO_TOKEN where the logits give none: one is NaN or +inf,
        or all are -inf.
    """
    packed = "cu_seq_lens_q" in model_kwargs
    head = find_output_head(model, partial(probe, positions.device, packed))
    with torch.no_grad():
        if head is None:
            logits = model(**model_kwargs)["logits"].flatten(0, 1)[positions]
        else:
            hidden = head.decoder(**model_kwargs)[0].flatten(0, 1)[positions]
            logits = head.finish(head.projection(hidden))
    largest, tokens = logits.max(dim=-1)
    return tokens.where(largest.isfinite(), NO_TOKEN)
