"""causal_lm_loss: next-token cross-entropy of packed documents, as a sum and a token count."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from lctrain.batch import IGNORE_INDEX, PackedBatch
from lctrain.distributed.gather import run_in_forward
from lctrain.instances import require_instance
from lctrain.kernels import linear_cross_entropy
from lctrain.loss.output_head import find_output_head
from lctrain.loss.shared_prefixes import require_batch, require_flash_attention

PROBE_LENGTHS = (5, 3)


def causal_lm_loss(model: nn.Module, batch: PackedBatch) -> tuple[Tensor, Tensor]:
    """Returns the summed next-token cross-entropy of a packed batch, and the number of its targets.

    The decoder computes hidden states [T, E]. `linear_cross_entropy` computes the loss from these,
    without the [T, V] logits. This is possible if the model's logits are a linear layer of the
    hidden states, optionally scaled and soft-capped. The first call for a model verifies this on a
    few tokens (see `find_output_head`). Otherwise the model computes its logits, and there is a
    warning. The caller divides the sum by the number of tokens of all micro-batches and ranks.

    Args:
        model: A transformers causal LM, patched by `lctrain.patch_model` if the batch holds more
            than one document. Inside DDP, call this function in the wrapped module's forward. If
            `fully_shard` divides the model, all ranks call this function together.
        batch: T packed tokens on the model's device, with shifted labels.

    Returns:
        The summed loss, 0-dim float32 (float64 for a float64 model), and the number of labels that
        are not -100, 0-dim int64 on the batch's device. Only the first call for a model
        synchronises with the device.

    Raises:
        ValueError: if `model` is a DistributedDataParallel wrapper; if documents share a prefix and
            the attention of the model is not flash; if the weights of a sharded model cannot be
            gathered for the call.
    """
    require_batch(model, batch)
    token_loss = _loss(
        model, batch.model_kwargs(), None, batch.labels.flatten(), "sum", packed=True
    )
    return token_loss, (batch.labels != IGNORE_INDEX).sum()


def token_losses(
    model: nn.Module, model_kwargs: Mapping[str, Any], positions: Tensor, targets: Tensor
) -> Tensor:
    """Returns the next-token cross-entropy at chosen positions of a forward pass.

    If the model's output head is verified (see `find_output_head`), only the logits of these
    positions are computed.

    Args:
        model: A transformers causal LM, as in `causal_lm_loss`.
        model_kwargs: Keyword arguments of a forward pass over `input_ids` [B, S].
        positions: [n] int64, indices into the flattened [B * S] tokens.
        targets: [n] int64, the token to predict at each position.

    Returns:
        [n] float32 (float64 for a float64 model).
    """
    require_instance("model_kwargs", model_kwargs, Mapping, "Pass those of a forward pass.")
    packed = "cu_seq_lens_q" in model_kwargs
    return _loss(model, model_kwargs, positions, targets, "none", packed=packed)


def _loss(
    model: nn.Module,
    model_kwargs: Mapping[str, Any],
    positions: Tensor | None,
    targets: Tensor,
    reduction: str,
    *,
    packed: bool,
) -> Tensor:
    if isinstance(model, DistributedDataParallel):
        raise ValueError(
            "model must be the module itself, got a DistributedDataParallel wrapper, whose "
            "gradient reduction would be bypassed. Wrap a module whose forward computes the loss, "
            "as a LightningModule is, or pass model.module for evaluation."
        )
    require_flash_attention(model, model_kwargs)

    def compute() -> Tensor:
        return _compute(model, model_kwargs, positions, targets, reduction, packed)

    return run_in_forward(model, compute)


def _compute(
    model: nn.Module,
    model_kwargs: Mapping[str, Any],
    positions: Tensor | None,
    targets: Tensor,
    reduction: str,
    packed: bool,
) -> Tensor:
    """Returns the loss of `_loss`, with the weights of a sharded model gathered."""
    head = find_output_head(model, partial(probe, targets.device, packed))
    if head is None:
        logits = model(**model_kwargs)["logits"].flatten(0, 1)
        logits = logits if positions is None else logits[positions]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return functional.cross_entropy(
            logits, targets, ignore_index=IGNORE_INDEX, reduction=reduction
        )
    hidden = head.decoder(**model_kwargs)[0].flatten(0, 1)
    loss, _ = linear_cross_entropy(
        hidden if positions is None else hidden[positions],
        head.projection.weight,
        targets,
        bias=head.projection.bias,
        softcap=head.softcap,
        logit_scale=head.logit_scale,
        batch_invariant=head.batch_invariant,
        reduction=reduction,
    )
    return loss


def probe(device: torch.device, packed: bool) -> dict[str, Any]:
    """Returns the arguments of a small forward pass, by which `find_output_head` verifies a model.

    Args:
        device: Device of the tensors.
        packed: True returns a pack of two documents, False one plain row.
    """
    documents = [torch.arange(length) % 2 for length in PROBE_LENGTHS]
    if packed:
        return PackedBatch.from_documents(documents).to(device).model_kwargs()
    return {"input_ids": documents[0][None].to(device), "use_cache": False}
