"""OutputHead: how a causal LM computes logits from hidden states; found in the model and verified.

`linear_cross_entropy` may replace a model's own logits only if both compute the same function.
`find_output_head` tests this for each model, without a list of architectures: it runs the model
once on a few tokens, and compares the model's logits with those of OutputHead on the model's hidden
states.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule

from lctrain.batch_invariant import BatchInvariantLinear, is_linear
from lctrain.instances import require_instance
from lctrain.loss.evaluation_mode import evaluation_mode
from lctrain.module_hooks import has_hooks
from lctrain.warn import warn_caller

# Scale of the test's logits. Usual soft caps are 30 to 50, so a soft cap changes such logits by
# far more than rounding.
PROBE_LOGIT_SCALE = 100.0


class UnverifiedHeadError(Exception):
    """Raised if a model's logits differ from those of OutputHead; the message names the reason."""


@dataclass(frozen=True)
class OutputHead:
    """The function from a decoder's hidden states to the logits: linear, scaled and soft-capped.

    Attributes:
        decoder: The model without its output embedding. It returns hidden states [B, S, E].
        projection: The output embedding, with weight [V, E] and optionally bias [V].
        softcap: c > 0 replaces a logit x by c tanh(x / c); `final_logit_softcapping` of the config.
            0 for none.
        logit_scale: Factor of the logits, applied before the soft cap.
    """

    decoder: nn.Module
    projection: nn.Linear
    softcap: float
    logit_scale: float

    @property
    def batch_invariant(self) -> bool:
        """Whether the logits of a token must have the same bits in every batch."""
        return type(self.projection) is BatchInvariantLinear

    def finish(self, projected: Tensor) -> Tensor:
        """Applies the scale and the soft cap to the output of `projection`, a tensor of any shape.

        Args:
            projected: Output of `projection`.

        Returns:
            The logits, in the shape and dtype of `projected`.
        """
        logits = projected * self.logit_scale
        if self.softcap > 0.0:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits


_Signature = tuple[Any, ...]
_ATTRIBUTE = "_lctrain_output_head"


class _Verified:
    """The verified head of a model and the settings it depends on, stored as the model's attribute.

    A deep copy or pickle of a model gets an empty one, so the copy is verified again. A dictionary
    with weak keys is not used: the head refers to the model's layers, which may refer to the model,
    so the dictionary would keep the model alive.
    """

    def __init__(self, signature: _Signature = (), head: OutputHead | None = None) -> None:
        self.signature = signature
        self.head = head

    def __deepcopy__(self, memo: dict[int, Any]) -> _Verified:
        return _Verified()

    def __reduce__(self) -> tuple[type[_Verified], tuple[()]]:
        return _Verified, ()


@torch.compiler.disable  # inside a compiled training step, the verification runs eagerly
def find_output_head(
    model: nn.Module, make_probe: Callable[[], Mapping[str, Any]]
) -> OutputHead | None:
    """Returns a model's verified OutputHead; None if the model must compute its logits itself.

    If the result is None, one warning says why. The result is cached per model, until the model's
    output embedding is replaced or gets a hook, or the config's softcap or logit scale changes.

    Args:
        model: A transformers causal LM; it may be compiled or have PEFT adapters.
        make_probe: Function that returns the keyword arguments of a forward pass over a few tokens.
            It is called only when a head is verified, since it copies tensors to the device, which
            synchronises.
    """
    require_model(model)
    inner = without_wrappers(model)
    signature = _signature(inner)
    found: _Verified | None = vars(model).get(_ATTRIBUTE)
    if found is None or found.signature != signature:
        try:
            head: OutputHead | None = _verify(model, inner, make_probe())
        except UnverifiedHeadError as error:
            head = None
            warn_caller(
                f"{type(inner).__name__} computes all of its logits at once, which takes memory "
                f"for tokens x vocabulary numbers: {error}.",
            )
        _warn_of_what_is_skipped(inner, head)
        found = vars(model)[_ATTRIBUTE] = _Verified(signature, head)
    return found.head


def require_model(model: Any) -> None:
    """Raises a TypeError unless a model is a module of torch."""
    require_instance("model", model, nn.Module, "Pass a causal LM of transformers.")


def without_wrappers(model: nn.Module) -> Any:
    """Returns the transformers model inside the wrappers of torch.compile and PEFT."""
    if isinstance(model, OptimizedModule):
        model = model._orig_mod
    base: Any = getattr(model, "get_base_model", None)
    return model if base is None else base()


def _signature(inner: Any) -> _Signature:
    projection = _output_embeddings(inner)
    weight = getattr(projection, "weight", None)
    return (
        id(projection),
        projection is not None and is_seen(projection),
        getattr(weight, "dtype", None),
        getattr(projection, "bias", None) is None,
        *_config_of_logits(inner),
    )


def _output_embeddings(inner: Any) -> Any:
    find = getattr(inner, "get_output_embeddings", None)
    return None if find is None else find()


def _config_of_logits(inner: Any) -> tuple[float, float]:
    """Returns a model's (softcap, logit_scale), for which families' configs use different names.

    Without a softcap the first is 0; without a scale the second is 1.
    """
    config: Any = getattr(inner, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()

    def number(name: str) -> float | None:
        value = getattr(config, name, None)
        return float(value) if isinstance(value, int | float) else None

    scale = number("logit_scale") or number("lm_head_multiplier") or 1.0
    return number("final_logit_softcapping") or 0.0, scale / (number("logits_scaling") or 1.0)


def _verify(model: nn.Module, inner: Any, probe: Mapping[str, Any]) -> OutputHead:
    """Runs a model on a few tokens, and returns its head if the logits are those of OutputHead.

    Args:
        model: The model as the loss will call it.
        inner: The same model without wrappers.
        probe: Keyword arguments of the test run.

    Raises:
        UnverifiedHeadError: if the model's logits differ from those of OutputHead.
    """
    projection = _output_embeddings(inner)
    check_projection(projection)
    seen: dict[str, Tensor] = {}
    hidden_of: dict[nn.Module, Tensor] = {}

    def watch_decoder(module: nn.Module, args: Any, output: Any) -> None:
        hidden_of[module] = output[0]

    def replace_projected(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen["projection_input"] = args[0]
        generator = torch.Generator().manual_seed(0)
        values = torch.randn(output.shape, generator=generator) * PROBE_LOGIT_SCALE
        seen["projected"] = values.to(output.device, output.dtype)
        return seen["projected"].clone()

    # The test runs eagerly: a compiled model would skip the hooks, or keep them in its graph.
    with evaluation_mode(model), torch.compiler.set_stance("force_eager"):
        handles = [projection.register_forward_hook(replace_projected)]
        handles += [part.register_forward_hook(watch_decoder) for part in _decoders(inner)]
        try:
            logits = model(**probe)["logits"]
        finally:
            for handle in handles:
                handle.remove()
        # If decoders are nested, the outermost one finishes last, and is the one to call.
        decoder = next(reversed(hidden_of), None)
        if decoder is None or not seen:
            raise UnverifiedHeadError("its forward does not call its base model and its head")
        alone = decoder(**probe)[0]
    head = OutputHead(decoder, projection, *_config_of_logits(inner))
    if not _same(alone, hidden_of[decoder]):
        raise UnverifiedHeadError("its base model gives other hidden states when called alone")
    if not _same(alone, seen["projection_input"]):
        raise UnverifiedHeadError("it changes the hidden states before the output embedding")
    if not _equal_to_rounding(logits, seen["projected"], head):
        raise UnverifiedHeadError(
            "it changes the logits in a way that its configuration does not name"
        )
    if isinstance(model, OptimizedModule):
        head = OutputHead(model.dynamo_ctx(decoder), projection, head.softcap, head.logit_scale)
    return head


def _decoders(inner: Any) -> list[nn.Module]:
    """Returns the modules that may compute the hidden states: the base model, and the decoder.

    The forward of some models calls the decoder directly, without the base model.
    """
    decoder = inner.get_decoder() if hasattr(inner, "get_decoder") else None
    parts = dict.fromkeys([getattr(inner, "base_model", None), decoder])
    return [part for part in parts if part is not None and part is not inner]


def check_projection(projection: Any) -> None:
    """Raises an UnverifiedHeadError unless an output embedding is a plain nn.Linear."""
    if not is_linear(projection):
        raise UnverifiedHeadError(
            f"its output embedding is a {type(projection).__name__}, not a torch.nn.Linear"
        )
    if is_seen(projection):
        raise UnverifiedHeadError("its output embedding has hooks, which have to run")
    if type(projection.weight) is not nn.Parameter:
        raise UnverifiedHeadError(
            f"the weight of its output embedding is a {type(projection.weight).__name__}"
        )


def is_seen(projection: Any) -> bool:
    """Returns whether a hook, or a forward of its own, sees what an output embedding computes."""
    return has_hooks(projection) or "forward" in vars(projection)


def _same(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and torch.equal(first, second)


def _equal_to_rounding(logits: Tensor, projected: Tensor, head: OutputHead) -> bool:
    """Returns whether the model's logits equal those of OutputHead up to rounding.

    The error against float64 may be at most twice the error of OutputHead in the same dtype.

    Args:
        logits: The model's logits, any shape.
        projected: Output of the output embedding, in the shape of the logits.
        head: The head to compare with.
    """
    if logits.shape != projected.shape:
        return False
    exact = head.finish(projected.double())
    ours = head.finish(projected).double()
    rounding = torch.finfo(projected.dtype).eps / 2 * exact.abs().max()
    allowed = 2 * torch.maximum((ours - exact).abs().max(), rounding)
    return bool((logits.double() - exact).abs().max() <= allowed)


def _warn_of_what_is_skipped(inner: Any, head: OutputHead | None) -> None:
    if getattr(getattr(inner, "config", None), "output_router_logits", False):
        warn_caller(
            "output_router_logits is on, but the router's auxiliary loss is not added to the loss "
            "of the tokens. Set config.output_router_logits=False.",
        )
    if head is not None and inner._compiled_call_impl is not None:
        warn_caller(
            "model.compile() has no effect on the loss, which calls the base model directly. "
            "Use torch.compile(model), or model.base_model.compile().",
        )
