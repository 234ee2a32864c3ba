"""tokenizer_for: chooses a model's tokenizer, and refuses one with other token ids."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from lctrain.config import ModelConfig, PretrainedModelConfig
from lctrain.data.tokenizer import load_tokenizer, same_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

from lctrain.warn import warn_once

log = logging.getLogger(__name__)


def tokenizer_for(model: ModelConfig, named: str | None) -> PreTrainedTokenizerBase | str | None:
    """Returns the tokenizer for a model.

    Args:
        model: Config of the model, pretrained or from scratch.
        named: Name of the tokenizer in the data config; None if it names none.

    Returns:
        For a pretrained model: the tokenizer `named` if it is given, else the model's own. For a
        model from scratch: `named`; None means that a tokenizer is trained on the data.

    Raises:
        ValueError: if a pretrained model has no tokenizer and `named` is None, or if the ids of
            `named` mean other tokens and the config does not allow another tokenizer.
    """
    if not isinstance(model, PretrainedModelConfig):
        return named
    try:
        own = load_tokenizer(
            model.name_or_path, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except ValueError as error:
        if named is None:
            raise ValueError(
                f"data.tokenizer must name the tokenizer that {model.name_or_path} was trained "
                f"with, got none, and its own cannot be used: {error}"
            ) from error
        warn_once(
            log,
            "%s has no tokenizer of its own; whether %s is the one that it was trained with cannot "
            "be checked.",
            model.name_or_path,
            named,
        )
        return load_tokenizer(named)
    if named is None or named == model.name_or_path:
        return own
    other = load_tokenizer(named, trust_remote_code=model.trust_remote_code)
    if same_ids(own, other):
        return other
    if not model.allow_other_tokenizer:
        raise ValueError(
            f"data.tokenizer must be the model's own, got {named}, whose ids mean other tokens "
            f"than those that {model.name_or_path} was trained on. Leave data.tokenizer out, or "
            "set model.allow_other_tokenizer=true to use the model on other ids all the same."
        )
    warn_once(
        log,
        "%s goes on with the ids of another tokenizer, %s, as model.allow_other_tokenizer says.",
        model.name_or_path,
        named,
    )
    return other
