"""Predictions of a causal language model at chosen positions, without the logits of the others."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lctrain.loss.causal_lm import probe
from lctrain.loss.output_head import find_output_head


def greedy_tokens(model: nn.Module, model_kwargs: Mapping[str, Any], positions: Tensor) -> Tensor:
    """Returns the likeliest next token at chosen positions of a forward pass.

    Where the inputs hold a text and its answer, the predictions before each token of the answer are
    all right if and only if greedy decoding after the text gives that answer.

    Args:
        model: A causal language model, as in `causal_lm_loss`.
        model_kwargs: Arguments of a forward pass over `input_ids` [B, S].
        positions: [n] int64, positions in the flattened [B * S] tokens.

    Returns:
        [n] int64.
    """
    packed = "cu_seq_lens_q" in model_kwargs
    head = find_output_head(model, partial(probe, positions.device, packed))
    with torch.no_grad():
        if head is None:
            logits = model(**model_kwargs)["logits"].flatten(0, 1)[positions]
        else:
            hidden = head.decoder(**model_kwargs)[0].flatten(0, 1)[positions]
            logits = head.finish(head.projection(hidden))
    return logits.argmax(dim=-1)
