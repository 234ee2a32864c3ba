"""masked_lm_loss: loss of a masked language model, whose head runs at masked positions only."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from lctrain.batch import IGNORE_INDEX, PackedBatch
from lctrain.kernels import linear_cross_entropy
from lctrain.loss.causal_lm import probe
from lctrain.loss.evaluation_mode import evaluation_mode
from lctrain.loss.output_head import (
    UnverifiedHeadError,
    check_projection,
    is_seen,
    without_wrappers,
)
from lctrain.loss.shared_prefixes import require_batch, require_flash_attention
from lctrain.warn import warn_caller

_ATTRIBUTE = "_lctrain_masked_head"


def masked_lm_loss(model: nn.Module, batch: PackedBatch) -> tuple[Tensor, Tensor]:
    """Returns the summed cross-entropy at the masked positions of a pack, and their number.

    The encoder computes the hidden states of all tokens. The head runs only on those at masked
    positions, and `linear_cross_entropy` computes the loss without holding their logits. The first
    call for a model verifies that this gives the logits of the model's own forward. Otherwise the
    model computes the logits of all tokens, and there is a warning.

    Args:
        model: A transformers model for masked language modeling, patched by `lctrain.patch_model`
            if the batch holds more than one document.
        batch: T packed tokens on the model's device, as `lctrain.data.MaskTokens` returns them:
            labels are not shifted, and are -100 at positions that are not masked.

    Returns:
        The summed loss, 0-dim float32 (float64 for a float64 model), and the number of masked
        positions, 0-dim int64. Only the first call for a model synchronises with the device.

    Raises:
        ValueError: if `model` is a DistributedDataParallel wrapper, or is no masked language model;
            or if documents share a prefix and the attention of the model is not flash.
    """
    require_batch(model, batch)
    labels = batch.labels.flatten()
    masked = (labels != IGNORE_INDEX).nonzero_static(size=batch.num_valid_tokens).flatten()
    losses = masked_losses(model, batch.model_kwargs(), masked, labels[masked], "sum")
    return losses, (labels != IGNORE_INDEX).sum()


def masked_losses(
    model: nn.Module,
    model_kwargs: Mapping[str, Any],
    positions: Tensor,
    targets: Tensor,
    reduction: str = "none",
) -> Tensor:
    """Returns the cross-entropy at chosen positions of a masked language model's forward pass.

    Args:
        model: A transformers model for masked language modeling.
        model_kwargs: Keyword arguments of a forward pass over `input_ids` [B, S].
        positions: [n] int64, indices into the flattened [B * S] tokens.
        targets: [n] int64, the token at each position before it was masked.
        reduction: "none", "sum" or "mean".

    Returns:
        [n] float32 (float64 for a float64 model); 0-dim for "sum" and "mean".

    Raises:
        ValueError: as in `masked_lm_loss`.
    """
    inner = _checked(model, model_kwargs)
    if not has_known_head(model, inner, targets.device):
        logits = _logits(model, model_kwargs, positions)
        return functional.cross_entropy(logits, targets, reduction=reduction)
    hidden = _encoder(model, inner)(**model_kwargs)[0].flatten(0, 1)
    return head_losses(inner, hidden[positions], targets, reduction)


def masked_scores(
    model: nn.Module, model_kwargs: Mapping[str, Any], positions: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the cross-entropy at chosen positions, and whether the likeliest token is right.

    The arguments are those of `masked_losses`. No gradient is recorded.

    Returns:
        Losses [n] float32 (float64 for a float64 model), and hits [n] bool.

    Raises:
        ValueError: as in `masked_lm_loss`.
    """
    inner = _checked(model, model_kwargs)
    with torch.no_grad():
        if not has_known_head(model, inner, targets.device):
            logits = _logits(model, model_kwargs, positions)
            losses = functional.cross_entropy(logits, targets, reduction="none")
            return losses, logits.argmax(-1) == targets
        hidden = _encoder(model, inner)(**model_kwargs)[0].flatten(0, 1)[positions]
        projection = inner.get_output_embeddings()
        states = head_states(inner, hidden)
        hits = [projection(part).argmax(-1) for part in states.split(HITS_TOKENS)]
        found = torch.cat(hits) if hits else targets
        return head_losses(inner, hidden, targets, "none"), found == targets


HITS_TOKENS = 1024
"""Tokens whose logits `masked_scores` holds at once."""


def _checked(model: nn.Module, model_kwargs: Mapping[str, Any]) -> Any:
    """Returns the model without wrappers; raises a ValueError if it cannot be read."""
    if isinstance(model, DistributedDataParallel):
        raise ValueError(
            "model must be the module itself, got a DistributedDataParallel wrapper, whose "
            "gradient reduction would be bypassed. Wrap a module whose forward computes the loss, "
            "as a LightningModule is, or pass model.module for evaluation."
        )
    inner = without_wrappers(model)
    require_masked_lm(inner)
    require_flash_attention(inner, model_kwargs)
    return inner


def _logits(model: nn.Module, model_kwargs: Mapping[str, Any], positions: Tensor) -> Tensor:
    """Returns the logits [n, V] of a model's own forward, float32 or float64."""
    logits: Tensor = model(**model_kwargs)["logits"].flatten(0, 1)[positions]
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def head_losses(
    model: Any, hidden: Tensor, targets: Tensor, reduction: str, ignore_index: int = IGNORE_INDEX
) -> Tensor:
    """Returns the cross-entropy of a masked language model's head, without holding the logits.

    Args:
        model: A transformers model whose head is known (`has_known_head`).
        hidden: [n, E], hidden states of its encoder.
        targets: [n] int64, the token to predict at each position.
        reduction: "none", "sum" or "mean".
        ignore_index: Target that excludes a position.

    Returns:
        [n], or 0-dim for "sum" and "mean", float32 (float64 for a float64 model).
    """
    projection = model.get_output_embeddings()
    loss, _ = linear_cross_entropy(
        head_states(model, hidden),
        projection.weight,
        targets,
        bias=projection.bias,
        ignore_index=ignore_index,
        reduction=reduction,
    )
    return loss


@torch.compiler.disable
def head_states(model: Any, hidden: Tensor) -> Tensor:
    """Runs a masked language model's head up to its last layer, the output embedding.

    The model's own forward runs on a shallow copy of the model, which shares all parameters. In the
    copy, the encoder returns `hidden`, and the output embedding returns its input.

    Args:
        model: A transformers model for masked language modeling.
        hidden: [n, E], hidden states of its encoder.

    Returns:
        The input of the output embedding, [n, E'].
    """
    twin = _shallow(model)
    _replace(twin, model.base_model_prefix, _GivenStates())
    _replace(twin, _path(model, model.get_output_embeddings()), nn.Identity())
    for hooks in (twin._forward_pre_hooks, twin._forward_hooks):
        assert not hooks
    forward = getattr(type(model), "lctrain_own_forward", type(model).forward)
    return forward(twin, inputs_embeds=hidden[None])["logits"][0]


def require_masked_lm(model: Any) -> None:
    """Raises a ValueError unless a model is a transformers model for masked language modeling.

    Args:
        model: A model without wrappers.
    """
    named = any(base.__name__.endswith("ForMaskedLM") for base in type(model).__mro__)
    if not named or getattr(model, "base_model", model) is model:
        raise ValueError(
            f"model must be a transformers model for masked language modeling, got "
            f"{type(model).__name__}. Pass for example a ModernBertForMaskedLM, or task='causal'."
        )


@torch.compiler.disable
def has_known_head(model: Any, inner: Any, device: torch.device) -> bool:
    """Returns whether `head_states` and the output embedding give the model's own logits.

    The first call for an output embedding verifies this on a few tokens, and so does the first call
    after it has got a hook or lost its hooks. If the logits differ, a warning says why.

    Args:
        model: The model, which may be compiled or have adapters.
        inner: The model without wrappers.
        device: Device of the model.
    """
    projection = inner.get_output_embeddings()
    known, now = vars(inner).get(_ATTRIBUTE), (id(projection), is_seen(projection))
    if known is None or known[0] != now:
        try:
            _verify(inner, device)
        except UnverifiedHeadError as error:
            warn_caller(
                f"{type(inner).__name__} computes the logits of all tokens, which takes memory for "
                f"tokens x vocabulary numbers: {error}.",
            )
            known = (now, False)
        else:
            known = (now, True)
        vars(inner)[_ATTRIBUTE] = known
    return bool(known[1])


def _verify(model: Any, device: torch.device) -> None:
    projection = model.get_output_embeddings()
    check_projection(projection)
    inputs = probe(device, packed=False)
    inputs.pop("use_cache")
    with evaluation_mode(model), torch.compiler.set_stance("force_eager"):
        expected = model(**inputs)["logits"]
        hidden = model.base_model(**inputs)[0]
        try:
            found = projection(head_states(model, hidden[0]))[None]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UnverifiedHeadError(f"its head does not run alone ({error})") from error
    if not torch.equal(found, expected):
        raise UnverifiedHeadError("its head is more than a function of the hidden states")


def _encoder(model: Any, inner: Any) -> Any:
    encoder = inner.base_model
    return model.dynamo_ctx(encoder) if isinstance(model, OptimizedModule) else encoder


class _GivenStates(nn.Module):
    """Stands for the encoder in `head_states`: returns the hidden states that it is given."""

    def forward(self, *args: Any, inputs_embeds: Tensor, **kwargs: Any) -> Any:
        """Returns `inputs_embeds` as hidden states."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        return BaseModelOutputWithPooling(last_hidden_state=inputs_embeds)


def _path(model: nn.Module, part: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is part)


def _shallow(module: Any) -> Any:
    """Returns a copy of a module that shares all parameters and submodules, without hooks."""
    twin = object.__new__(type(module))
    twin.__dict__ = dict(module.__dict__)
    twin._modules = dict(module._modules)
    for name in ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks"):
        setattr(twin, name, copy.copy(getattr(module, name)))
        getattr(twin, name).clear()
    return twin


def _replace(twin: Any, path: str, part: nn.Module) -> None:
    """Replaces the module at a path of a shallow copy, without changing the original model."""
    *way, last = path.split(".")
    for name in way:
        twin._modules[name] = _shallow(twin._modules[name])
        twin = twin._modules[name]
    twin._modules[last] = part
