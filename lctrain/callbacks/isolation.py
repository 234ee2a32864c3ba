"""IsolationCheck: before the first step, proof on a real batch that documents do not mix."""

from __future__ import annotations

from dataclasses import replace

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lctrain.batch import PackedBatch

LARGEST_LOGITS = 2**28  # elements; above, the last hidden states are compared instead


class IsolationError(RuntimeError):
    """A document of a pack influenced another one."""


class IsolationCheck(pl.Callback):
    """Perturbs one document of the first real batch and compares all others bit by bit.

    It runs before the first training step, on the batch of that step, without gradients or dropout,
    and leaves the random generators, the training mode of every module and the order of the batches
    as they were. A batch of one document is checked as its two halves. Compared are the logits, or,
    where they would have more than 2^28 elements, the last hidden states from which they are
    computed token by token.

    Raises:
        IsolationError: if any other document's outputs change in any bit.
    """

    def __init__(self) -> None:
        self._checked = False

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Arms the check for this fit."""
        self._checked = False

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: PackedBatch, batch_idx: int
    ) -> None:
        """Checks the first batch.

        Raises:
            IsolationError: if documents mix.
        """
        if self._checked:
            return
        self._checked = True
        assert isinstance(pl_module.model, nn.Module)
        with trainer.precision_plugin.forward_context():
            check_isolation(pl_module.model, batch)


def check_isolation(model: nn.Module, batch: PackedBatch) -> None:
    """Runs `model` on `batch` and on a copy with one document changed.

    Args:
        model: A causal LM that takes `batch.model_kwargs()`.
        batch: A pack on the model's device.

    Raises:
        IsolationError: if an output outside the changed document differs in any bit.
    """
    if len(_with_tokens(batch)) < 2:
        if batch.num_tokens < 2:
            return
        batch = _halves(batch)
    documents = _with_tokens(batch)
    chosen = documents[(len(documents) - 1) // 2]  # never the last: a causal leak runs forwards
    start = sum(batch.lengths[:chosen])
    end = start + batch.lengths[chosen]
    devices = [batch.input_ids.device] if batch.input_ids.is_cuda else []
    modes = {module: module.training for module in model.modules()}
    with torch.no_grad(), torch.random.fork_rng(devices=devices):
        try:
            model.eval()
            before = _outputs(model, batch)
            after = _outputs(model, _perturb(batch, start, end, _vocabulary(model, batch)))
        finally:
            for module, training in modes.items():
                module.training = training
    differs = (before != after).flatten(1).any(dim=1)  # [T] bool
    if not bool(differs[start:end].any()):
        raise IsolationError(
            "changing a document's tokens did not change its own outputs: the check would prove "
            "nothing. The model ignores input_ids, or its weights are all zero or not finite."
        )
    differs[start:end] = False
    if not bool(differs.any()):
        return
    positions = differs.nonzero().flatten()
    first = int(positions[0])
    largest = (before.float() - after.float())[positions].abs().max()
    raise IsolationError(
        f"documents of a pack mix: changing document {_name(batch, chosen)} (tokens {start} to "
        f"{end - 1}) changed the outputs of {len(positions)} tokens of other documents by up to "
        f"{float(largest):.3g}, the first in {_name(batch, _document_of(batch, first))} at token "
        f"{first}. "
        "The model's attention ignores the document boundaries: patch it with "
        "lctrain.patch_model(model) (attention=flash), and keep use_cache off."
    )


def _outputs(model: nn.Module, batch: PackedBatch) -> Tensor:
    """[T, vocabulary] logits, or [T, hidden] last hidden states where logits would be too large."""
    base = getattr(model, "base_model", model)
    if batch.num_tokens * _vocabulary(model, batch) > LARGEST_LOGITS and base is not model:
        return base(**batch.model_kwargs()).last_hidden_state[0]
    return model(**batch.model_kwargs()).logits[0]


def _perturb(batch: PackedBatch, start: int, end: int, vocabulary: int) -> PackedBatch:
    """The batch with every token of [start, end) replaced by its successor in the vocabulary."""
    tokens = batch.input_ids.clone()  # [1, T]
    tokens[:, start:end] = (tokens[:, start:end] + 1) % vocabulary
    return replace(batch, input_ids=tokens)


def _vocabulary(model: nn.Module, batch: PackedBatch) -> int:
    """Number of token ids that the model knows."""
    config = getattr(model, "config", None)
    size = getattr(config, "vocab_size", None)
    return int(batch.input_ids.max()) + 1 if size is None else int(size)


def _with_tokens(batch: PackedBatch) -> list[int]:
    """Indices of the documents that are not empty."""
    return [index for index, length in enumerate(batch.lengths) if length > 0]


def _halves(batch: PackedBatch) -> PackedBatch:
    """The one document that has tokens as two."""
    tokens = batch.input_ids[0].cpu()
    middle = len(tokens) // 2
    only = _with_tokens(batch)[0]
    halves = [tokens[:middle], tokens[middle:]]
    names = (
        None
        if batch.names is None
        else [f"{batch.names[only]} ({half})" for half in ("1st half", "2nd half")]
    )
    return PackedBatch.from_documents(halves, names=names).to(batch.input_ids.device)


def _document_of(batch: PackedBatch, token: int) -> int:
    """Index of the document that holds a token."""
    end = 0
    for index, length in enumerate(batch.lengths):
        end += length
        if token < end:
            return index
    raise AssertionError(f"token {token} lies beyond the pack")


def _name(batch: PackedBatch, index: int) -> str:
    return f"{index}" if batch.names is None else f"{index} ({batch.names[index]})"
