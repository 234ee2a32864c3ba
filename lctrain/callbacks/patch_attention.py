"""PatchAttention: lctrain's kernels in the models of any LightningModule, for one run."""

from __future__ import annotations

from typing import Any

from lctrain.attention import make_spec
from lctrain.callbacks.patching import Patching
from lctrain.models.patch import PatchHandle, patch_model
from lctrain.models.within import Paths


class PatchAttention(Patching):
    """Swaps the attention of the module's transformers models for lctrain's kernels.

        trainer = L.Trainer(callbacks=[PatchAttention("dual_chunk", chunk_size=8192)])

    It finds the models in any LightningModule, also inside torch.compile and PEFT, and patches them
    in fit, validate, test and predict. Models that exist are patched before data are prepared,
    others once `configure_model` has built them. After the run, also after one that fails, every
    model is as it was; state dicts and checkpoints never see the patch. What was swapped is logged
    once, and is in the loggers' config.

    Without a Trainer, with Fabric for example, call `lctrain.patch_models(module, ...)`.

    Args:
        attention: "flash", "dual_chunk" or "differential", as in `lctrain.patch_model`.
        models: Attribute paths of the models to patch, such as "policy.model"; None for all.
        fused: Whether to swap norms, rotary embeddings and MLPs for fused operations as well, as
            LongContextModule does. Results are equal within rounding; on a GPU they are faster and
            take less memory.
        loss: Have `model(**batch, labels=...)` compute its loss without the logits in training.
        dropout: Probability of dropping an attention weight in training; None keeps the model's.
        deterministic: Whether the backward must give the same bits in every run.
        backend: Name of the kernels, as in `lctrain.kernels`. A named backend never falls back to
            another.
        sliding_window: Only "flash": keys that a query sees; None keeps the model's windows.
        chunk_size: Only "dual_chunk", as all options below: the largest relative position.
        local_size: Neighbours across a chunk border that keep their true distance, in tokens.
        scale: "none" or "yarn".
        scale_coefficient: Coefficient of "yarn".
        window: Tokens that the model was trained on at a time.

    Raises:
        ValueError: if an option is unknown or wrong. Before data are prepared: if the module holds
            no transformers model, one that cannot be patched, one that is patched or wrapped
            already, or several that need different options.
    """

    def __init__(
        self,
        attention: str = "flash",
        *,
        models: Paths = None,
        fused: bool = True,
        loss: bool = False,
        dropout: float | None = None,
        deterministic: bool = False,
        backend: str = "auto",
        sliding_window: int | None = None,
        chunk_size: int | None = None,
        local_size: int | None = None,
        scale: str | None = None,
        scale_coefficient: float | None = None,
        window: int | None = None,
    ) -> None:
        super().__init__(models)
        named = {
            "dropout": dropout,
            "sliding_window": sliding_window,
            "chunk_size": chunk_size,
            "local_size": local_size,
            "scale": scale,
            "scale_coefficient": scale_coefficient,
            "window": window,
        }
        self.attention = attention
        self.options: dict[str, Any] = {
            "deterministic": deterministic,
            "backend": backend,
            **{name: value for name, value in named.items() if value is not None},
        }
        make_spec(attention, **self.options)
        self.swaps = {"fused": fused, "loss": loss}

    def _patch_one(self, model: Any) -> PatchHandle:
        return patch_model(model, self.attention, **self.swaps, **self.options)
