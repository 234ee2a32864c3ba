"""LossSwap: makes `model(**batch, labels=...)` compute its loss without holding all logits.

transformers' Trainer and TRL compute the loss by calling the model with labels. In training mode, a
model with this swap uses `linear_cross_entropy` for such calls.
"""

from __future__ import annotations

import functools
import inspect
from functools import partial
from typing import Any, cast

from torch import Tensor, nn

from lctrain.batch import IGNORE_INDEX
from lctrain.kernels import linear_cross_entropy
from lctrain.loss.causal_lm import probe
from lctrain.loss.masked_lm import has_known_head, head_losses
from lctrain.loss.output_head import find_output_head
from lctrain.made_class import makes_class
from lctrain_kernels.cross_entropy.mean import mean_over


class LossSwap:
    """A reversible change of a causal LM: it computes its loss without logits in training mode.

    It implements the protocol `lctrain.models.swap.Swap`.

    Args:
        model: A transformers model for causal or masked language modeling.

    Raises:
        ValueError: if the model is neither, or has no output embedding.
    """

    name = "loss"

    def __init__(self, model: nn.Module) -> None:
        require_language_model(model)
        self._model: Any = model
        self._own = cast(Any, type(model))
        self._masked = is_masked_lm(model)

    def apply(self) -> None:
        """Changes the model's class to a subclass that computes the loss without logits."""
        make = masked_loss_class if self._masked else loss_class
        self._model.__class__ = make(self._own)

    def undo(self) -> None:
        """Restores the model's class."""
        self._model.__class__ = self._own

    def describe(self) -> str:
        """Returns which logits are not computed, for the report of PatchHandle."""
        return "at masked positions, without logits" if self._masked else "without logits"


def require_language_model(model: Any) -> None:
    """Raises a ValueError unless `patch_model(model, loss=True)` supports the model.

    Args:
        model: A transformers model.

    Raises:
        ValueError: if the model is not a causal or masked LM with an output embedding.
    """
    names = getattr(type(model).forward, "__code__", None)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    causal = type(model).__name__.endswith("ForCausalLM")
    if head is None or not (causal or is_masked_lm(model)) or names is None:
        raise ValueError(
            f"loss=True needs a causal language model, or a masked one, with an output embedding, "
            f"got {type(model).__name__}. Pass loss=False."
        )


def is_masked_lm(model: Any) -> bool:
    """Returns whether a model is a transformers model for masked language modeling."""
    return type(model).__name__.endswith("ForMaskedLM")


@makes_class
def masked_loss_class(own: Any) -> Any:
    """Returns a subclass of a masked LM's class whose forward computes logits for no token.

    Args:
        own: The model's own class.
    """
    replaceable = calls_loss_function(own)

    @functools.wraps(own.forward)
    def forward(self: Any, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        plain = partial(own.forward, self, *args, **kwargs)
        if labels is None:
            return plain()
        fits = self.training and not args and _returns_names(self, kwargs)
        if not fits or (replaceable and _has_other_loss(self)):
            return plain(labels=labels)
        if not has_known_head(self, self, labels.device):
            return plain(labels=labels)
        return _masked_loss(self, labels, kwargs, replaceable)

    changes = {
        "forward": forward,
        "__module__": own.__module__,
        "lctrain_own_forward": own.forward,  # which `head_states` runs
    }
    return type(own.__name__, (own,), changes)


def calls_loss_function(model_class: Any) -> bool:
    """Returns whether a class's forward computes its loss by `self.loss_function`.

    Such a loss reads `num_items_in_batch` and `ignore_index`, and a user can replace it. A forward
    that computes the cross-entropy itself, such as BERT's, ignores both arguments.

    Args:
        model_class: A transformers model class.
    """
    for base in model_class.__mro__:
        forward = vars(base).get("forward")
        if forward is None:
            continue
        code = getattr(inspect.unwrap(forward), "__code__", None)
        names = () if code is None else code.co_names
        if "loss_function" in names:
            return True
        if "super" not in names:
            return False
    return False


def _has_other_loss(model: Any) -> bool:
    from transformers.loss.loss_utils import ForMaskedLMLoss

    return getattr(model, "loss_function", ForMaskedLMLoss) is not ForMaskedLMLoss


def _take_loss_options(kwargs: dict[str, Any], used: bool) -> tuple[Any, int]:
    """Removes and returns `num_items_in_batch` and `ignore_index`; their defaults if not `used`."""
    divisor = kwargs.pop("num_items_in_batch", None)
    ignore_index = kwargs.pop("ignore_index", IGNORE_INDEX)
    return (divisor, ignore_index) if used else (None, IGNORE_INDEX)


def _masked_loss(model: Any, labels: Tensor, kwargs: dict[str, Any], replaceable: bool) -> Any:
    from transformers.modeling_outputs import MaskedLMOutput

    kwargs = dict(kwargs)
    divisor, ignore_index = _take_loss_options(kwargs, replaceable)
    outputs = model.base_model(**kwargs)
    hidden = outputs[0].flatten(0, 1)
    labels = labels.flatten()
    masked = (labels != ignore_index).nonzero().flatten()
    loss = head_losses(
        model,
        hidden.index_select(0, masked.to(hidden.device)),
        labels[masked].to(hidden.device),
        "mean" if divisor is None else "sum",
        ignore_index,
    )
    if divisor is not None:
        loss = mean_over(loss, divisor)
    return MaskedLMOutput(
        loss=loss,
        logits=None,
        hidden_states=outputs.get("hidden_states"),
        attentions=outputs.get("attentions"),
    )


@makes_class
def loss_class(own: Any) -> Any:
    """Returns a subclass of a causal LM's class whose forward computes the loss without logits.

    Args:
        own: The model's own class.
    """
    replaceable = calls_loss_function(own)

    @functools.wraps(own.forward)
    def forward(self: Any, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        plain = partial(own.forward, self, *args, **kwargs)
        if labels is None and kwargs.get("shift_labels") is None:
            return plain()
        head = None
        if self.training and _is_plain_call(self, kwargs):
            device = next(self.parameters()).device
            packed = "cu_seq_lens_q" in kwargs
            head = find_output_head(self, partial(probe, device, packed))
        if head is None:
            return plain(labels=labels)
        return _fused_loss(head, labels, args, kwargs, replaceable)

    return type(own.__name__, (own,), {"forward": forward, "__module__": own.__module__})


def _is_plain_call(model: Any, kwargs: dict[str, Any]) -> bool:
    """Returns whether a call asks only for the usual loss: no tuple, router loss or other loss."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    if getattr(model, "loss_function", ForCausalLMLoss) is not ForCausalLMLoss:
        return False
    router = kwargs.get("output_router_logits")
    router = getattr(model.config, "output_router_logits", False) if router is None else router
    return not router and _returns_names(model, kwargs)


def _returns_names(model: Any, kwargs: dict[str, Any]) -> bool:
    """Returns whether a call returns its outputs by name, and not as a tuple."""
    given = kwargs.get("return_dict")
    return bool(getattr(model.config, "return_dict", True) if given is None else given)


def _fused_loss(
    head: Any, labels: Tensor | None, args: Any, kwargs: dict[str, Any], replaceable: bool
) -> Any:
    from transformers.modeling_outputs import CausalLMOutputWithPast

    kwargs = dict(kwargs)
    shifted = kwargs.pop("shift_labels", None)
    divisor, ignore_index = _take_loss_options(kwargs, replaceable)
    kwargs.pop("logits_to_keep", None)
    if shifted is None:
        assert labels is not None
        shifted = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    outputs = head.decoder(*args, **kwargs)
    hidden = outputs[0].flatten(0, 1)
    loss, _ = linear_cross_entropy(
        hidden,
        head.projection.weight,
        shifted.flatten().to(hidden.device),
        bias=head.projection.bias,
        softcap=head.softcap,
        logit_scale=head.logit_scale,
        batch_invariant=head.batch_invariant,
        ignore_index=ignore_index,
        reduction="mean" if divisor is None else "sum",
    )
    if divisor is not None:
        loss = mean_over(loss, divisor)
    return CausalLMOutputWithPast(
        loss=loss,
        logits=None,
        past_key_values=outputs.get("past_key_values"),
        hidden_states=outputs.get("hidden_states"),
        attentions=outputs.get("attentions"),
    )
