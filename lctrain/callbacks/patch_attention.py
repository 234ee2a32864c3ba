"""PatchAttention: patches the models of any LightningModule with lctrain's attention for a run."""

from __future__ import annotations

from typing import Any

from lctrain.attention import make_spec
from lctrain.callbacks.patching import Patching
from lctrain.models.patch import PatchHandle, patch_model
from lctrain.models.within import Paths


class PatchAttention(Patching):
    """Replaces the attention of a LightningModule's transformers models by lctrain's for one run.

        trainer = L.Trainer(callbacks=[PatchAttention("dual_chunk", chunk_size=8192)])

    The models are found in any LightningModule, also inside torch.compile and PEFT, and are patched
    in fit, validate, test and predict. Models that exist before the run are patched before data are
    prepared; models that `configure_model` builds are patched right after it. After the run, even
    if it fails, every model is restored. State dicts and checkpoints do not contain the patch. What
    was swapped is logged once, and stored as a hyperparameter of the loggers.

    Without a Trainer, for example with Fabric, call `lctrain.patch_models(module, ...)`.

    Args:
        attention: "flash", "dual_chunk" or "differential", as in `lctrain.patch_model`.
        models: Attribute paths of the models to patch, such as "policy.model"; None for all models.
        fused: Whether to swap norms, rotary embeddings and MLPs for fused operations as well, as
            LongContextModule does. Results are equal within rounding; on a GPU they are faster and
            take less memory.
        loss: Whether `model(**batch, labels=...)` computes its loss without the logits in training
            mode.
        unpad: Whether an encoder computes nothing for padding, as in `lctrain.patch_model`; None
            does so wherever the model allows it.
        dropout: Probability of dropping an attention weight in training mode; None keeps the value
            of the model's config.
        deterministic: Whether the backward must give the same bits in every run.
        backend: Name of the kernels' backend, as in `lctrain.kernels`. A named backend is used or
            an error is raised; "auto" lets the device decide.
        sliding_window: Only for "flash". Number of keys that a query sees; None keeps the model's
            windows.
        batch_invariant: Only for "flash". Whether rollouts of lctrain.generate have the bits of a
            training forward's log-probabilities; training then runs slower.
        chunk_size: Only for "dual_chunk". Largest relative position; None derives it from the
            model's config, as in DualChunkSpec.
        local_size: Only for "dual_chunk". Distance in tokens within which keys of the previous
            chunk keep their exact relative positions; None as for `chunk_size`.
        scale: Only for "dual_chunk". "none", or "yarn" to scale the logits of long documents; None
            means "none".
        scale_coefficient: Only for "dual_chunk". Coefficient of scale="yarn"; None means 0.1.
        window: Only for "dual_chunk". Length in tokens of the model's training texts; None takes it
            from the model's config.

    Raises:
        ValueError: if an option is unknown or wrong. In the run, before data are prepared: if the
            module has no transformers model, or a model cannot be patched, is patched or wrapped
            already, or needs other options.
    """

    def __init__(
        self,
        attention: str = "flash",
        *,
        models: Paths = None,
        fused: bool = True,
        loss: bool = False,
        unpad: bool | None = None,
        dropout: float | None = None,
        deterministic: bool = False,
        backend: str = "auto",
        sliding_window: int | None = None,
        batch_invariant: bool | None = None,
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
            "batch_invariant": batch_invariant,
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
        self.swaps: dict[str, Any] = {"fused": fused, "loss": loss, "unpad": unpad}

    def _patch_one(self, model: Any) -> PatchHandle:
        return patch_model(model, self.attention, **self.swaps, **self.options)
