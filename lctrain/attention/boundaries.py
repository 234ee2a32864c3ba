"""Boundaries: where the documents of a batch begin and end, found once per forward pass.

Boundaries hold a `Pack`, the object by which the kernels know the documents, and map rows with
padding to the pack. There are four ways to find them:

- `from_cu_seqlens` takes the `cu_seq_lens` and lengths that a PackedBatch carries;
- `from_padding` reads the attention mask of padded rows;
- `find_segments` and `from_segments` read position ids that restart at every document;
- `from_rows` makes each row one document.

A mask and position ids are tensors on the device, so reading their values costs one synchronisation
on a GPU. `cu_seq_lens` costs none, so training uses it.

Boundaries are cached on the mask or the position ids, and may be used again in a later forward
pass. So their tensors are never created in inference mode: autograd could not save such tensors in
a training step.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lctrain.attention.prefixes import GROUPS_ARGUMENT, SharedPrefixes, read_groups

if TYPE_CHECKING:
    from lctrain_kernels.pack import Pack

PACK_ARGUMENTS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


class Padding(NamedTuple):
    """The rows that moved tokens come from; see `lctrain.models.unpadding` and `.heads`.

    Attributes:
        rows: Shape (B, S) of the rows.
        places: [T] int64, index of each token among the B * S flattened tokens of the rows.
        owner: Class name of the model whose outputs go back into rows.
    """

    rows: tuple[int, int]
    places: Tensor
    owner: str


class Boundaries(NamedTuple):
    """The documents in rows of tokens [B, S], and which of these tokens the kernels compute.

    Attributes:
        pack: Pack of the documents, without padding: boundaries, lengths, document ids and tile
            schedule. Every layer passes it to the kernels.
        queries: Shape (B, S) of the rows of queries.
        keys: Shape (B, Sk) of the rows of keys; with a key/value cache, Sk exceeds S.
        indices_q: [T] int64, indices of the queries that are not padding, in the B * S flattened
            queries; None if there is no padding.
        indices_k: [Tk] int64, indices of the keys that are not padding, in the B * Sk flattened
            keys; None if there is no padding.
        shared_rows: Whether a row holds several documents; None if finding out would take a
            synchronisation.
        padding: The rows that the tokens come from, if an input hook has moved them to other rows.
        prefixes: Prefixes that documents of the pack share; None without any.
        share: The part of the pack that the rows hold, a `lctrain.distributed.share.PackShare`;
            None if they hold all of it.
    """

    pack: "Pack"
    queries: tuple[int, int]
    keys: tuple[int, int]
    indices_q: Tensor | None = None
    indices_k: Tensor | None = None
    shared_rows: bool | None = None
    padding: Padding | None = None
    prefixes: SharedPrefixes | None = None
    share: Any = None


def is_packed(arguments: dict[str, Any]) -> bool:
    """Returns whether a call passes `cu_seq_lens` or `max_length`, for queries or keys."""
    return any(arguments.get(name) is not None for name in PACK_ARGUMENTS)


def from_cu_seqlens(
    arguments: dict[str, Any],
    queries: tuple[int, int],
    keys: tuple[int, int],
    device: torch.device,
) -> Boundaries:
    """Returns the boundaries that `cu_seq_lens` and `max_length` give, without synchronising.

    Args:
        arguments: `PackedBatch.model_kwargs()`, or a batch of transformers'
            DataCollatorWithFlattening.
        queries: Shape (1, S) of the query rows.
        keys: Shape (1, Sk) of the key rows.
        device: Device of the rows.

    Raises:
        TypeError: if an argument has the wrong dtype.
        ValueError: if an argument is missing, max_length is not an int, there are several rows, the
            boundaries are no vector, or an id or the schedule does not fit. On the CPU, also if the
            boundaries do not cover the row, or queries and keys have different documents.
    """
    from lctrain_kernels.pack import checked_pack

    missing = [name for name in PACK_ARGUMENTS if arguments.get(name) is None]
    if missing:
        raise ValueError(
            f"packed inputs must bring {', '.join(PACK_ARGUMENTS)}, got no {', '.join(missing)}. "
            "Pass PackedBatch.model_kwargs()."
        )
    if queries[0] != 1:
        raise ValueError(
            f"packed inputs must be one row [1, T], got {queries[0]} rows. Concatenate the "
            "documents of all rows into one row, as PackedBatch.from_documents does."
        )
    if not torch.compiler.is_compiling():
        _check_pack(arguments)
    pack = checked_pack(
        arguments["cu_seq_lens_q"],
        arguments["cu_seq_lens_k"],
        queries[1],
        keys[1],
        device,
        max_seqlen_q=_length("max_length_q", arguments["max_length_q"]),
        max_seqlen_k=_length("max_length_k", arguments["max_length_k"]),
        document_ids=arguments.get("document_ids"),
        schedule=arguments.get("schedule"),
        names=PACK_ARGUMENTS,
    )
    prefixes = read_groups(arguments.get(GROUPS_ARGUMENT), device)
    return Boundaries(pack, queries, keys, prefixes=prefixes)


def from_rows(batch: int, queries: int, keys: int, device: torch.device) -> Boundaries:
    """Returns boundaries in which every row is one document.

    Args:
        batch: Number of rows.
        queries: Queries per row. If there are fewer queries than keys, the queries belong to the
            last keys of the row.
        keys: Keys per row.
        device: Device of the boundaries.
    """
    from lctrain_kernels.pack import rows_pack

    return Boundaries(rows_pack(batch, queries, keys, device), (batch, queries), (batch, keys))


@torch.compiler.disable
@torch.inference_mode(mode=False)
def from_padding(mask: Tensor, queries: int, *, drop_queries: bool = True) -> Boundaries:
    """Returns boundaries in which every row, without its padding, is one document.

    Args:
        mask: [B, Sk] bool, True at keys that are not padding.
        queries: Queries per row. If there are fewer queries than keys, the queries belong to the
            last keys of the row.
        drop_queries: Whether to leave out queries at padding, whose output is then zero. If False,
            such queries attend to the other keys of the row, as in transformers' own attention.
    """
    batch, keys = mask.shape
    kept_k = mask.flatten().nonzero().flatten()
    lengths_k = mask.sum(1)
    if drop_queries and queries == keys:
        kept_q, lengths_q = kept_k, lengths_k
    else:
        queried = mask[:, keys - queries :] if drop_queries else mask.new_ones((batch, queries))
        kept_q, lengths_q = queried.flatten().nonzero().flatten(), queried.sum(1)
    return _from_lengths(
        lengths_q, lengths_k, kept_q, kept_k, queries=(batch, queries), keys=(batch, keys)
    )


@torch.compiler.disable
@torch.inference_mode(mode=False)
def from_segments(segments: Tensor) -> Boundaries:
    """Returns boundaries in which each run of equal document numbers in a row is a document.

    Args:
        segments: [B, S] integers, the number of each token's document; 0 at padding.
    """
    rows = (segments.shape[0], segments.shape[1])
    row = torch.arange(rows[0], device=segments.device)[:, None]
    keys = (segments + row * (rows[1] + 1)).flatten()
    kept = segments.flatten().nonzero().flatten()
    numbers, lengths = keys[kept].unique_consecutive(return_counts=True)
    boundaries = _from_lengths(lengths, lengths, kept, kept, queries=rows, keys=rows)
    places = numbers // (rows[1] + 1)  # each document's row; a row may hold padding only
    return boundaries._replace(shared_rows=bool((places.diff() == 0).any()))


@torch.compiler.disable
@torch.inference_mode(mode=False)
def find_segments(position_ids: Tensor, mask: Tensor | None = None) -> Tensor | None:
    """Numbers the documents of each row from its position ids.

    A document ends where the next position is not one higher. transformers' packed masks follow the
    same rule. Positions at padding mean nothing: behind padding, a document continues if its
    positions do, with the padding counted or without.

    Args:
        position_ids: [B, S] integers.
        mask: [B, S] bool, True at tokens that are not padding; None if there is no padding.

    Returns:
        [B, S] int64, the number of each token's document from 1; 0 at padding. None if no row holds
        more than one document.
    """
    if mask is None:
        begins = F.pad(position_ids.diff(dim=-1) != 1, (1, 0), value=False)
        return begins.cumsum(-1) + 1 if bool(begins.any()) else None
    columns = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
    before = columns.masked_fill(~mask, 0).cummax(-1).values[:, :-1]  # column of the token before
    steps = position_ids[:, 1:] - position_ids.gather(1, before)
    begins = mask[:, 1:] & (steps != 1) & (steps != columns[:, 1:] - before)
    segments = F.pad(begins, (1, 0), value=False).cumsum(-1) + 1
    # The first token of a row may count as a beginning, so a row is packed only if its tokens lie
    # in more than one segment.
    highest = segments.masked_fill(~mask, 0).amax(-1)
    lowest = segments.masked_fill(~mask, segments.shape[1] + 1).amin(-1)
    if not bool((highest > lowest).any()):
        return None
    return segments.masked_fill(~mask, 0)


def find_positions(boundaries: Boundaries) -> Tensor:
    """Returns the position of every query in its document, cached keys included.

    Does not synchronise with the device.

    Returns:
        [B, S] int64, 0 at padding.
    """
    total = boundaries.queries[0] * boundaries.queries[1]
    real, cu_seqlens = boundaries.indices_q, boundaries.pack.cu_seqlens_q
    tokens, document = _documents(boundaries)
    positions = tokens - cu_seqlens[document]
    if boundaries.pack.cu_seqlens_k is not cu_seqlens:
        cached = boundaries.pack.cu_seqlens_k.diff() - cu_seqlens.diff()
        positions = positions + cached[document]
    if real is not None:
        positions = positions.new_zeros(total).index_copy(0, real, positions)
    return positions.view(boundaries.queries)


def find_places(boundaries: Boundaries) -> tuple[Tensor, Tensor]:
    """Returns the index of every query's document, and the query's position in the document.

    Returns:
        Two tensors [T] int64, where T counts the queries that are not padding.
    """
    tokens, document = _documents(boundaries)
    return document, tokens - boundaries.pack.cu_seqlens_q[document]


def find_lengths(boundaries: Boundaries, position_ids: Tensor | None = None) -> Tensor:
    """Returns the length of every query's document, without synchronising with the device.

    Args:
        boundaries: Boundaries of the documents.
        position_ids: [B, S] or [1, S] integers. If given, the length of a document is its highest
            position plus 1, as in transformers. If None, or for a share of a pack, it is the
            document's number of keys.

    Returns:
        [B, S] int64, 1 at padding.
    """
    total = boundaries.queries[0] * boundaries.queries[1]
    real = boundaries.indices_q
    _, document = _documents(boundaries)
    keys = boundaries.pack.cu_seqlens_k.diff().long()
    if position_ids is None or boundaries.share is not None:
        lengths = keys
    else:
        positions = position_ids.expand(boundaries.queries).flatten().to(keys)
        positions = positions if real is None else positions.index_select(0, real)
        highest = keys.new_zeros(keys.shape).scatter_reduce(0, document, positions, "amax")
        lengths = highest + 1
    lengths = lengths[document]
    if real is not None:
        lengths = lengths.new_ones(total).index_copy(0, real, lengths)
    return lengths.view(boundaries.queries)


def _documents(boundaries: Boundaries) -> tuple[Tensor, Tensor]:
    """Returns where the T queries of the rows are in the pack.

    Returns:
        Two tensors [T] int64: the index of each query among the pack's queries, and the index of
        its document. The first is 0 to T - 1, unless the rows hold a share of the pack.
    """
    real, cu_seqlens = boundaries.indices_q, boundaries.pack.cu_seqlens_q
    if boundaries.share is None:
        count = boundaries.pack.total_q if real is None else real.shape[0]
        tokens = torch.arange(count, device=cu_seqlens.device)
    else:
        tokens = boundaries.share.places
    document = torch.searchsorted(cu_seqlens[1:], tokens.to(torch.int32), right=True)
    # The kernels refuse tokens beyond the last document. Clamping keeps the indices valid here.
    return tokens, document.clamp(max=cu_seqlens.shape[0] - 2)


def _check_pack(arguments: dict[str, Any]) -> None:
    """Checks the arguments that describe a pack. Values are checked only for tensors on the CPU."""
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        value = arguments[name]
        if not isinstance(value, Tensor) or value.dim() != 1 or value.numel() < 2:
            shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"{name} must be an int32 tensor [documents + 1], got {shape}. Pass "
                "PackedBatch.model_kwargs()."
            )
    ends_q, ends_k = arguments["cu_seq_lens_q"], arguments["cu_seq_lens_k"]
    if ends_q.device.type != "cpu" or ends_k.device.type != "cpu":
        return
    if ends_q is not ends_k and ends_q.tolist() != ends_k.tolist():
        raise ValueError(
            f"cu_seq_lens_q must equal cu_seq_lens_k, got {_preview(ends_q)} and "
            f"{_preview(ends_k)}: the tokens of a pack attend to one another. Pass one tensor as "
            "both."
        )
    longest = int(ends_q.diff().max())
    for name in ("max_length_q", "max_length_k"):
        value = arguments[name]
        if isinstance(value, int) and value < longest:
            raise ValueError(
                f"{name} must be at least {longest}, the tokens of the longest document, got "
                f"{value}. Pass PackedBatch.model_kwargs()."
            )


def _preview(values: Tensor) -> str:
    shown = ", ".join(str(value) for value in values[:6].tolist())
    return f"[{shown}, ...]" if values.numel() > 6 else f"[{shown}]"


def _length(name: str, value: Any) -> int:
    if isinstance(value, Tensor) and value.device.type == "cpu" and value.numel() == 1:
        return int(value)
    if isinstance(value, Tensor):
        raise ValueError(
            f"{name} must be a Python int, got a tensor on {value.device}. Compute it from the "
            "lengths on the CPU: reading it from the device would stall every layer."
        )
    return value


def _from_lengths(
    lengths_q: Tensor,
    lengths_k: Tensor,
    kept_q: Tensor,
    kept_k: Tensor,
    *,
    queries: tuple[int, int],
    keys: tuple[int, int],
) -> Boundaries:
    from lctrain_kernels.pack import Pack

    cu_seqlens_q = _cumulative(lengths_q)
    pack = Pack(
        cu_seqlens_q,
        cu_seqlens_q if lengths_k is lengths_q else _cumulative(lengths_k),
        kept_q.shape[0],
        kept_k.shape[0],
        int(lengths_q.max()) if lengths_q.numel() else 0,
        int(lengths_k.max()) if lengths_k.numel() else 0,
    )
    return Boundaries(
        pack,
        queries,
        keys,
        None if pack.total_q == queries[0] * queries[1] else kept_q,
        None if pack.total_k == keys[0] * keys[1] else kept_k,
    )


def _cumulative(lengths: Tensor) -> Tensor:
    return F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
