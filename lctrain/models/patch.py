"""patch_model: swaps a transformers model's attention for lctrain's, and back."""

from collections.abc import Sequence
from typing import Any, cast

from torch import nn

from lctrain.attention.spec import AttentionSpec, make_spec
from lctrain.loss.model_loss import LossSwap
from lctrain.models.attention_swap import AttentionSwap
from lctrain.models.fused import FusedSwap
from lctrain.models.inputs import InputHook
from lctrain.models.swap import Swap, Unpatchable, apply_all, undo_all


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
    swaps: list[Swap] = [AttentionSwap(model, spec)]
    _require_bools(fused=fused, loss=loss)
    if fused:
        swaps.append(FusedSwap(model))
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
    """Lists what patch_model swapped in one model, and undoes it.

    Attributes:
        model: The patched model.
        swaps: What was swapped, in the order of the swaps; the first is that of the attention.
        active: False after unpatch().
    """

    def __init__(self, model: Any, swaps: Sequence[Swap]) -> None:
        self.model = model
        self.swaps = tuple(swaps)
        apply_all(self.swaps)
        self.active = True

    @property
    def attention(self) -> AttentionSwap:
        """The swap of the attention."""
        return cast(AttentionSwap, self._swap(AttentionSwap))

    @property
    def spec(self) -> AttentionSpec:
        """The options that the attention layers carry."""
        return self.attention.spec

    @property
    def layers(self) -> dict[str, nn.Module]:
        """The swapped attention layers by name."""
        return self.attention.layers

    @property
    def fused(self) -> FusedSwap | None:
        """The swap of fused modules, or None."""
        return cast(FusedSwap | None, self._swap(FusedSwap))

    @property
    def loss(self) -> LossSwap | None:
        """The swap of the loss, or None."""
        return cast(LossSwap | None, self._swap(LossSwap))

    def unpatch(self) -> None:
        """Restores the model; its outputs are bit-equal to before. Does nothing if called again."""
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
