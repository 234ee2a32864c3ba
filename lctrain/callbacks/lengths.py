"""Changes the lengths of a document's neighbours in a pack, for IsolationCheck."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lctrain.batch import PackedBatch

SHORTEST = 16  # tokens of the shortest neighbours; one document per token would be slow
REACH = 2  # length of the longest neighbours in windows of the model


def observed_document(batch: PackedBatch) -> tuple[int, int, int]:
    """Returns the index, first token and end of the shortest document that is not empty.

    The shortest document shows best whether a model's outputs depend on the longest document of a
    row.

    Args:
        batch: The pack.

    Returns:
        (index, start, end); the document is tokens [start, end) of the pack.
    """
    lengths = batch.lengths
    index = min((i for i, length in enumerate(lengths) if length > 0), key=lambda i: lengths[i])
    start = sum(lengths[:index])
    return index, start, start + lengths[index]


def with_other_lengths(
    batch: PackedBatch, start: int, end: int, model: nn.Module
) -> Iterator[PackedBatch]:
    """Yields the pack with other boundaries between the documents outside of [start, end).

    The tokens do not change. In the first pack that is yielded, neighbours are at most as long as
    the document (or 16 tokens). In the second pack, they are as long as the pack allows: up to
    twice the model's window with rotary embeddings, else up to the longest document of the pack,
    since a table of positions is limited. A pack is skipped if its longest document is as long as
    that of an earlier pack.

    Args:
        batch: The pack.
        start: First token of the document that stays as it is.
        end: Index after its last token.
        model: The model, for its window.
    """
    shortest = max(end - start, SHORTEST)
    longest = batch.max_seqlen
    if _is_rotary(model):
        window = getattr(getattr(model, "config", None), "max_position_embeddings", None) or longest
        longest = REACH * max(longest, int(window))
    seen = {batch.max_seqlen}
    for length in (shortest, longest):
        lengths = [*_cut(start, length), end - start, *_cut(batch.num_tokens - end, length)]
        if max(lengths) in seen:
            continue
        seen.add(max(lengths))
        ends = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
        yield PackedBatch.from_packed(batch.input_ids[0].cpu(), ends).to(batch.input_ids.device)


def _cut(tokens: int, length: int) -> list[int]:
    whole, rest = divmod(tokens, length)
    return [length] * whole + [rest] * (rest > 0)


def _is_rotary(model: nn.Module) -> bool:
    names = (name for name, value in model.named_buffers() if isinstance(value, Tensor))
    return any(name.endswith("inv_freq") for name in names)
