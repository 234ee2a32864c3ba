"""The size of a model's vocabulary, and a check that the tokens of a batch are in it."""

from __future__ import annotations

from typing import Any

from lctrain.batch import PackedBatch


def vocabulary_size(model: Any) -> int:
    """Returns the number of token embeddings of a model, adapted by PEFT or not.

    Args:
        model: A transformers model.
    """
    embeddings = model.get_input_embeddings()
    known = getattr(embeddings, "num_embeddings", None)  # PEFT's layers lack it
    return int(embeddings.weight.shape[0] if known is None else known)


def check_vocabulary(batch: PackedBatch, module: Any) -> None:
    """Raises ValueError if a token has no embedding in the model; a GPU would abort the process.

    Args:
        batch: A batch on the CPU; a batch on a device is not checked.
        module: The LightningModule. Its attribute `model` is checked if it is a transformers model.

    Raises:
        ValueError: if a token is outside of the vocabulary.
    """
    model = getattr(module, "model", None)
    if not hasattr(model, "get_input_embeddings") or batch.input_ids.device.type != "cpu":
        return
    known, largest = vocabulary_size(model), int(batch.input_ids.max())
    if largest >= known:
        raise ValueError(
            f"documents must hold tokens below the model's vocabulary of {known}, got {largest}. "
            "Tokenize them with the model's own tokenizer (data.tokenizer)."
        )
