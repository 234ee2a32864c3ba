"""Reads and checks what a PackedBatch is made of: tokens, labels, boundaries, document ids.

These checks run once, on the CPU. Later steps do not check a batch again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from lctrain.instances import require_instance
from lctrain.limits import MIN_TOKENS

IntegerSequence = Tensor | np.ndarray | Sequence[int]


def check_max_tokens(max_tokens: int | None, num_tokens: int = 0) -> None:
    """Raises a ValueError if `max_tokens` is too small.

    Args:
        max_tokens: Largest allowed number of tokens in a row, at least 2; None sets no limit.
        num_tokens: Number of tokens that the row must hold.
    """
    if max_tokens is None:
        return
    require_instance("max_tokens", max_tokens, int, "Pass a number of tokens.")
    if max_tokens < MIN_TOKENS:
        raise ValueError(
            f"max_tokens must be at least {MIN_TOKENS}, got {max_tokens}. A token needs a next one "
            "to predict; raise max_tokens."
        )
    if num_tokens > max_tokens:
        raise ValueError(
            f"a pack must hold at most max_tokens = {max_tokens} tokens, got {num_tokens}. "
            "Split the documents over several packs, or raise max_tokens."
        )


def check_cu_seqlens(cu_seqlens: Tensor, num_tokens: int) -> None:
    """Raises unless cu_seqlens is [N + 1] int32 on the CPU and rises from 0 to `num_tokens`.

    Args:
        cu_seqlens: Cumulative lengths of the documents.
        num_tokens: Number of packed tokens, at least 1.

    Raises:
        TypeError: if cu_seqlens is not an int32 tensor.
        ValueError: if its device, shape or values do not fit, or there are no tokens.
    """
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype != torch.int32:
        got = cu_seqlens.dtype if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        raise TypeError(f"cu_seqlens must be an int32 tensor, got {got}. Call .to(torch.int32).")
    if cu_seqlens.device.type != "cpu":
        raise ValueError(
            f"cu_seqlens must be on the CPU, got {cu_seqlens.device}. Build the batch on the "
            "CPU and move it with .to(device)."
        )
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
        raise ValueError(
            f"cu_seqlens must have shape [documents + 1], got {tuple(cu_seqlens.shape)}. "
            "Pass the cumulative lengths with a leading 0."
        )
    if int(cu_seqlens[0]) != 0:
        raise ValueError(f"cu_seqlens must start at 0, got {int(cu_seqlens[0])}. Prepend a 0.")
    if bool((cu_seqlens.diff() < 0).any()):
        raise ValueError("cu_seqlens must not decrease. Pass cumulative lengths, not lengths.")
    if int(cu_seqlens[-1]) != num_tokens:
        raise ValueError(
            f"cu_seqlens must end at the number of packed tokens ({num_tokens}), got "
            f"{int(cu_seqlens[-1])}. Every token belongs to a document."
        )
    if num_tokens == 0:
        raise ValueError("input_ids must hold at least one token, got none. Skip this row.")


def as_integers(name: str, values: IntegerSequence) -> Tensor:
    """Returns the values as a tensor [T] int64 on the CPU.

    Args:
        name: Name of the argument, for messages.
        values: Integers of shape [T] or [1, T].

    Raises:
        TypeError: if the values are not integers.
        ValueError: if there is more than one dimension.
    """
    if isinstance(values, str | bytes):
        raise TypeError(
            f"{name} must hold token ids, got text ({values[:20]!r}). Tokenize it first: "
            "tokenizer(text)['input_ids']."
        )
    if isinstance(values, np.ndarray) and not values.flags.writeable:
        values = values.copy()  # torch warns about views of read-only memory
    tensor = torch.as_tensor(values)
    if tensor.numel() == 0:
        tensor = tensor.long()
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"{name} must hold integers, got {tensor.dtype}. Pass token ids.")
    if tensor.dim() == 2 and tensor.shape[0] == 1:
        tensor = tensor[0]
    if tensor.dim() != 1:
        raise ValueError(f"{name} must have one dimension, got shape {tuple(tensor.shape)}.")
    return tensor.to("cpu", torch.int64)


def as_token_ids(name: str, values: IntegerSequence) -> Tensor:
    """Returns token ids as a tensor [n] int64 on the CPU.

    Args:
        name: Name of the sequence, for messages.
        values: Token ids of shape [n] or [1, n].

    Raises:
        TypeError: if the values are not integers.
        ValueError: if there is more than one dimension, or an id is negative.
    """
    tokens_n = as_integers(name, values)
    if len(tokens_n) and int(tokens_n.min()) < 0:
        place = int((tokens_n < 0).nonzero()[0])
        raise ValueError(
            f"{name} must hold token ids of at least 0, got {int(tokens_n[place])} at position "
            f"{place}. {_NO_IDS}"
        )
    return tokens_n


def check_token_ids(
    tokens_T: Tensor,
    targets_T: Tensor,
    ignored: int,
    cu_seqlens: Tensor,
    names: Sequence[str] | None,
) -> None:
    """Raises a ValueError if a token id is negative, or a label is, other than `ignored`.

    On a GPU, such an index would abort the process.

    Args:
        tokens_T: [T] int64 on the CPU, the token ids.
        targets_T: [T] int64 on the CPU, the labels.
        ignored: Label of tokens without a loss.
        cu_seqlens: [N + 1] int32 on the CPU, checked boundaries of the documents.
        names: N names for the message, or None.
    """
    wrong_T = tokens_T < 0
    if bool(wrong_T.any()):
        where = _place(wrong_T, cu_seqlens, names)
        raise ValueError(
            f"documents must hold token ids of at least 0, got {where(tokens_T)}. {_NO_IDS}"
        )
    wrong_T = (targets_T < 0) & (targets_T != ignored)
    if bool(wrong_T.any()):
        where = _place(wrong_T, cu_seqlens, names)
        raise ValueError(
            f"labels must be token ids, or {ignored} for tokens without a loss, got "
            f"{where(targets_T)}. Set it to {ignored}."
        )


_NO_IDS = "Remove padding and placeholders, or map them to tokens of the vocabulary."


def _place(
    wrong_T: Tensor, cu_seqlens: Tensor, names: Sequence[str] | None
) -> Callable[[Tensor], str]:
    """Returns a function that describes the first wrong value of a tensor [T], and its place."""
    first = int(wrong_T.nonzero()[0])
    document = int(torch.searchsorted(cu_seqlens, first, right=True)) - 1
    name = "" if names is None else f" ({names[document]})"
    place = f"position {first - int(cu_seqlens[document])} of document {document}{name}"
    return lambda values_T: f"{int(values_T[first])} at {place}"


def read_document_ids(document_ids: IntegerSequence | None, documents: int) -> Tensor:
    """Returns the document ids as [N] int32 on the CPU; None gives 0..N-1.

    Args:
        document_ids: N integers in [0, 2^31), or None.
        documents: Number of documents N.

    Raises:
        TypeError: if the values are not integers.
        ValueError: if there is not one for each document, or one is out of range.
    """
    if document_ids is None:
        return torch.arange(documents, dtype=torch.int32)
    ids_N = as_integers("document_ids", document_ids)
    if len(ids_N) != documents:
        raise ValueError(
            f"document_ids must have one entry per document ({documents}), got {len(ids_N)}."
        )
    if int(ids_N.min()) < 0 or int(ids_N.max()) >= 2**31:
        raise ValueError("document_ids must be in [0, 2^31), got one outside. Number them anew.")
    return ids_N.to(torch.int32)


def check_label_lengths(labels: Sequence[IntegerSequence], lengths: Sequence[int]) -> None:
    """Raises a ValueError unless every document has as many labels as tokens.

    Args:
        labels: Labels of each document, not shifted.
        lengths: Number of tokens of each document.
    """
    if len(labels) != len(lengths):
        raise ValueError(
            f"labels must have one entry per document ({len(lengths)}), got {len(labels)}."
        )
    for i, (row, length) in enumerate(zip(labels, lengths, strict=True)):
        if len(row) != length:
            raise ValueError(
                f"labels[{i}] must be as long as its document ({length}), got {len(row)}. "
                "Align them token by token, unshifted."
            )
