"""The task masked_perplexity: how well a masked language model fills in tokens, by context."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import nn

from lctrain.attention import is_patched
from lctrain.batch import IGNORE_INDEX, PackedBatch
from lctrain.data.masking import DEFAULT_FRACTION, MaskTokens
from lctrain.eval.limits import check_model
from lctrain.eval.longest import longest_documents
from lctrain.eval.ratio import token_mean
from lctrain.eval.reader import Reader
from lctrain.eval.records import Item, Measure, Result, Subject
from lctrain.eval.shared_work import owners, summed
from lctrain.eval.table import PerplexityRow, PerplexityTable
from lctrain.eval.task import Task
from lctrain.loss.evaluation_mode import evaluation_mode
from lctrain.loss.masked_lm import masked_scores

if TYPE_CHECKING:
    from lctrain.config import EvalConfig


class _Masked(NamedTuple):
    """A document after masking: its tokens, and the tokens to predict, with -100 elsewhere."""

    name: str
    tokens: np.ndarray
    labels: np.ndarray


_Piece = tuple[int, slice]


class MaskedPerplexity(Task):
    """The loss and accuracy of masked tokens, the same at every length. Its items are documents.

    A document is cut into windows of `length` tokens, from its beginning. The model sees one window
    at a time, on both sides of a token.

    Args:
        fraction: Share of the tokens that are masked, in (0, 1).
        seed: Seed of the choice of masked tokens.
        masking: The choice itself; None takes that of the tokenizer, with `fraction` and `seed`.
        documents: Number of documents, the longest first; None for all.
        document_tokens: Number of tokens to read of each document; None for all.
    """

    measures: ClassVar = (
        Measure(
            "loss",
            "Perplexity of masked tokens",
            larger_is_better=False,
            exponential="perplexity",
        ),
        Measure("accuracy", "Masked tokens found", is_share=True),
    )
    name = "masked_perplexity"
    title: ClassVar = "Masked perplexity"
    unit: ClassVar = "document"
    shares_itself: ClassVar = True
    reads: ClassVar = "mlm"

    def __init__(
        self,
        *,
        fraction: float = DEFAULT_FRACTION,
        seed: int = 0,
        masking: MaskTokens | None = None,
        documents: int | None = None,
        document_tokens: int | None = None,
    ) -> None:
        self.fraction = fraction
        self.seed = seed
        self.masking = masking
        self.documents = documents
        self.document_tokens = document_tokens

    @classmethod
    def of(cls, config: EvalConfig) -> MaskedPerplexity:
        """Returns the task with the settings of an evaluation."""
        fraction = getattr(config.data, "mask_fraction", None)
        return cls(
            fraction=DEFAULT_FRACTION if fraction is None else fraction,
            documents=config.documents,
            document_tokens=config.document_tokens,
        )

    def prepare(self, subject: Subject, lengths: tuple[int, ...]) -> None:
        """Chooses the masked tokens: see Task.

        Raises:
            ValueError: if a setting is out of range, no token is masked, the tokenizer has no mask
                token, or the model does not support the tokens or lengths.
        """
        super().prepare(subject, lengths)
        masking = self.masking
        if masking is None:
            tokenizer = subject.require_tokenizer(self.name)
            masking = MaskTokens.of(tokenizer, self.fraction, self.seed)
        chosen = subject.documents
        if self.documents is not None or self.document_tokens is not None:
            chosen = longest_documents(chosen, self.documents, self.document_tokens)
        masked = [
            _mask(f"{number} {document.name}", document.input_ids, masking)
            for number, document in enumerate(chosen)
        ]
        self._masked = [one for one in masked if (one.labels != IGNORE_INDEX).any()]
        if not self._masked:
            raise ValueError(
                f"documents must hold a masked token, got none in {len(masked)} of them. Hold out "
                "more text, or raise mask_fraction."
            )
        tokens = [one.tokens for one in self._masked]
        self._longest = max(map(len, tokens))
        check_model(subject.model, tokens, min(lengths[-1], self._longest))
        self._counts = np.array([(one.labels != IGNORE_INDEX).sum() for one in self._masked])

    def make(self, length: int) -> list[list[_Piece]]:
        """Returns the windows of every document: see Task."""
        return [
            [
                (number, slice(start, min(start + length, len(one.tokens))))
                for start in range(0, len(one.tokens), length)
            ]
            for number, one in enumerate(self._masked)
        ]

    def score(self, reader: Reader, length: int, made: Sequence[list[_Piece]]) -> Iterator[Item]:
        """Yields the loss of every document: see Task."""
        model, ranks = reader.model, reader.ranks
        largest = reader.max_tokens if is_patched(model) else 1
        owner = owners([len(one.tokens) for one in self._masked], ranks.data_size)
        groups = [
            list(_groups((made[n] for n in np.flatnonzero(owner == rank)), largest))
            for rank in range(ranks.data_size)
        ]
        sums = np.zeros((2, len(self._masked)))
        mine = groups[ranks.data_rank]
        with evaluation_mode(model):
            for group in mine:
                for number, losses, hits in _score(model, self._masked, group, reader.device):
                    sums[:, number] += losses.sum(), hits.sum()
                    reader.advance(len(losses) * ranks.data_size)  # of all ranks, about
            if ranks.is_sharded:  # all ranks call the layers equally often
                for _ in range(max(map(len, groups)) - len(mine)):
                    list(_score(model, self._masked, max(groups, key=len)[0], reader.device))
        sums = summed(sums, ranks)
        for one, (loss, right), count in zip(self._masked, sums.T, self._counts, strict=True):
            yield Item(one.name, {"loss": loss, "accuracy": right}, float(count))

    def size(self, length: int) -> int:
        """Returns the number of masked tokens: see Task."""
        return int(self._counts.sum())

    def work(self, length: int) -> float:
        """Returns the tokens of all documents: see Task."""
        return float(sum(len(one.tokens) for one in self._masked))

    def facts(self, length: int) -> dict[str, float]:
        """Returns the number of windows, and the mean context of a masked token: see Task."""
        others = windows = 0
        for number, window in (piece for pieces in self.make(length) for piece in pieces):
            count = int((self._masked[number].labels[window] != IGNORE_INDEX).sum())
            others += count * (window.stop - window.start - 1)
            windows += 1
        return {"mean_context": others / int(self._counts.sum()), "windows": windows}

    def same_as(self, length: int) -> int:
        """Returns the longest document for longer lengths, which give the same windows."""
        return min(length, self._longest)

    def by_length(self, results: Mapping[int, Result], name: str) -> PerplexityTable:
        """Returns the table of `masked_perplexity_by_length`.

        Args:
            results: Results by rising length.
            name: Name of the model.
        """
        first = _losses(next(iter(results.values())))
        rows = [_row(length, result, first) for length, result in results.items()]
        return PerplexityTable(tuple(rows), name=name, overlap=0.0, min_context=0)


def _losses(result: Result) -> np.ndarray:
    return np.array([item.totals["loss"] for item in result.items])


def _row(length: int, result: Result, shortest: np.ndarray) -> PerplexityRow:
    sums = _losses(result)
    counts = np.array([int(item.weight) for item in result.items])
    loss, stderr = token_mean(sums, counts)
    gain, gain_stderr = token_mean(shortest - sums, counts)
    with np.errstate(over="ignore"):
        perplexity, low, high = np.exp([loss, loss - stderr, loss + stderr]).tolist()
    return PerplexityRow(
        length=length,
        perplexity=perplexity,
        perplexity_low=low,
        perplexity_high=high,
        loss=loss,
        stderr=stderr,
        gain=gain,
        gain_stderr=gain_stderr,
        mean_context=float(result.facts["mean_context"]),
        documents=len(counts),
        tokens=int(counts.sum()),
        windows=int(result.facts["windows"]),
    )


def _mask(name: str, input_ids: np.ndarray, masking: MaskTokens) -> _Masked:
    batch = masking(PackedBatch.from_documents([np.asarray(input_ids, dtype=np.int64)]))
    return _Masked(name, batch.input_ids[0].numpy(), batch.labels[0].numpy())


def _groups(windows: Iterable[list[_Piece]], max_tokens: int) -> Iterator[list[_Piece]]:
    """Yields windows of documents in groups: one, or at most `max_tokens` tokens."""
    group: list[_Piece] = []
    held = 0
    for number, window in (piece for pieces in windows for piece in pieces):
        size = window.stop - window.start
        if group and held + size > max_tokens:
            yield group
            group, held = [], 0
        group.append((number, window))
        held += size
    if group:
        yield group


def _score(
    model: nn.Module, masked: Sequence[_Masked], group: Sequence[_Piece], device: torch.device
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yields (document, losses, hits) of the masked tokens of each window of a group."""
    tokens = [masked[number].tokens[window] for number, window in group]
    labels = torch.from_numpy(np.concatenate([masked[n].labels[w] for n, w in group]))
    positions = (labels != IGNORE_INDEX).nonzero().flatten()
    inputs: dict[str, Any]
    if is_patched(model):
        inputs = PackedBatch.from_documents(tokens).to(device).model_kwargs()
    else:
        inputs = {"input_ids": torch.from_numpy(tokens[0])[None].to(device)}
    targets = labels[positions].to(device)
    found = masked_scores(model, inputs, positions.to(device), targets)
    counts = [int((masked[n].labels[w] != IGNORE_INDEX).sum()) for n, w in group]
    losses, hits = (one.double().cpu().split(counts) for one in found)
    for (number, _), loss, hit in zip(group, losses, hits, strict=True):
        yield number, loss.numpy(), hit.numpy()
