"""PrefixGroups: which documents of a pack continue a prefix that they share."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from lctrain_kernels.schedule import TileSchedule


class PrefixGroups(NamedTuple):
    """G groups of documents in a pack: each a prefix, followed by the suffixes that share it.

    A suffix attends to the prefix and to itself. The prefix is a document of the pack, and is
    computed once. P and S are the numbers of tokens of all prefixes and of all suffixes.

    Attributes:
        parents: Index of the prefix of each document in the pack; -1 for a document without one.
        members: For each group, the indices of the documents that hold its completions.
        prefix_tokens: [P] int64, indices of the prefixes' tokens in the pack.
        suffix_tokens: [S] int64, indices of the suffixes' tokens in the pack.
        cu_prefix: [G + 1] int32, cumulative lengths of the prefixes.
        cu_suffix: [G + 1] int32, cumulative lengths of all suffixes of a group together.
        document_ids: [G] int32, number of each group that keys the dropout mask of its suffixes'
            attention to the prefix.
        max_prefix: Length of the longest prefix.
        max_suffix: Largest number of suffix tokens in a group.
        longest: Length of the longest prefix with one of its suffixes.
        schedule: Tile schedule of the attention of suffixes to prefixes.
    """

    parents: tuple[int, ...]
    members: tuple[tuple[int, ...], ...]
    prefix_tokens: Tensor
    suffix_tokens: Tensor
    cu_prefix: Tensor
    cu_suffix: Tensor
    document_ids: Tensor
    max_prefix: int
    max_suffix: int
    longest: int
    schedule: TileSchedule

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PrefixGroups:
        """Returns the groups with their tensors on `device`."""
        return self._apply(lambda value: value.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PrefixGroups:
        """Returns the groups with their tensors in pinned host memory."""
        return self._apply(lambda value: value.pin_memory())

    def _apply(self, function: Callable[[Any], Any]) -> PrefixGroups:
        values = self._asdict().items()
        return self._replace(**{n: function(x) for n, x in values if hasattr(x, "pin_memory")})


class PatchedOnly:
    """The value of `use_cache` for a model that gets groups; a patched model reads it as False.

    A model without a patch takes any keyword argument and would ignore the groups. But it reads
    `use_cache`, and the truth value of this object is an error.
    """

    def __bool__(self) -> bool:
        """Raises, since only an unpatched model asks.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "the attention of shared prefixes must be flash, got a model that is not patched and "
            "ignores them. Call lctrain.patch_model(model), or pass prompts and completions as "
            "separate documents: PackedBatch.from_documents."
        )

    def __repr__(self) -> str:
        return "PatchedOnly()"


def group_documents(
    groups: Sequence[tuple[Any, Sequence[Any]]], read: Callable[[str, Any], Tensor]
) -> tuple[list[Tensor], list[Tensor], list[int], list[tuple[int, ...]]]:
    """Divides groups into documents: a prefix, then one suffix for every completion.

    The prefix is the prompt without its last token. That token begins every suffix, since it
    predicts the first token of the completion. If the prompt has only one token, there is no
    prefix.

    Args:
        groups: Pairs of a prompt and its completions, integers.
        read: Called as read(name, sequence); returns the sequence's integers, [n] int64. The name
            is for messages.

    Returns:
        Four lists: the documents, [n] int64 each; their labels, not shifted, with -100 at the
        tokens of the prompt; the index of each document's prefix, or -1; and for each group, the
        indices of the documents that hold its completions.

    Raises:
        ValueError: if there is no group, or a prompt or completion is empty.
    """
    if len(groups) == 0:
        raise ValueError("groups must hold at least one group, got none. Skip this row.")
    documents: list[Tensor] = []
    labels: list[Tensor] = []
    parents: list[int] = []
    members: list[tuple[int, ...]] = []
    for number, group in enumerate(groups):
        if not isinstance(group, tuple | list) or len(group) != 2:
            raise ValueError(
                "groups must be pairs of a prompt and a list of its completions, got "
                f"{str(group)[:60]} as groups[{number}]. Write [(prompt, [completion, ...])]."
            )
        given, completions = group
        prompt = read(f"groups[{number}][0]", given)
        if len(prompt) == 0 or len(completions) == 0:
            what = "an empty prompt" if len(prompt) == 0 else "no completion"
            raise ValueError(
                f"groups must hold a prompt with a token and a completion each, got {what} in "
                f"groups[{number}]. Drop it."
            )
        parent = -1
        if len(prompt) > 1:
            parent = len(documents)
            documents.append(prompt[:-1])
            labels.append(torch.full_like(prompt[:-1], -100))
            parents.append(-1)
        first = len(documents)
        for index, tokens in enumerate(completions):
            name = f"groups[{number}][1][{index}]"
            completion = read(name, tokens)
            if len(completion) == 0:
                raise ValueError(
                    "completions must hold at least one token each, got an empty one as "
                    f"{name}. Drop it, or end it with the end token."
                )
            documents.append(torch.cat([prompt[-1:], completion]))
            labels.append(torch.cat([torch.full_like(prompt[-1:], -100), completion]))
            parents.append(parent)
        members.append(tuple(range(first, len(documents))))
    return documents, labels, parents, members


def prefix_groups(
    lengths: Sequence[int],
    parents: Sequence[int],
    members: Sequence[tuple[int, ...]],
    document_ids: Tensor,
) -> PrefixGroups:
    """Builds the PrefixGroups of a pack, with tensors on the CPU.

    Args:
        lengths: Lengths of the N documents. The suffixes of a prefix come right after it.
        parents: Index of each document's prefix; -1 for a document without one.
        members: For each group, the indices of the documents that hold its completions.
        document_ids: [N] int32, numbers that key the dropout masks.
    """
    from lctrain_kernels.schedule import make_schedule

    starts = np.cumsum([0, *lengths])
    prefixes = sorted(set(parents) - {-1})
    children = [[n for n, parent in enumerate(parents) if parent == p] for p in prefixes]
    tokens = [np.arange(starts[n], starts[n + 1]) for n in range(len(lengths))]
    suffixes = list(itertools.chain(*children))
    prefix_lengths = [lengths[p] for p in prefixes]
    suffix_lengths = [sum(lengths[n] for n in group) for group in children]
    none = np.array([], dtype=np.int64)
    longest = [lengths[parents[n]] + lengths[n] for n in suffixes]
    return PrefixGroups(
        parents=tuple(parents),
        members=tuple(members),
        prefix_tokens=torch.from_numpy(np.concatenate([none, *(tokens[p] for p in prefixes)])),
        suffix_tokens=torch.from_numpy(np.concatenate([none, *(tokens[n] for n in suffixes)])),
        cu_prefix=torch.tensor(np.cumsum([0, *prefix_lengths]), dtype=torch.int32),
        cu_suffix=torch.tensor(np.cumsum([0, *suffix_lengths]), dtype=torch.int32),
        document_ids=document_ids[torch.tensor(prefixes, dtype=torch.int64)],
        max_prefix=max(prefix_lengths, default=0),
        max_suffix=max(suffix_lengths, default=0),
        longest=max([*longest, *lengths]),
        schedule=make_schedule(suffix_lengths, prefix_lengths),
    )
