"""PackedBatch: a batch of documents packed into one row, which the collator gives the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lctrain.batch_input import (
    IntegerSequence,
    as_integers,
    as_token_ids,
    check_cu_seqlens,
    check_label_lengths,
    check_max_tokens,
    check_token_ids,
    read_document_ids,
)
from lctrain.groups import PatchedOnly, PrefixGroups, group_documents, prefix_groups
from lctrain.pluralize import pluralize
from lctrain.unchanged import set_unchanged

if TYPE_CHECKING:
    from lctrain.distributed.share import PackShare
    from lctrain.kernels import TileSchedule

IGNORE_INDEX = -100
SHARE_ARGUMENT = "lctrain_share"  # keyword argument of a patched model, a PackShare


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """N documents of T tokens in total, concatenated in one row without padding.

    Build a batch with `from_documents` or `from_packed`, which validate it on the CPU. Later steps
    do not validate it again.

    Attributes:
        input_ids: [1, T] int64, the token ids.
        labels: [1, T] int64, shifted: labels[0, t] is the token to predict at position t, or -100
            if there is none, as at the end of every document.
        position_ids: [1, T] int64, counted from 0 in every document.
        cu_seqlens: [N + 1] int32, cumulative lengths: the index of each document's first token, and
            T.
        max_seqlen: Length of the longest document, a Python int.
        document_ids: [N] int32, number of each document, which determines its attention dropout
            mask.
        num_tokens: Number of tokens T, a Python int.
        lengths: Lengths of the N documents, Python ints.
        num_valid_tokens: Number of labels that are not -100, a Python int.
        schedule: Tile schedule of the attention kernels for these documents; None lets the kernels
            build it.
        names: Source of each document, for error messages; None if documents have no names.
        groups: Documents that share a prefix; None if every document stands alone.
        share: The part of the pack that this rank computes; None for all of it. Tokens, labels,
            position ids, `num_tokens` and `num_valid_tokens` are then those of the share, and all
            other attributes describe the whole pack.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    document_ids: Tensor
    num_tokens: int
    lengths: tuple[int, ...]
    num_valid_tokens: int
    schedule: TileSchedule | None = None
    names: tuple[str, ...] | None = None
    groups: PrefixGroups | None = None
    share: PackShare | None = None

    @classmethod
    def from_documents(
        cls,
        documents: Sequence[IntegerSequence],
        document_ids: IntegerSequence | None = None,
        names: Sequence[str] | None = None,
        max_tokens: int | None = None,
        labels: Sequence[IntegerSequence] | None = None,
    ) -> PackedBatch:
        """Packs documents in the order given.

        Args:
            documents: N one-dimensional integer sequences, none of them empty.
            document_ids: N integers that key the dropout masks; None means 0..N-1.
            names: N names for error messages.
            max_tokens: Largest allowed number of packed tokens; None sets no limit.
            labels: N integer sequences, one label per token, not shifted, as in transformers; -100
                excludes a token from the loss. None takes the documents.

        Returns:
            The batch, on the CPU.

        Raises:
            ValueError: if there is no document, a document is empty, a length does not fit, a token
                id is negative, a label other than -100 is, or an identifier is out of range.
            TypeError: if tokens, labels or identifiers are not integers.
        """
        if len(documents) == 0:
            raise ValueError("documents must hold at least one document, got none. Skip this row.")
        rows = [as_integers(f"documents[{i}]", tokens) for i, tokens in enumerate(documents)]
        lengths = [len(row) for row in rows]
        if 0 in lengths:
            where = lengths.index(0)
            name = names[where] if names is not None and where < len(names) else str(where)
            raise ValueError(
                f"documents must hold at least one token each, got an empty one ({name}). Drop it."
            )
        if labels is not None:
            check_label_lengths(labels, lengths)
            labels_T = torch.cat([as_integers(f"labels[{i}]", row) for i, row in enumerate(labels)])
        return cls.from_packed(
            torch.cat(rows),
            torch.tensor([0, *np.cumsum(lengths).tolist()], dtype=torch.int32),
            document_ids=document_ids,
            names=names,
            max_tokens=max_tokens,
            labels=None if labels is None else labels_T,
        )

    @classmethod
    def from_packed(
        cls,
        input_ids: IntegerSequence,
        cu_seqlens: Tensor,
        document_ids: IntegerSequence | None = None,
        names: Sequence[str] | None = None,
        max_tokens: int | None = None,
        labels: IntegerSequence | None = None,
    ) -> PackedBatch:
        """Builds a batch from documents that are already concatenated.

        Args:
            input_ids: [T] integers, T >= 1.
            cu_seqlens: [N + 1] int32 on the CPU: starts at 0, does not decrease, ends at T.
            document_ids: [N] integers that key the dropout masks; None means 0..N-1.
            names: N names for error messages.
            max_tokens: Largest allowed T; None sets no limit.
            labels: [T] integers, one label per token, not shifted, as in transformers; -100
                excludes a token from the loss. None takes `input_ids`.

        Returns:
            The batch, on the CPU, with its tile schedule.

        Raises:
            ValueError: if a length, a boundary, an identifier, a token id or a label does not fit;
                the message names it.
            TypeError: if a sequence does not hold integers, or cu_seqlens is not int32.
        """
        from lctrain.kernels import make_schedule

        tokens_T = as_integers("input_ids", input_ids)
        num_tokens = len(tokens_T)
        check_max_tokens(max_tokens, num_tokens)
        check_cu_seqlens(cu_seqlens, num_tokens)
        lengths = cu_seqlens.diff()
        targets_T = tokens_T if labels is None else as_integers("labels", labels)
        if len(targets_T) != num_tokens:
            raise ValueError(
                f"labels must have as many entries as input_ids ({num_tokens}), got "
                f"{len(targets_T)}. Align them token by token, unshifted."
            )
        ids_N = read_document_ids(document_ids, len(lengths))
        if names is not None and len(names) != len(lengths):
            raise ValueError(
                f"names must have one entry per document ({len(lengths)}), got {len(names)}. "
                "Pass None if documents have no names."
            )
        check_token_ids(tokens_T, targets_T, IGNORE_INDEX, cu_seqlens, names)
        shifted_T = _shift(targets_T, cu_seqlens)
        starts_T = torch.repeat_interleave(cu_seqlens[:-1].long(), lengths.long())
        lengths_list = lengths.tolist()
        return cls(
            input_ids=tokens_T[None],
            labels=shifted_T[None],
            position_ids=(torch.arange(num_tokens) - starts_T)[None],
            cu_seqlens=cu_seqlens,
            max_seqlen=max(lengths_list),
            document_ids=ids_N,
            num_tokens=num_tokens,
            lengths=tuple(lengths_list),
            num_valid_tokens=int((shifted_T != IGNORE_INDEX).sum()),
            schedule=make_schedule(lengths_list),
            names=None if names is None else tuple(names),
        )

    @classmethod
    def from_groups(
        cls,
        groups: Sequence[tuple[IntegerSequence, Sequence[IntegerSequence]]],
        document_ids: IntegerSequence | None = None,
        max_tokens: int | None = None,
    ) -> PackedBatch:
        """Packs prompts with their completions, so that a model computes each prompt once.

        Each completion attends to its prompt and to itself. In the pack, a group is the prompt
        without its last token, followed by one document for each completion, which begins with the
        last token of the prompt. The completions are trained on, the prompts are not. The model
        must be patched with attention="flash". Other decoders of transformers raise an error, and
        the functions of `lctrain.loss` refuse all other models.

        Args:
            groups: Pairs (prompt, completions) of integer sequences, none of them empty.
            document_ids: Integers that key the dropout masks, one for each document of the pack;
                None means 0..N-1.
            max_tokens: Largest allowed number of packed tokens; None sets no limit.

        Returns:
            The batch, on the CPU. Its attribute `groups` holds the documents of each group.

        Raises:
            ValueError: if a prompt or completion is missing or empty, a token id is negative, or a
                length does not fit.
            TypeError: if tokens or identifiers are not integers.
        """
        documents, labels, parents, members = group_documents(groups, as_token_ids)
        batch = cls.from_documents(documents, document_ids, max_tokens=max_tokens, labels=labels)
        offsets = [0 if parent < 0 else batch.lengths[parent] for parent in parents]
        lengths = torch.tensor(batch.lengths)
        return dataclasses.replace(
            batch,
            position_ids=batch.position_ids + torch.tensor(offsets).repeat_interleave(lengths),
            groups=prefix_groups(batch.lengths, parents, members, batch.document_ids),
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        """Returns the batch with its tensors on `device`.

        Args:
            device: The target device.
            non_blocking: Whether copies from pinned memory may run asynchronously.
        """
        return self._apply(lambda value: value.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedBatch:
        """Returns the batch with its tensors in pinned host memory."""
        return self._apply(lambda value: value.pin_memory())

    def without_targets(self) -> PackedBatch:
        """Returns the batch with every label set to -100, so that it adds nothing to the loss."""
        labels = torch.full_like(self.labels, IGNORE_INDEX)
        return dataclasses.replace(self, labels=labels, num_valid_tokens=0)

    def model_kwargs(self) -> dict[str, Any]:
        """Returns a patched model's keyword arguments, by transformers' names, without labels."""
        return {
            **({} if self.groups is None else {"prefix_groups": self.groups}),
            **({} if self.share is None else {SHARE_ARGUMENT: self.share}),
            "input_ids": self.input_ids,
            "position_ids": self.position_ids,
            "cu_seq_lens_q": self.cu_seqlens,
            "cu_seq_lens_k": self.cu_seqlens,
            "max_length_q": self.max_seqlen,
            "max_length_k": self.max_seqlen,
            "document_ids": self.document_ids,
            "schedule": self.schedule,
            "use_cache": False if self.groups is None else PatchedOnly(),
        }

    def arguments(self) -> dict[str, Any]:
        """Returns `model_kwargs()` and labels, for a model that computes its own loss.

        transformers' models shift labels themselves, so here `labels` [1, T] int64 are not shifted:
        each position holds its own token, and the first position of a document -100. The tile
        schedule is left out, since transformers' Trainer cannot move it to the device; the kernels
        build it.

        Raises:
            ValueError: if documents share a prefix, which the Trainer cannot move either, or the
                batch is one rank's share of a pack, whose last label is another rank's token.
        """
        if self.share is not None:
            raise ValueError(
                "a batch must be a whole pack for a model that computes its own loss, got one of "
                f"{self.share.size} shares. Call model(**batch.model_kwargs()), and compute the "
                "loss from labels."
            )
        if self.groups is not None:
            raise ValueError(
                "a batch must be without shared prefixes for a model that computes its own loss, "
                "got groups. Call model(**batch.model_kwargs()), and compute the loss from labels."
            )
        arguments = self.model_kwargs()
        del arguments["schedule"]
        labels = self.labels.roll(1, dims=-1)  # the last label, -100, moves to the first position
        return {"labels": labels, **arguments}

    def __contains__(self, name: object) -> bool:
        """Raises, since a PackedBatch is not a mapping; transformers' Trainer expects one.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            f"a batch must be a mapping to look up {name!r}, got a PackedBatch. In transformers' "
            "Trainer use data_collator=PackCollator(as_arguments=True); elsewhere call "
            "model_kwargs() or arguments()."
        )

    def __repr__(self) -> str:
        return (
            f"PackedBatch({pluralize(len(self.lengths), 'document')}, "
            f"{pluralize(self.num_tokens, 'token')}, longest "
            f"{self.max_seqlen}, on {self.input_ids.device})"
        )

    def _apply(self, function: Any) -> PackedBatch:
        changes = {
            field.name: function(value)
            for field in dataclasses.fields(self)
            if hasattr(value := getattr(self, field.name), "pin_memory")  # not of Python values
        }
        return dataclasses.replace(self, **changes)


def _shift(targets_T: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Moves each label to the position before it; the last position of each document gets -100.

    Args:
        targets_T: [T] int64, labels that are not shifted.
        cu_seqlens: [N + 1] int32, boundaries of the documents.

    Returns:
        [T] int64, the shifted labels.
    """
    shifted_T = torch.full_like(targets_T, IGNORE_INDEX)
    shifted_T[:-1] = targets_T[1:]
    ends = cu_seqlens[1:][cu_seqlens.diff() > 0].long() - 1
    shifted_T[ends] = IGNORE_INDEX
    return shifted_T


PackedBatch.__setattr__ = set_unchanged  # type: ignore[assignment, method-assign]
