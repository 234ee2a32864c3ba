"""Changes the document boundaries around one document of a pack, for IsolationCheck."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lctrain.batch import PackedBatch

SHORTEST = 16  # tokens of the shortest other documents; one document per token would be slow
REACH = 2  # length of the longest other documents, in multiples of the model's trained window


def observed_document(batch: PackedBatch) -> tuple[int, int, int]:
    """Returns the shortest document of a pack that is not empty.

    If a model's outputs depend on the longest document of a row, this document shows it best.

    Args:
        batch: The pack.

    Returns:
        (index, start, end): the document's index, and its tokens [start, end) in the pack.
    """
    lengths = batch.lengths
    index = min((i for i, length in enumerate(lengths) if length > 0), key=lambda i: lengths[i])
    start = sum(lengths[:index])
    return index, start, start + lengths[index]


def with_other_lengths(
    batch: PackedBatch, start: int, end: int, model: nn.Module
) -> Iterator[PackedBatch]:
    """Yields packs with the same tokens and other document boundaries outside of [start, end).

    In the first pack, all other documents are at most as long as the document [start, end), or 16
    tokens. In the second pack, they are as long as possible. If the model has rotary embeddings,
    that is up to twice the model's window or the pack's longest document, whichever is larger.
    Otherwise it is up to the pack's longest document, since a table of positions is limited. A pack
    is skipped if its longest document is as long as that of an earlier pack.

    Args:
        batch: The pack.
        start: First token of the document that keeps its boundaries.
        end: Index after its last token.
        model: The model, whose config states the trained window.
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
