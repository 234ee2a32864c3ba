"""patch_model: swaps a transformers model's attention for lctrain's, and back."""

from types import TracebackType
from typing import Any

import torch
from torch import nn

from lctrain.attention.forward import SPEC_ATTRIBUTE, backend_of
from lctrain.attention.spec import AttentionSpec, make_spec
from lctrain.loss.model_loss import LossSwap, require_causal_lm
from lctrain.models.architectures import attention_layers, head_dims, require_supported
from lctrain.models.configs import ConfigSwap
from lctrain.models.frequencies import detach_frequencies
from lctrain.models.fused import FusedSwap
from lctrain.models.heads import check_outputs
from lctrain.models.inputs import InputHook
from lctrain.models.kinds import KINDS
from lctrain.models.registration import register


def patch_model(
    model: nn.Module,
    attention: str = "flash",
    *,
    fused: bool = False,
    loss: bool = False,
    **options: Any,
) -> "PatchHandle":
    """Swaps the attention of a transformers model for lctrain's kernels, in place.

    Packed documents (`model(**PackedBatch.model_kwargs())`) then stay apart exactly. Rows with or
    without padding work as before. Nothing of the model's code or weights is touched, so that
    checkpoints, torch.compile, activation checkpointing and DDP do not notice.

    Args:
        model: A causal language model or encoder that uses AttentionInterface. Patch it before
            torch.compile and before wrapping it.
        attention: "flash"; "dual_chunk" for texts beyond the trained window of a causal model with
            rotary embeddings; "differential" for a DiffLlama, or for what
            `lctrain.models.differential.to_differential` returns.
        fused: Whether to swap norms, rotary embeddings, MLPs and residual additions for fused
            operations as well. Results are equal within rounding; on a GPU they are faster and take
            less memory.
        loss: Have `model(**batch, labels=...)` compute the loss without the logits in training
            mode; its output then has `logits=None`. For causal language models.
        **options: Options for every attention: `dropout` (probability, training mode only; default:
            as the model's config says), `deterministic`, `backend`. Options for "dual_chunk":
            `chunk_size`, `local_size`, `scale`, `scale_coefficient` and `window`, see
            DualChunkSpec. Their defaults follow `dual_chunk_attention_config` in the model's
            config, else `max_position_embeddings`: texts of up to that many tokens give the output
            of plain attention.

    Returns:
        A handle that lists what was swapped and undoes it; also a context manager.

    Raises:
        ValueError: if the model or an option is not supported; the message names the remedy.
    """
    spec = make_spec(attention, **options)
    if isinstance(model, nn.Module) and _hooks(model):
        raise ValueError(
            "model must not be patched, got one that is. Call unpatch() on its handle first."
        )
    require_supported(model)
    for head_dim in head_dims(model):
        serving_backend(model, spec, head_dim)
    register()
    spec = KINDS[spec.kind].fit(model, spec)
    _require_bools(fused=fused, loss=loss)
    if loss:
        require_causal_lm(model)
    return PatchHandle(model, spec, fused=fused, loss=loss)


def _require_bools(**flags: Any) -> None:
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, got {value!r}. Pass a bool.")


def serving_backend(model: nn.Module, spec: AttentionSpec, head_dim: int = 1) -> str:
    """Returns the backend that will run the model on its current device.

    The dtype is autocast's where it is on. Weights in float32 cause no warning, since under
    autocast the calls have another dtype.

    Args:
        model: Model on any device.
        spec: Options of its attention.
        head_dim: Head dim of the layers in question, as in `head_dims`.

    Raises:
        ValueError: if the backend that the spec names cannot.
    """
    from lctrain.kernels import select_backend

    device, dtype = device_and_dtype(model, spec)
    named = backend_of(spec, device, dtype, head_dim)
    return select_backend(device, dtype, named, head_dim=head_dim, warn=False)


def device_and_dtype(model: nn.Module, spec: AttentionSpec) -> tuple[torch.device, torch.dtype]:
    """Returns where the model's attention runs now, and in which dtype: autocast's if it is on."""
    weight = next(model.parameters(), None)
    device, dtype = torch.device("cpu"), torch.float32
    if weight is not None and weight.device.type != "meta":
        device, dtype = weight.device, weight.dtype
    if spec.backend != "auto" and device.type == "cpu" and torch.cuda.is_available():
        device = torch.device("cuda")  # a model is often patched before it is moved
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    return device, dtype


def _hooks(model: nn.Module) -> list[InputHook]:
    found = (hook for module in model.modules() for hook in module._forward_pre_hooks.values())
    return [hook for hook in found if isinstance(hook, InputHook)]


class PatchHandle:
    """Lists what patch_model swapped in one model, and undoes it.

    Attributes:
        model: The patched model.
        spec: The options that its layers carry.
        layers: The swapped attention layers by name.
        fused: The fused modules, or None.
        loss: The swapped loss, or None.
        active: False after unpatch().
    """

    def __init__(
        self, model: Any, spec: AttentionSpec, *, fused: bool = False, loss: bool = False
    ) -> None:
        from transformers import PreTrainedModel

        self.model = model
        self.spec = spec
        self.layers = attention_layers(model)
        self.active = True
        self.previous = str(model.config._attn_implementation)
        make_hook = KINDS[spec.kind].hook
        hooks = [
            (module, make_hook(module, spec))
            for module in model.modules()
            if isinstance(module, PreTrainedModel)
        ]
        self._configs = ConfigSwap(model, spec.implementation)
        self._specs = [(layer, vars(layer).get(SPEC_ATTRIBUTE)) for layer in self.layers.values()]
        for layer in self.layers.values():
            setattr(layer, SPEC_ATTRIBUTE, spec)
        self._swap_back = KINDS[spec.kind].swap(self.layers)
        self.fused = FusedSwap(model) if fused else None
        self.loss = LossSwap(model) if loss else None
        self._hooks = [
            module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in hooks
        ] + [module.register_forward_hook(check_outputs, with_kwargs=True) for module, _ in hooks]

    def unpatch(self) -> None:
        """Restores the model; its outputs are bit-equal to before. Does nothing if called again."""
        if not self.active:
            return
        self.active = False
        for hook in self._hooks:
            hook.remove()
        if self.loss is not None:
            self.loss.restore()
        if self.fused is not None:
            self.fused.restore()
        detach_frequencies(self.model)
        self._swap_back()
        for layer, spec in self._specs:  # a model that was loaded by name has one of its own
            delattr(layer, SPEC_ATTRIBUTE)
            if spec is not None:
                setattr(layer, SPEC_ATTRIBUTE, spec)
        self._configs.restore()

    def __enter__(self) -> "PatchHandle":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.unpatch()

    def __repr__(self) -> str:
        state = "active" if self.active else "unpatched"
        backend = self._backend() if self.active else "none"
        options = ", ".join(
            f"{name}={'as in the config' if value is None else repr(value)}"
            for name, value in self.spec.options().items()
        )
        names = "\n".join(
            f"    {name}: {type(layer).__name__}" for name, layer in self.layers.items()
        )
        return (
            f"PatchHandle({type(self.model).__name__}, {state})\n"
            f"  attention: {self.previous} -> {self.spec.implementation}\n"
            f"  options: {options}\n"
            f"  kernels: {backend}\n"
            f"  fused: {'no' if self.fused is None else self.fused.describe()}\n"
            f"  loss: {'as the model has it' if self.loss is None else 'without logits'}\n"
            f"  layers ({len(self.layers)}):\n{names}"
        )

    def _backend(self) -> str:
        try:
            wide = {
                serving_backend(self.model, self.spec, width) for width in head_dims(self.model)
            }
        except ValueError as error:  # the model has moved since; the next forward raises this
            return f"none: {error}"
        if len(wide) > 1:
            return ", ".join(sorted(wide))
        backend = wide.pop()
        if backend != "hopper":
            return backend
        from lctrain.models.differential_v1 import FusedDiffLlamaAttention  # needs DiffLlama
        from lctrain_kernels.gluon.support import serves

        _, dtype = device_and_dtype(self.model, self.spec)
        deterministic = torch.are_deterministic_algorithms_enabled() or self.spec.deterministic
        told = set()
        for layer in self.layers.values():
            head_dim = getattr(layer, "head_dim", 64)
            version_1 = isinstance(layer, FusedDiffLlamaAttention)  # a k per branch, wide values
            told.add(
                serves(
                    self.spec.kind,
                    head_dim,
                    dtype,
                    deterministic=deterministic,
                    value_dim=2 * head_dim if version_1 else head_dim,
                    shared_k=not version_1,
                )
            )
        return "; ".join(sorted(told))
