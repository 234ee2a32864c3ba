"""Checks the settings of the closing evaluation before training starts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import lightning.pytorch as pl

from lctrain.config import EvaluationConfig
from lctrain.data.passkey import PasskeyFormat
from lctrain.data.vocabulary import vocabulary_size
from lctrain.eval import begin_tokens
from lctrain.eval.extension import check_supported
from lctrain.eval.shipped import load_passkey_model
from lctrain.limits import require
from lctrain.models.positions import require_positions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class CheckClosing(pl.Callback):
    """Callback that checks settings of the closing evaluation against the tokenizer.

    The check runs before training: Lightning calls `setup` of callbacks after that of the data
    module, which loads the tokenizer, and before that of the module.

    Args:
        config: Settings of the evaluation.
    """

    def __init__(self, config: EvaluationConfig) -> None:
        self.config = config
        self._checked = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Runs `check_closing` once, which raises ValueError for a setting that cannot be used."""
        if not self._checked:
            check_closing(self.config, trainer.datamodule.tokenizer)
        self._checked = True  # Lightning calls setup for each of validate, fit and validate


def check_closing(config: EvaluationConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Checks settings of the closing evaluation against the tokenizer, and loads the passkey model.

    Args:
        config: Settings of the evaluation.
        tokenizer: Tokenizer of the run's data.

    Raises:
        ValueError: if `begin_token` is true and the tokenizer has no begin token, if the tokenizer
            cannot encode the passkey texts, if a passkey length is too short for key, question and
            answer, or if `passkey_model` cannot be used (see `check_reader`).
    """
    begin_tokens(tokenizer, config.begin_token)
    if not config.passkey_lengths:
        return
    if config.passkey_model is not None:
        tokenizer = check_reader(config)
    shortest = PasskeyFormat.of(tokenizer).shortest
    require(
        min(config.passkey_lengths) >= shortest,
        f"evaluation.passkey_lengths must be at least {shortest}, the tokens of key, question and "
        f"answer, got {min(config.passkey_lengths)}. Leave it out.",
    )


def check_reader(config: EvaluationConfig) -> PreTrainedTokenizerBase:
    """Loads the model `passkey_model`, which reads the passkey test, and checks it.

    The weights are loaded as at the end of the run, since only loading shows that they are intact,
    and are then released.

    Args:
        config: Settings of the evaluation, with `passkey_model`.

    Returns:
        The tokenizer of that model.

    Raises:
        ValueError: if the model or its tokenizer cannot be loaded, if the model does not support
            one of the methods or has fewer positions than the longest text, or if its tokenizer has
            more tokens than it has embeddings.
    """
    name = str(config.passkey_model)
    try:
        reader = load_passkey_model(name)
        check_supported(reader.model, config.methods)
        require_positions(
            reader.model, max(config.passkey_lengths), "passkey_lengths", "Leave it out."
        )
        embeddings = vocabulary_size(reader.model)
        require(
            len(reader.tokenizer) <= embeddings,
            f"model must have an embedding for each of its tokenizer's {len(reader.tokenizer)} "
            f"tokens, got {embeddings}. Restore its tokenizer files.",
        )
    except ValueError as error:
        raise ValueError(
            f"evaluation.passkey_model must be a model that the passkey test can use, got {name}: "
            f"{error}"
        ) from error
    return reader.tokenizer
