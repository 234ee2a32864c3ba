"""check_vocabulary: compares the tokens of a batch with the model's vocabulary."""

from __future__ import annotations

from typing import Any

from lctrain.batch import PackedBatch


def check_vocabulary(batch: PackedBatch, module: Any) -> None:
    """Raises ValueError if a token has no embedding in the model; a GPU would abort the process.

    Args:
        batch: A batch on the CPU; a batch on a device is not checked.
        module: The LightningModule. Its attribute `model` is checked if it is a transformers model.

    Raises:
        ValueError: if a token is outside of the vocabulary.
    """
    find = getattr(getattr(module, "model", None), "get_input_embeddings", None)
    if find is None or batch.input_ids.device.type != "cpu":
        return
    known, largest = getattr(find(), "num_embeddings", None), int(batch.input_ids.max())
    if known is not None and largest >= known:
        raise ValueError(
            f"documents must hold tokens below the model's vocabulary of {known}, got {largest}. "
            "Tokenize them with the model's own tokenizer (data.tokenizer)."
        )
