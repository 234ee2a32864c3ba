"""passkey_loss: loss of the keys' tokens; models differ in it before any of them finds a key."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from lctrain.data.passkey import Filler, PasskeyFormat
from lctrain.eval.runner import packed_kwargs
from lctrain.loss import evaluation_mode, token_losses


def passkey_loss(
    model: Any,
    format: PasskeyFormat,
    documents: Sequence[np.ndarray],
    length: int,
    depths: Sequence[float],
    keys: int,
    *,
    max_tokens: int,
    device: torch.device | str,
) -> float:
    """Returns the mean loss of the answers' tokens, in nats, over all depths and keys.

    The keys and texts are those of `lctrain.eval.passkey_retrieval` with its default seed. A model
    that guesses among the words of keys has a loss of log(len(format.words)) per word.

    Args:
        model: A patched causal LM.
        format: Passkey format of the model's tokenizer.
        documents: Token ids of the texts that hide the keys, [n] integers each.
        length: Number of tokens of a text.
        depths: Positions of the key, as fractions of the filler text.
        keys: Number of keys per depth.
        max_tokens: Largest number of tokens in a forward pass.
        device: Device of the model.
    """
    filler = Filler.of(documents, len(format.begin))
    made = [
        format.make(np.random.default_rng([0, length, key]), length, depth, filler, with_end=False)
        for depth in depths
        for key in range(keys)
    ]
    size = max(1, max_tokens // length)
    losses = []
    for start in range(0, len(made), size):
        batch = made[start : start + size]
        inputs = [passkey.input_ids[:-1] for passkey in batch]
        places, answers = [], []
        for row, passkey in enumerate(batch):
            first = row * (length - 1) + passkey.answer_start - 1  # before the answer
            places.append(first + np.arange(passkey.answer_tokens))
            answers.append(passkey.input_ids[passkey.answer_start :])
        with evaluation_mode(model):
            losses.append(
                token_losses(
                    model,
                    packed_kwargs(inputs, torch.device(device)),
                    torch.from_numpy(np.concatenate(places)).to(device),
                    torch.from_numpy(np.concatenate(answers)).to(device),
                )
            )
    return torch.cat(losses).double().mean().item()
