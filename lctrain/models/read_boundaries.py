"""read_boundaries: finds where documents end in the arguments of a model."""

from typing import Any

import torch
from torch import Tensor

from lctrain.attention.boundaries import Boundaries, find_positions, is_packed
from lctrain.attention.documents import (
    divide_documents,
    find_documents,
    number_by_index,
    number_documents,
    refuse_mask_of_pack,
    refuse_two_numbers,
)
from lctrain.attention.mask import read_mask
from lctrain.models.cache import given_cache


def read_boundaries(
    inputs: dict[str, Any], batch: int, tokens: int, device: torch.device
) -> Boundaries:
    """Returns the boundaries of the documents in a model's inputs.

    If the mask numbers documents, it is replaced in `inputs` by a padding mask. If documents are
    found in the mask or the position ids, use_cache=False is set in `inputs`.

    Args:
        inputs: Keyword arguments of the model. `cu_seq_lens_q/k` and `max_length_q/k`,
            `seq_idx` [B, S], `attention_mask` [B, S] and `position_ids` [B, S] are read.
        batch: Number of rows B.
        tokens: Tokens per row S.
        device: Device of the inputs.

    Raises:
        ValueError: if the arguments contradict one another.
    """
    rows = (batch, tokens)
    mask, position_ids = inputs.get("attention_mask"), inputs.get("position_ids")
    of_all_pairs = isinstance(mask, Tensor) and mask.dim() == 4 and is_packed(inputs)
    if isinstance(mask, dict) or of_all_pairs:
        raise ValueError(
            "attention_mask must be [batch, tokens], got the masks of an outer model, which know no"
            " documents. Call the patched language model by itself: model.get_decoder()."
        )
    if is_packed(inputs):
        refuse_mask_of_pack(mask)
        return find_documents(rows, rows, device, pack=inputs)
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(
                f"attention_mask must be [batch, tokens], got {shape}. Describe documents by "
                "cu_seq_lens_q/k and padding by a 2-D mask, or call unpatch() first."
            )
        if tuple(mask.shape) != rows:
            raise ValueError(
                f"attention_mask must have the inputs' shape {list(rows)}, got "
                f"{list(mask.shape)}. Pass one value per token."
            )
        mask, numbers = read_mask(mask, device)
        if numbers is not None:
            if inputs.get("seq_idx") is not None:
                refuse_two_numbers()
            return _numbered(inputs, numbers)
    numbers = number_by_index(inputs, rows, mask)
    if numbers is not None:
        return _numbered(inputs, numbers.to(device), "seq_idx must not be given")
    if position_ids is not None:
        numbers = number_documents(position_ids, batch, mask)
        if numbers is not None:
            _forgo_cache(inputs, "position_ids must not restart")
    return find_documents(rows, rows, device, real=mask, numbers=numbers)


def _numbered(
    inputs: dict[str, Any],
    numbers: Tensor,
    what: str = "attention_mask must not number documents",
) -> Boundaries:
    """Returns the boundaries of documents that the attention mask or `seq_idx` numbers.

    In `inputs`, the mask is replaced by a padding mask. Position ids are added if there are none;
    they restart at every document. If position ids are given, documents also end where they
    restart.

    Args:
        inputs: Keyword arguments of the model, which are changed.
        numbers: [B, S] int64, the number of each token's document; 0 at padding.
        what: First words of the error that is raised if a key/value cache is also given.
    """
    _forgo_cache(inputs, what)
    inputs["attention_mask"] = (numbers > 0).long()
    rows, position_ids = (numbers.shape[0], numbers.shape[1]), inputs.get("position_ids")
    if position_ids is not None:
        numbers = divide_documents(numbers, position_ids)
    boundaries = find_documents(rows, rows, numbers.device, numbers=numbers)
    if position_ids is None:
        inputs["position_ids"] = find_positions(boundaries)
    return boundaries


def _forgo_cache(inputs: dict[str, Any], what: str) -> None:
    if inputs.get("use_cache") or given_cache(inputs) is not None:
        raise ValueError(
            f"{what} while a key/value cache is filled, got several documents in one row. Pass "
            "use_cache=False."
        )
    inputs["use_cache"] = False


def refuse_unread(inputs: dict[str, Any]) -> None:
    """Raises a ValueError if torch.export would have to read tensor values to find documents."""
    names = ("attention_mask", "position_ids", "seq_idx")
    given = [name for name in names if inputs.get(name) is not None]
    if given and not is_packed(inputs):
        raise ValueError(
            "torch.export must be told documents by cu_seq_lens_q/k and max_length_q/k, got "
            f"{', '.join(given)}, whose values are not known while tracing. Pass "
            "PackedBatch.model_kwargs(), or only input_ids if each row is one document."
        )
