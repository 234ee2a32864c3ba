"""patch_model: replaces the attention of a transformers model by lctrain's, reversibly."""

from collections.abc import Sequence
from typing import Any, cast

from torch import nn

from lctrain.attention.spec import AttentionSpec, FlashSpec, make_spec
from lctrain.instances import require_instance, require_sequence
from lctrain.loss.model_loss import LossSwap
from lctrain.models.attention_swap import AttentionSwap
from lctrain.models.batch_invariant import BatchInvariantSwap
from lctrain.models.fused import FusedSwap
from lctrain.models.inputs import InputHook
from lctrain.models.swap import Swap, Unpatchable, apply_all, undo_all
from lctrain.models.unpadding import UnpadSwap, why_padded


def patch_model(
    model: nn.Module,
    attention: str = "flash",
    *,
    fused: bool = False,
    loss: bool = False,
    unpad: bool | None = None,
    **options: Any,
) -> "PatchHandle":
    """Replaces the attention of a transformers model by lctrain's kernels, in place.

    In the patched model, the documents of a pack (`model(**PackedBatch.model_kwargs())`) do not
    influence one another. Rows with or without padding work as before. Weights and state dict do
    not change, and torch.compile, activation checkpointing and DDP work as before.

    Args:
        model: A causal language model or encoder that uses AttentionInterface. Patch it before
            torch.compile and before wrapping it.
        attention: "flash"; "dual_chunk" for texts beyond the trained window of a causal model with
            rotary embeddings; "differential" for a DiffLlama, or for what
            `lctrain.models.differential.to_differential` returns.
        fused: Whether to replace norms, rotary embeddings, MLPs and residual additions by fused
            operations as well. Results are equal within rounding; on a GPU they are faster and take
            less memory.
        loss: Whether `model(**batch, labels=...)` computes the loss without the logits in training
            mode; its output then has `logits=None`. For causal and masked language models; the
            head of a masked one then runs on masked positions only.
        unpad: Whether an encoder computes nothing for padding: rows with a 2-D attention mask
            become one pack before the embeddings, and outputs become rows again, zero at padding.
            None means True for encoders that support it, and False for other models.
        **options: Options of the attention. Every attention has `dropout`, `deterministic` and
            `backend` (see `lctrain.attention.AttentionSpec`). "flash" also has `sliding_window`,
            and `batch_invariant`, which gives a token the same bits in every batch and fuses
            modules, too (see FlashSpec and the guide on generation). "dual_chunk" also has
            `chunk_size`, `local_size`, `scale`, `scale_coefficient` and `window` (see
            DualChunkSpec), whose defaults come from the model's config.

    Returns:
        A handle that lists the changes and undoes them. It is also a context manager, which undoes
        them at its end.

    Raises:
        ValueError: if the model or an option is not supported; the message names the remedy.
    """
    spec = make_spec(attention, **options)
    if isinstance(model, nn.Module) and _hooks(model):
        raise ValueError(
            "model must not be patched, got one that is. Call unpatch() on its handle first."
        )
    swaps: list[Swap] = [AttentionSwap(model, spec)]
    _require_bools(fused=fused, loss=loss, **({} if unpad is None else {"unpad": unpad}))
    if unpad or (unpad is None and why_padded(model) is None):
        swaps.append(UnpadSwap(model))
    invariant = isinstance(spec, FlashSpec) and spec.batch_invariant
    if fused or invariant:
        swaps.append(fusion := FusedSwap(model))
    if invariant:
        swaps.append(BatchInvariantSwap(model, fusion, spec.dropout))
    if loss:
        swaps.append(LossSwap(model))
    return PatchHandle(model, swaps)


def _require_bools(**flags: Any) -> None:
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, got {value!r}. Pass a bool.")


def _hooks(model: nn.Module) -> list[InputHook]:
    found = (hook for module in model.modules() for hook in module._forward_pre_hooks.values())
    return [hook for hook in found if isinstance(hook, InputHook)]


class PatchHandle(Unpatchable):
    """Lists the changes that patch_model made to one model, and undoes them.

    The constructor applies the changes.

    Args:
        model: The model to patch.
        swaps: The changes, in the order in which to apply them; the first is an AttentionSwap.

    Attributes:
        model: The patched model.
        swaps: The changes, in the order in which they were applied.
        active: True until unpatch() is called.
    """

    def __init__(self, model: Any, swaps: Sequence[Swap]) -> None:
        require_sequence("swaps", swaps, "Call lctrain.patch_model instead.")
        self.model = model
        self.swaps = tuple(swaps)
        for swap in self.swaps:
            require_instance("swaps", swap, Swap, "Call lctrain.patch_model instead.")
        apply_all(self.swaps)
        self.active = True

    @property
    def attention(self) -> AttentionSwap:
        """The swap that replaced the model's attention."""
        return cast(AttentionSwap, self._swap(AttentionSwap))

    @property
    def spec(self) -> AttentionSpec:
        """The options of the attention layers, with defaults filled in from the model's config."""
        return self.attention.spec

    @property
    def layers(self) -> dict[str, nn.Module]:
        """The patched attention layers by name."""
        return self.attention.layers

    @property
    def fused(self) -> FusedSwap | None:
        """The swap that replaced modules by fused ones; None without `fused=True`."""
        return cast(FusedSwap | None, self._swap(FusedSwap))

    @property
    def loss(self) -> LossSwap | None:
        """The swap that replaced the model's loss; None without `loss=True`."""
        return cast(LossSwap | None, self._swap(LossSwap))

    def add(self, swap: Swap) -> None:
        """Applies one more change to the model, which `unpatch` undoes first."""
        self.swaps = (*self.swaps, swap)
        apply_all([swap])

    def unpatch(self) -> None:
        """Restores the model, whose outputs then have the same bits as before the patch.

        A second call does nothing.
        """
        if not self.active:
            return
        self.active = False
        undo_all(self.swaps)

    def _swap(self, kind: type[Swap]) -> Swap | None:
        return next((swap for swap in self.swaps if isinstance(swap, kind)), None)

    def __repr__(self) -> str:
        state = "active" if self.active else "unpatched"
        attention = self.attention
        lines = {
            "attention": attention.describe(),
            "options": attention.describe_options(),
            "kernels": attention.describe_kernels() if self.active else "none",
            "fused": "no",
            "loss": "as the model has it",
        }
        lines |= {swap.name: swap.describe() for swap in self.swaps}
        text = "".join(f"  {name}: {words}\n" for name, words in lines.items())
        names = "\n".join(
            f"    {name}: {type(layer).__name__}" for name, layer in self.layers.items()
        )
        return (
            f"PatchHandle({type(self.model).__name__}, {state})\n{text}"
            f"  layers ({len(self.layers)}):\n{names}"
        )
