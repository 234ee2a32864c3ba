"""answered: whether greedy decoding yields an expected answer, from one forward pass.

launched does not wait for the pass, so that the device has the next one to do meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial

import numpy as np
import torch
from torch import nn

from lctrain.attention import is_patched
from lctrain.data.passkey import Passkey
from lctrain.eval.runner import cut, packed_kwargs, row_kwargs
from lctrain.loss import evaluation_mode
from lctrain.loss.predictions import NO_TOKEN, greedy_tokens
from lctrain.models.frequencies import row_frequencies
from lctrain.transfer import HostCopy, upload


def answered(
    model: nn.Module, made: Sequence[Passkey], segment: int | None, device: torch.device
) -> list[bool]:
    """Returns, for each document, whether greedy decoding yields its answer.

    Args:
        model: A causal LM. Its training mode is restored.
        made: Documents that end with their answer.
        segment: Length in tokens of the parts into which documents are cut; None for whole ones.
        device: Device of the model.

    Raises:
        ValueError: if the logits before a token of an answer give no distribution.
    """
    return launched(model, made, segment, device)()


def launched(
    model: nn.Module, made: Sequence[Passkey], segment: int | None, device: torch.device
) -> Callable[[], list[bool]]:
    """Launches the forward pass of `answered`, and returns a function that waits for its result.

    For the arguments, and what the function raises, see answered.
    """
    inputs = [document.input_ids[:-1] for document in made]  # the last token predicts nothing
    packed = is_patched(model)
    width = max(map(len, inputs))
    if packed:
        kwargs = packed_kwargs(cut(inputs, segment), device)
        offsets = np.cumsum([0, *map(len, inputs)])[:-1]
    else:
        kwargs = row_kwargs(inputs, width, device)
        offsets = np.arange(len(inputs)) * width
    before = [
        offset + np.arange(d.answer_start, d.answer_start + d.answer_tokens) - 1
        for offset, d in zip(offsets, made, strict=True)
    ]
    places = upload(torch.from_numpy(np.concatenate(before)), device)
    lengths = torch.tensor([len(tokens) for tokens in inputs])
    own = nullcontext() if packed else row_frequencies(model, lengths)
    with evaluation_mode(model), own:
        predicted = HostCopy(greedy_tokens(model, kwargs, places))
    return partial(_right, predicted, made)


def _right(copied: HostCopy, made: Sequence[Passkey]) -> list[bool]:
    predicted = copied.wait().numpy()
    if (predicted == NO_TOKEN).any():
        raise ValueError(
            "the logits of the model must give a distribution over the vocabulary, got NaN, +inf, "
            "or -inf for all tokens. Look for weights that are not finite, or for activations "
            "beyond the range of the dtype: evaluate in bfloat16 or float32."
        )
    splits = np.cumsum([document.answer_tokens for document in made])[:-1]
    return [
        bool((tokens == document.input_ids[document.answer_start :]).all())
        for tokens, document in zip(np.split(predicted, splits), made, strict=True)
    ]
