"""LengthPerplexity: measures perplexity at several context lengths during training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl

from lctrain.callbacks.held_out import held_out_documents, tokenizer_of
from lctrain.callbacks.targets import find_target
from lctrain.data.documents import TokenizedDocument
from lctrain.distributed import Topology
from lctrain.distributed.sharding import through_root
from lctrain.eval import check_lengths, longest_documents, perplexity_by_length
from lctrain.eval.begin import NO_BEGIN, BeginTokens, begin_tokens
from lctrain.instances import require_int


class LengthPerplexity(pl.Callback):
    """Measures held-out perplexity at several context lengths every n optimizer steps.

    All ranks measure together: each data rank scores some of the documents.
    The measurement does not change training: the training mode of every module is restored, even
    after an error.

    Args:
        lengths: Context lengths in tokens.
        every_n_steps: Optimizer steps between two measurements.
        max_tokens: Largest number of tokens per forward pass; None takes the longest length.
        documents: Number of held-out documents to measure, the longest ones.
        held_out: Held-out documents as sequences of token ids; None takes those of the data
            module's method `held_out_documents()`, which PackedDataModule has.
        model: Attribute path of the model in the module; None takes the only model, or the only
            model with trainable weights.
        begin_token: Whether each window of text starts with the begin token of the data module's
            tokenizer. None uses one if that tokenizer adds a begin token to every text. Without a
            tokenizer, windows have no begin token.

    Raises:
        ValueError: if `every_n_steps` or `documents` is below 1 or a length is out of range; in
            `on_fit_start`, if nothing is held out, the model is not found, or `begin_token` is true
            and there is no begin token.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        every_n_steps: int,
        max_tokens: int | None = None,
        documents: int = 16,
        held_out: Sequence[Sequence[int]] | None = None,
        model: str | None = None,
        begin_token: bool | None = None,
    ) -> None:
        off = "Set callbacks.length_perplexity=null to switch the callback off."
        require_int("every_n_steps", every_n_steps, 1, off)
        require_int("documents", documents, 1, off)
        self.lengths = check_lengths(lengths, max_tokens)
        self.max_tokens = self.lengths[-1] if max_tokens is None else max_tokens
        self.every_n_steps = every_n_steps
        self.documents = documents
        self.held_out = held_out
        self.model = model
        self.begin_token = begin_token
        self._begin = NO_BEGIN
        self._step = 0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Checks before training that there is a model and a document to measure.

        Raises:
            ValueError: if the model is not found, no held-out document has two tokens, or there is
                no begin token although `begin_token` is true.
        """
        find_target(pl_module, self.model, self)
        self._begin = self._find_begin(trainer)
        documents = self._held_out(trainer)
        if all(len(document.input_ids) < 2 for document in documents):
            raise ValueError(
                "data must hold out a document of at least two tokens for LengthPerplexity, got "
                f"{len(documents)} held-out documents. Raise data.held_out_fraction, or set "
                "callbacks.length_perplexity=null."
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stores the optimizer step at which the run starts or resumes."""
        self._step = trainer.global_step

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Measures and logs `val/perplexity_<length>` after every n-th optimizer step.

        A batch with several optimizer steps is measured once, if an n-th step is among them.
        """
        before, self._step = self._step, trainer.global_step
        if self._step // self.every_n_steps == before // self.every_n_steps:
            return
        metrics = through_root(trainer, self._measure, trainer, pl_module)
        for logger in trainer.loggers if Topology.of(trainer).is_first else ():
            logger.log_metrics(metrics, step=trainer.global_step - 1)
        trainer.strategy.barrier("LengthPerplexity")

    def _measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, float]:
        documents = longest_documents(self._held_out(trainer), self.documents)
        model = find_target(pl_module, self.model, self)
        with trainer.precision_plugin.forward_context():
            table = perplexity_by_length(
                model,
                documents,
                self.lengths,
                max_tokens=self.max_tokens,
                begin=self._begin,
                ranks=Topology.of(trainer),
            )
        return {f"val/perplexity_{row.length}": row.perplexity for row in table.rows}

    def _find_begin(self, trainer: pl.Trainer) -> BeginTokens:
        tokenizer = tokenizer_of(trainer)
        if self.held_out is not None and not hasattr(tokenizer, "added_tokens_encoder"):
            tokenizer = None  # held_out then has ids of a tokenizer that is not transformers'
        if tokenizer is None and self.begin_token:
            raise ValueError(
                "begin_token must be null or false without a tokenizer, got true. Pass tokenizer= "
                "to the data module, or put the token into held_out."
            )
        return NO_BEGIN if tokenizer is None else begin_tokens(tokenizer, self.begin_token)

    def _held_out(self, trainer: pl.Trainer) -> list[TokenizedDocument]:
        return held_out_documents(trainer, self.held_out, type(self).__name__)
