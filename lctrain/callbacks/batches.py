"""BatchView: gives callbacks the documents, lengths and labels of a batch of any type.

A batch is a PackedBatch, a mapping with transformers' names (`input_ids`, `labels`,
`attention_mask`, `position_ids`, `cu_seq_lens_q`), or any object that a function of the user
converts into one of these two. The boundaries of documents are those that a patched model uses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lctrain.attention.boundaries import find_segments
from lctrain.batch import IGNORE_INDEX, PackedBatch

ReadBatch = Callable[[Any], Any]


def view_batch(batch: Any, read_batch: ReadBatch | None = None) -> BatchView:
    """Returns the view of one batch, without waiting for the device.

    Args:
        batch: A batch of the data loader.
        read_batch: Function from the user's batch to a PackedBatch or a mapping with transformers'
            names; None if the batch is one of these.

    Raises:
        ValueError: if the batch, or the result of `read_batch`, is neither.
    """
    content = batch if read_batch is None else read_batch(batch)
    if isinstance(content, PackedBatch):
        return BatchView(content)
    if isinstance(content, Mapping) and isinstance(content.get("input_ids"), Tensor):
        return BatchView(dict(content))
    shape = type(content).__name__
    if isinstance(content, Mapping):
        shape += f" with {', '.join(map(repr, content))}"
    given = "batch must be" if read_batch is None else "read_batch must return"
    raise ValueError(
        f"{given} a PackedBatch or a mapping with the tensor 'input_ids', got {shape}. Pass the "
        "callback read_batch=, a function from the batch to such a mapping, for example "
        "lambda batch: {'input_ids': batch[0], 'labels': batch[1]}."
    )


@dataclass(frozen=True, eq=False)
class BatchView:
    """Reads the documents of a batch: their lengths, names, tokens and labels.

    Attributes:
        content: A PackedBatch, or a mapping with transformers' names.
    """

    content: PackedBatch | dict[str, Any]

    @property
    def input_ids(self) -> Tensor:
        """Token ids [B, S] int64."""
        if isinstance(self.content, PackedBatch):
            return self.content.input_ids
        tokens: Tensor = self.content["input_ids"]
        return tokens if tokens.dim() == 2 else tokens[None]

    @property
    def rows(self) -> int:
        """Number of rows B."""
        return int(self.input_ids.shape[0])

    def without_tokens(self) -> BatchView:
        """Returns a view with shape, document boundaries and names, but without tokens and labels.

        The memory of the batch's tokens and labels can then be freed.
        """
        shape = self.input_ids.to("meta")
        if isinstance(self.content, PackedBatch):
            pack = self.content
            kept = {"names": pack.names, "document_ids": pack.document_ids, "parents": self.parents}
            return BatchView({"input_ids": shape, "lengths": pack.lengths, **kept})
        names = ("names", "document_ids", "cu_seq_lens_q", "attention_mask", "position_ids")
        kept = {name: self.content[name] for name in names if self.content.get(name) is not None}
        if "cu_seq_lens_q" in kept:
            kept = {name: kept[name] for name in kept if name not in names[3:]}
        return BatchView({"input_ids": shape, **kept})

    @property
    def says_where_documents_end(self) -> bool:
        """Whether the batch has cu_seq_lens, position ids or a mask, which show the documents."""
        names = ("cu_seq_lens_q", "position_ids", "attention_mask")
        return isinstance(self.content, PackedBatch) or any(
            self.content.get(name) is not None for name in names
        )

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Length of every document in tokens, without padding.

        Waits for the device if the batch is a mapping of tensors on a GPU.
        """
        if isinstance(self.content, PackedBatch):
            return self.content.lengths
        if "lengths" in self.content:
            return tuple(map(int, self.content["lengths"]))
        boundaries = self.content.get("cu_seq_lens_q")
        if boundaries is not None:
            return tuple(boundaries.diff().tolist())
        rows, columns = self.input_ids.shape
        mask, positions = self.content.get("attention_mask"), self.content.get("position_ids")
        mask = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
        if isinstance(positions, Tensor) and positions.dim() == 2:
            segments = find_segments(positions.expand(rows, -1), mask)
            if segments is not None:
                offsets = torch.arange(rows, device=segments.device)[:, None] * (columns + 1)
                keys = (segments + offsets)[segments > 0]
                return tuple(keys.unique_consecutive(return_counts=True)[1].tolist())
        if mask is not None:
            return tuple(length for length in mask.sum(1).tolist() if length)
        return (columns,) * rows

    @property
    def parents(self) -> tuple[int, ...]:
        """Index of the prefix of each document, or -1; empty if no documents share a prefix."""
        if not isinstance(self.content, PackedBatch):
            return tuple(self.content.get("parents", ()))
        return () if self.content.groups is None else self.content.groups.parents

    @property
    def ranks(self) -> int:
        """Number of ranks that share the documents."""
        share = self.content.share if isinstance(self.content, PackedBatch) else None
        return 1 if share is None else share.size

    @property
    def num_tokens(self) -> int:
        """Number of tokens in all documents, without padding; those of this rank's share.

        Waits for the device if the batch is a mapping of tensors on a GPU.
        """
        if isinstance(self.content, PackedBatch):
            return self.content.num_tokens
        return sum(self.lengths)

    def num_valid_tokens(self) -> int | Tensor:
        """Returns the number of tokens in the loss, which are the labels that are not -100.

        The labels of a PackedBatch and `shift_labels` are shifted. `labels` of a mapping are not
        shifted, as in transformers, so the first label of a row is not counted.

        Returns:
            An int for a PackedBatch, a 0-dim int64 tensor on the device for a mapping.

        Raises:
            ValueError: if a mapping has no labels.
        """
        if isinstance(self.content, PackedBatch):
            return self.content.num_valid_tokens
        shifted, labels = self.content.get("shift_labels"), self.content.get("labels")
        if shifted is not None:
            return (shifted != IGNORE_INDEX).sum()
        if labels is not None:
            return (labels[..., 1:] != IGNORE_INDEX).sum()
        raise ValueError(
            "batch must hold 'labels' to count the tokens of its loss, got "
            f"{', '.join(map(repr, self.content))}. Return the count from training_step: "
            "{'loss': loss, 'num_tokens': count}."
        )

    def document_names(self) -> tuple[str, ...]:
        """Returns the documents' names for messages; without names, their ids or indices."""
        if isinstance(self.content, PackedBatch):
            ids = self.content.document_ids.tolist()
            return self.content.names or tuple(f"id {number}" for number in ids)
        names = self.content.get("names")
        if names is not None:
            return tuple(map(str, names))
        keys = self.content.get("document_ids")
        if isinstance(keys, Tensor):
            return tuple(f"id {number}" for number in keys.tolist())
        return tuple(f"number {index}" for index in range(len(self.lengths)))

    def model_kwargs(self) -> dict[str, Any]:
        """Returns keyword arguments for the model's forward pass, without labels and names."""
        if isinstance(self.content, PackedBatch):
            return self.content.model_kwargs()
        dropped = ("labels", "shift_labels", "names")
        return {name: value for name, value in self.content.items() if name not in dropped}
