"""Other lengths for the documents around one of a pack, which must not notice."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lctrain.batch import PackedBatch

SHORTEST = 16  # tokens of the shortest neighbours: one document per token would be slow
REACH = 2  # neighbours grow to so many times the model's window, where the pack has the tokens


def observed_document(batch: PackedBatch) -> tuple[int, int, int]:
    """Returns (index, start, end) of the shortest document that has tokens.

    What follows the longest document of a row changes for the shortest one, if for any.
    """
    lengths = batch.lengths
    index = min((i for i, length in enumerate(lengths) if length > 0), key=lambda i: lengths[i])
    start = sum(lengths[:index])
    return index, start, start + lengths[index]


def with_other_lengths(
    batch: PackedBatch, start: int, end: int, model: nn.Module
) -> Iterator[PackedBatch]:
    """Yields the pack again, with other document lengths for all tokens outside of [start, end).

    Every token stays where it is. First the neighbours are no longer than the document itself, then
    as long as the tokens on its side allow: up to twice the model's window if it has rotary
    embeddings, else up to the longest document of the batch, since a table of positions has an end.
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
