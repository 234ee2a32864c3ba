"""The task longppl: the perplexity of key tokens, which need their long context."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from lctrain.config import PretrainedModelConfig
from lctrain.data.tokenizer import load_tokenizer, same_ids
from lctrain.eval.limits import check_model
from lctrain.eval.longest import longest_documents
from lctrain.eval.reader import Reader
from lctrain.eval.records import Item, Measure, Subject
from lctrain.eval.runner import score_windows
from lctrain.eval.shared_work import joined, share_of
from lctrain.eval.task import Task
from lctrain.eval.windows import Windows, cut_windows
from lctrain.limits import check_longppl, require
from lctrain.models.pretrained import load_pretrained

if TYPE_CHECKING:
    from lctrain.config import EvalConfig


class LongPerplexity(Task):
    """Perplexity of key tokens, in the way of LongPPL (arXiv 2410.23771).

    A key token is one that an evaluator model predicts well with the long context and badly with a
    short one: its loss drops by more than `gain` nats, and is below `loss`.

    Args:
        evaluator: Model that chooses the key tokens, with the same tokenizer: a folder or hub name;
            None for the evaluated model itself. With methods it must be given, since the key tokens
            must not depend on a method.
        short_context: Largest number of tokens in a short context.
        step: Tokens that a window of the short context scores.
        gain: Smallest drop of the loss of a key token, in nats.
        loss: Largest loss of a key token with the long context, in nats.
        documents: Number of documents, the longest first; None for all.
        lengths: Lengths of the long context in tokens; None for those of the evaluation.
        methods: Methods to compare; None for those of the evaluation.
        dtype: Dtype of the evaluator's weights: auto (as they are stored), float32, ...
    """

    name = "longppl"
    measures: ClassVar = (
        Measure("loss", "LongPPL", larger_is_better=False, exponential="longppl"),
    )
    title: ClassVar = "Perplexity of key tokens"
    unit: ClassVar = "document"
    shares_itself: ClassVar = True

    def __init__(
        self,
        *,
        evaluator: str | PretrainedModelConfig | None = None,
        short_context: int = 4096,
        step: int = 1024,
        gain: float = 2.0,
        loss: float = 2.0,
        documents: int | None = None,
        lengths: Sequence[int] | None = None,
        methods: Sequence[str] | None = None,
        dtype: str = "auto",
    ) -> None:
        check_longppl(short_context, step, lengths)
        require(
            evaluator is not None or not methods,
            f"longppl.evaluator must be given with methods, got none and {list(methods or ())}. "
            "Name the model itself to choose key tokens without a method.",
        )
        if isinstance(evaluator, str):
            evaluator = PretrainedModelConfig(name_or_path=evaluator)
        self.evaluator = evaluator
        self.dtype = dtype
        self.short_context = short_context
        self.step = step
        self.gain = gain
        self.loss = loss
        self.documents = documents
        self.lengths = lengths
        self.methods = methods
        self._keys: dict[int, list[np.ndarray]] = {}  # of this rank's documents, by length
        self._counts: dict[int, int] = {}  # key tokens of all documents, by length

    @classmethod
    def of(cls, config: EvalConfig) -> LongPerplexity:
        """Returns the task with the settings of an evaluation."""
        o = config.longppl
        evaluator: str | PretrainedModelConfig | None = o.evaluator
        if evaluator is None and (o.methods or config.methods):
            evaluator = config.model  # once more, without a method
        return cls(
            evaluator=evaluator,
            dtype="auto" if evaluator is o.evaluator else config.dtype,
            short_context=o.short_context,
            step=o.step,
            gain=o.gain,
            loss=o.loss,
            documents=config.documents,
            lengths=o.lengths,
            methods=o.methods,
        )

    def prepare(self, subject: Subject, lengths: tuple[int, ...]) -> None:
        """Loads the evaluator and checks the documents: see Task.

        Raises:
            ValueError: if a length does not exceed the short context, no document is long enough,
                or the evaluator cannot be used.
        """
        super().prepare(subject, lengths)
        check_longppl(self.short_context, self.step, lengths)
        chosen = longest_documents(subject.documents, self.documents)
        self._names = [f"{number} {document.name}" for number, document in enumerate(chosen)]
        self._tokens = [np.asarray(d.input_ids, dtype=np.int64) for d in chosen]
        longest = max(map(len, self._tokens), default=0)
        if longest < lengths[-1]:
            raise ValueError(
                f"documents must hold one of at least {lengths[-1]} tokens for longppl, got "
                f"{len(chosen)} of at most {longest}. Use longer documents, or leave that length "
                "out."
            )
        check_model(subject.model, self._tokens, lengths[-1])
        self._model = subject.model
        if self.evaluator is not None:
            one = self.evaluator
            tokenizer = load_tokenizer(
                one.name_or_path, revision=one.revision, trust_remote_code=one.trust_remote_code
            )
            if not same_ids(tokenizer, subject.tokenizer):
                raise ValueError(
                    "longppl.evaluator must have the tokenizer of the model, got "
                    f"{one.name_or_path}, which has another one. Choose a model of the same family."
                )
            device = next(subject.model.parameters()).device
            self._model = load_pretrained(one, self.dtype).to(device)

    def make(self, length: int) -> list[int]:
        """Returns the numbers of the documents that are long enough: see Task."""
        return [n for n, ids in enumerate(self._tokens) if len(ids) >= length]

    def score(self, reader: Reader, length: int, made: Sequence[int]) -> Iterator[Item]:
        """Yields the loss of the key tokens of every document that has some: see Task.

        Ranks share the documents. All of them raise the error if it is one.

        Raises:
            ValueError: if no document has a key token.
        """
        ranks = reader.ranks
        texts = [self._tokens[number][:length] for number in share_of(made, ranks)]
        if (
            self.evaluator is None or length not in self._keys
        ):  # the model itself may be in training
            self._keys[length] = self._key_positions(reader, texts, length)
        keys = self._keys[length]
        counts = joined([len(one) for one in keys], len(made), ranks)
        self._counts[length] = sum(counts)
        if not any(counts):
            raise ValueError(
                f"documents must hold key tokens at length {length}, got none: no loss drops by "
                f"more than {self.gain} nats to below {self.loss}. Lower longppl.gain, or choose "
                "another longppl.evaluator. An evaluation with finished cells of longppl keeps "
                "their settings: start a new one then."
            )
        losses = self._long(reader, reader.model, reader.segment, texts)
        sums = [
            float(mine[positions - self.short_context].sum())
            for mine, positions in zip(losses, keys, strict=True)
        ]
        sums = joined(sums, len(made), ranks)
        for number, count, loss in zip(made, counts, sums, strict=True):
            if count:
                yield Item(self._names[number], {"loss": loss}, count)
        reader.advance(len(made))

    def size(self, length: int) -> int:
        """Returns the number of documents: see Task."""
        return len(self.make(length))

    def facts(self, length: int) -> dict[str, float]:
        """Returns the numbers of key tokens and of documents left out: see Task."""
        return {
            "key_tokens": self._counts.get(length, 0),
            "short_documents": len(self._tokens) - len(self.make(length)),
        }

    def _key_positions(
        self, reader: Reader, texts: Sequence[np.ndarray], length: int
    ) -> list[np.ndarray]:
        """Returns the positions of the key tokens in each text."""
        sizes = [len(ids) for ids in texts]
        first = self.short_context + 1
        windows = cut_windows(sizes, self.short_context, stride=self.step, min_context=first)
        short = self._losses(reader, self._model, None, texts, windows)
        long = self._long(reader, self._model, None, texts)
        return [
            np.flatnonzero((a - b > self.gain) & (b < self.loss)) + self.short_context
            for a, b in zip(short, long, strict=True)
        ]

    def _long(
        self, reader: Reader, model: Any, segment: int | None, texts: Sequence[np.ndarray]
    ) -> list[np.ndarray]:
        """Returns the losses of each text after its short context, with the whole context."""
        sizes = [len(ids) for ids in texts]
        windows = cut_windows(sizes, max(sizes), min_context=self.short_context + 1)
        return self._losses(reader, model, segment, texts, windows)

    def _losses(
        self,
        reader: Reader,
        model: Any,
        segment: int | None,
        texts: Sequence[np.ndarray],
        windows: Windows,
    ) -> list[np.ndarray]:
        found = [np.zeros(len(ids) - 1 - self.short_context) for ids in texts]
        with torch.no_grad():
            for scored in score_windows(
                model,
                texts,
                windows,
                max_tokens=max(reader.max_tokens, int(windows.lengths.max())),
                device=reader.device,
                segment=segment,
            ):
                for number in set(scored.documents.tolist()):
                    mine = scored.documents == number
                    found[number][scored.positions[mine] - self.short_context] = scored.losses[mine]
        return found
