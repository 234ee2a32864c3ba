"""IsolationCheck: tests on the first training batch that documents of a pack stay independent."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lctrain.batch import PackedBatch
from lctrain.callbacks.batches import BatchView, ReadBatch, view_batch
from lctrain.callbacks.lengths import observed_document, with_other_lengths
from lctrain.callbacks.passes import Passes
from lctrain.callbacks.routed import RoutedRounding
from lctrain.callbacks.targets import find_target
from lctrain.data.share import share_pack, whole_pack
from lctrain.distributed import ONE_RANK, Topology
from lctrain.distributed.sharding import through_root
from lctrain.distributed.share import PackShare
from lctrain.limits import MIN_TOKENS
from lctrain.loss import evaluation_mode
from lctrain.pluralize import pluralize

LARGEST_LOGITS = 2**28  # elements; with more, the last hidden states are compared instead
LARGEST_RECORD = 2**30  # recorded elements of mixture-of-experts outputs; more shorten the batch


class IsolationError(RuntimeError):
    """Raised if a document of a pack changes the outputs of another document."""


class IsolationCheck(pl.Callback):
    """Checks on the first training batch that no document changes the outputs of another document.

    The check has two parts, which both compare outputs bit by bit:

    1. It changes the tokens of one document. The outputs of all other documents must not change.
    2. It changes the boundaries between the documents around the shortest document. The outputs of
       the shortest document must not change.

    The check runs before the first training step, without gradients and dropout. It does not change
    random generators, training modes or the order of batches. A batch of one document is split into
    two halves. The compared outputs are the logits, or the last hidden states if there would be
    more than 2^28 logits. In mixture-of-experts blocks, other documents can change the last bits of
    an output without a leak; RoutedRounding removes these differences.

    A batch is a PackedBatch, or a mapping with transformers' names that says where documents end.
    Batches with one document per row, padded or not, are not checked.

    Each rank checks its own batch, or the batch that it shares. If the check of a rank fails, all
    ranks raise its error.

    Args:
        model: Attribute path of the model in the module; None takes the only model, or the only
            model with trainable weights.
        read_batch: Function from a batch to a PackedBatch or a mapping with transformers' names;
            None if batches are one of them.

    Raises:
        IsolationError: if outputs change that must not change.
        ValueError: if the model is not found, or the batch does not say where documents end.
    """

    def __init__(self, model: str | None = None, read_batch: ReadBatch | None = None) -> None:
        self.model = model
        self.read_batch = read_batch
        self._checked = False

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Makes the check run at the first batch of this fit."""
        self._checked = False

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Checks the first batch of the fit.

        Raises:
            IsolationError: if a document changes the outputs of another one.
            ValueError: if the batch does not say where documents end.
        """
        if self._checked:
            return
        self._checked = True
        model = find_target(pl_module, self.model, self)
        view = view_batch(batch, self.read_batch)
        share = view.content.share if isinstance(view.content, PackedBatch) else None
        pack = as_pack(view)
        ranks = Topology.of(trainer)
        shown = ranks.is_first and trainer.progress_bar_callback is not None
        check = partial(check_isolation, model, pack, progress=shown, share=share, ranks=ranks)
        with trainer.precision_plugin.forward_context():
            through_root(trainer, check)


def as_pack(view: BatchView) -> PackedBatch | None:
    """Returns the documents of a batch as a pack on the batch's device.

    Documents that share a prefix all depend on it, so they are returned without their groups, as
    independent documents. A share of a pack is returned as the whole pack; all ranks that share it
    must call this function.

    Args:
        view: The batch.

    Returns:
        The pack, or None if each row holds one document.

    Raises:
        ValueError: if the batch is one row without boundaries of documents.
    """
    if isinstance(view.content, PackedBatch):
        batch = view.content
        if batch.share is not None:
            return whole_pack(batch)
        if batch.groups is None:
            return batch
        apart = batch.input_ids[0].cpu().split(batch.lengths)
        return PackedBatch.from_documents(apart).to(batch.input_ids.device)
    rows = view.input_ids.shape[0]
    if not view.says_where_documents_end and rows == 1:
        raise ValueError(
            "batch must say where documents end for IsolationCheck, got "
            f"{', '.join(map(repr, view.content))}. Use lctrain.data.PackCollator, or add "
            "cu_seq_lens_q/k or position_ids that restart at 0; without packing, remove the "
            "callback."
        )
    lengths = view.lengths
    if len(lengths) == rows and (rows > 1 or view.content.get("cu_seq_lens_q") is None):
        return None
    mask = view.content.get("attention_mask")
    tokens = view.input_ids if mask is None else view.input_ids[mask.bool()]
    documents = tokens.flatten().cpu().split([length for length in lengths if length])
    return PackedBatch.from_documents(documents).to(view.input_ids.device)


def check_isolation(
    model: nn.Module,
    batch: PackedBatch | None,
    progress: bool = False,
    share: PackShare | None = None,
    ranks: Topology = ONE_RANK,
) -> None:
    """Checks that no document of a pack changes the outputs of another one, as IsolationCheck does.

    Args:
        model: A causal LM that takes the arguments `batch.model_kwargs()`.
        batch: A pack on the model's device; None on a rank without one.
        progress: Whether to show a bar over the forward passes if they take more than a second.
        share: Share of any pack. The ranks that share that pack also share `batch`, and all of them
            must call this function. None computes the pack on this rank alone. The check with
            changed boundaries runs on one rank, with as many tokens as the largest share has: other
            boundaries would divide the pack in another way, which may change the last bits.
        ranks: Ranks that call this function, each with a pack of its own. Their parameters may be
            sharded.

    Raises:
        IsolationError: on all ranks, if outputs of a rank change that must not change.
    """
    large = batch is not None and sum(batch.lengths) * _vocabulary(model, batch) > LARGEST_LOGITS
    passes = Passes(ranks, progress, large)
    error = None
    try:
        if batch is not None:
            _check_pack(model, batch, passes, share)
    except IsolationError as found:
        error = found
    message = passes.end(error, partial(_idle, model, passes.hidden))
    if message is not None:
        raise error or IsolationError(message)


def _check_pack(
    model: nn.Module, batch: PackedBatch, passes: Passes, share: PackShare | None
) -> None:
    """Checks one pack: see `check_isolation`."""
    rounding = RoutedRounding(model)
    if rounding.blocks:
        batch = _shortened(batch, LARGEST_RECORD // (_width(model) * len(rounding.blocks)))
    if len(_with_tokens(batch)) < 2:
        if batch.num_tokens < 2:
            return
        batch = _halves(batch)
    devices = [batch.input_ids.device] if batch.input_ids.is_cuda else []
    modes = {module: module.training for module in model.modules()}
    with torch.no_grad(), torch.random.fork_rng(devices=devices):
        try:
            model.eval()
            divided = _divided(batch, share)
            with rounding.recording(divided.input_ids.shape[1]):
                before = _outputs(model, divided, passes)
            _check_contents(model, batch, before, rounding, passes, share)
            if divided.share is not None:
                batch = _shortened(batch, max(MIN_TOKENS, *divided.share.plan.tokens))
                with rounding.recording(batch.num_tokens):
                    before = _outputs(model, batch, passes)
            _check_lengths(model, batch, before, rounding, passes)
        finally:
            for module, training in modes.items():
                module.training = training


def _idle(model: nn.Module, hidden: bool) -> None:
    """Runs the model on two tokens, through the layers that the passes of other ranks run through.

    Args:
        model: The model.
        hidden: Whether the other passes return the last hidden states.
    """
    device = next(model.parameters()).device
    batch = PackedBatch.from_documents([[0] * MIN_TOKENS]).to(device)
    with evaluation_mode(model):
        _forward(model, batch, hidden)


def _divided(batch: PackedBatch, share: PackShare | None) -> PackedBatch:
    """Returns this rank's share of a pack, for the ranks of `share`; for None the pack itself."""
    if share is None:
        return batch
    found = share_pack(batch, share.size, share.rank, share.plan.heads)
    assert found.share is not None
    divided = found.share.shared_by(share.shared.groups, batch.document_ids)
    return replace(found, share=divided)


def _check_contents(
    model: nn.Module,
    batch: PackedBatch,
    before: Tensor,
    rounding: RoutedRounding,
    passes: Passes,
    share: PackShare | None,
) -> None:
    """Checks that changing the tokens of one document does not change the outputs of the others.

    Args:
        model: The model.
        batch: The pack.
        before: [T, C], outputs of the model for the unchanged pack.
        rounding: Replaces outputs of mixture-of-experts blocks that differ from `before` by
            rounding only.
        passes: Forward passes of the check.
        share: Share whose ranks share the pack; None for this rank alone.

    Raises:
        IsolationError: if an output of another document changes.
    """
    documents = _with_tokens(batch)
    chosen = documents[(len(documents) - 1) // 2]  # not the last: causal leaks go to later tokens
    start = sum(batch.lengths[:chosen])
    end = start + batch.lengths[chosen]
    others = _all_but(batch, start, end)
    changed = _divided(_perturb(batch, start, end, _vocabulary(model, batch)), share)
    watched = others if changed.share is None else others[changed.share.places]
    with rounding.replaying(watched):
        after = _outputs(model, changed, passes)
    differs = _differs(before, after)
    if not bool(differs[start:end].any()):
        raise IsolationError(
            "changing a document's tokens did not change its own outputs: the check would prove "
            "nothing. The model ignores input_ids, or its weights are all zero or not finite."
        )
    differs &= others
    if not bool(differs.any()):
        return
    positions = differs.nonzero().flatten()
    first = int(positions[0])
    raise IsolationError(
        f"documents of a pack mix: changing document {_name(batch, chosen)} (tokens {start} to "
        f"{end - 1}) changed the outputs of {pluralize(len(positions), 'token')} of other "
        "documents by up to "
        f"{_largest(before, after, differs):.3g}, the first in "
        f"{_name(batch, _document_of(batch, first))} at token {first}. "
        "The model's attention ignores the document boundaries: patch it with "
        "lctrain.patch_model(model) (attention=flash), and keep use_cache off."
    )


def _check_lengths(
    model: nn.Module, batch: PackedBatch, before: Tensor, rounding: RoutedRounding, passes: Passes
) -> None:
    """Checks that other boundaries do not change the outputs of the shortest document.

    Args:
        model: The model.
        batch: The pack.
        before: [T, C], outputs of the model for the unchanged pack.
        rounding: Replaces outputs of mixture-of-experts blocks that differ from `before` by
            rounding only.
        passes: Forward passes of the check.

    Raises:
        IsolationError: if an output of the shortest document changes.
    """
    index, start, end = observed_document(batch)
    observed = ~_all_but(batch, start, end)
    for changed in with_other_lengths(batch, start, end, model):
        with rounding.replaying(observed):
            after = _outputs(model, changed, passes)
        differs = _differs(before, after) & observed
        if not bool(differs.any()):
            continue
        raise IsolationError(
            f"a neighbour's length changes a document: document {_name(batch, index)} of "
            f"{pluralize(end - start, 'token')} has other outputs, by up to "
            f"{_largest(before, after, differs):.3g}, when the longest document of its pack has "
            f"{pluralize(changed.max_seqlen, 'token')} and not {batch.max_seqlen}. Rotary "
            "frequencies that "
            "follow the longest document of a row (rope_type 'longrope' or 'dynamic') do this: "
            "patch the model with lctrain.patch_model(model), which finds them per document."
        )


def _differs(before: Tensor, after: Tensor) -> Tensor:
    """Returns at which tokens the outputs differ, [T] bool. A NaN counts as equal to a NaN."""
    same = (before == after) | (before.isnan() & after.isnan())
    return ~same.flatten(1).all(dim=1)


def _largest(before: Tensor, after: Tensor, rows: Tensor) -> float:
    return float((before[rows].float() - after[rows].float()).abs().max())


def _all_but(batch: PackedBatch, start: int, end: int) -> Tensor:
    """Returns a mask of the pack's tokens, [T] bool: False at tokens [start, end), else True."""
    others = torch.ones(batch.num_tokens, dtype=torch.bool, device=batch.input_ids.device)
    others[start:end] = False
    return others


def _width(model: nn.Module) -> int:
    """Returns the hidden size of the model's config, or else the largest last weight dimension."""
    size = getattr(getattr(model, "config", None), "hidden_size", None)
    return int(size) if size else max((p.shape[-1] for p in model.parameters()), default=1)


def _shortened(batch: PackedBatch, tokens: int) -> PackedBatch:
    """Returns the pack shortened to at most `tokens` tokens.

    Each document is cut to at most half of `tokens`, and to the number of tokens that are left.
    Documents for which no tokens are left are dropped.
    """
    if batch.num_tokens <= tokens:
        return batch
    kept, room = [], tokens
    for index, document in enumerate(batch.input_ids[0].cpu().split(list(batch.lengths))):
        length = min(len(document), max(1, tokens // 2), room)
        if length > 0:
            kept.append((index, document[:length]))
            room -= length
    names = None if batch.names is None else [batch.names[index] for index, _ in kept]
    shortened = PackedBatch.from_documents([document for _, document in kept], names=names)
    return shortened.to(batch.input_ids.device)


def _outputs(model: nn.Module, batch: PackedBatch, passes: Passes) -> Tensor:
    """Returns the logits [T, V], or the last hidden states [T, E] if logits would be too large.

    T counts all tokens of the pack, even if ranks share it.
    """
    passes.begin()
    found = _forward(model, batch, passes.hidden)
    return found if batch.share is None else batch.share.gather(found)


def _forward(model: nn.Module, batch: PackedBatch, hidden: bool) -> Tensor:
    base = getattr(model, "base_model", model)
    if hidden and base is not model:
        found: Tensor = base(**batch.model_kwargs()).last_hidden_state[0]
    else:
        found = model(**batch.model_kwargs()).logits[0]
    return found


def _perturb(batch: PackedBatch, start: int, end: int, vocabulary: int) -> PackedBatch:
    """Returns the pack with every token id at [start, end) raised by 1, modulo the vocabulary."""
    tokens = batch.input_ids.clone()  # [1, T]
    tokens[:, start:end] = (tokens[:, start:end] + 1) % vocabulary
    return replace(batch, input_ids=tokens)


def _vocabulary(model: nn.Module, batch: PackedBatch) -> int:
    """Returns the model's vocabulary size, or one more than the largest token id if unknown."""
    config = getattr(model, "config", None)
    size = getattr(config, "vocab_size", None)
    return int(batch.input_ids.max()) + 1 if size is None else int(size)


def _with_tokens(batch: PackedBatch) -> list[int]:
    """Returns the indices of the documents that are not empty."""
    return [index for index, length in enumerate(batch.lengths) if length > 0]


def _halves(batch: PackedBatch) -> PackedBatch:
    """Returns a pack whose only document with tokens is split into two documents."""
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
    """Returns the index of the document that holds the token at index `token` of the pack."""
    end = 0
    for index, length in enumerate(batch.lengths):
        end += length
        if token < end:
            return index
    raise AssertionError(f"token {token} lies beyond the pack")


def _name(batch: PackedBatch, index: int) -> str:
    return f"{index}" if batch.names is None else f"{index} ({batch.names[index]})"
