"""AttentionSchedule: changes a model's attention, window, dropout or RoPE during training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl

from lctrain.attention import make_spec
from lctrain.callbacks.patching import Patching, say
from lctrain.distributed import Topology
from lctrain.log_steps import at_log_step
from lctrain.models.patch import PatchHandle, patch_model
from lctrain.models.rope import RopeSwap, check_rope
from lctrain.models.within import Paths


@dataclass(frozen=True)
class AttentionStage:
    """One stage of an AttentionSchedule: the attention from one optimizer step to the next stage.

    Attributes:
        step: First optimizer step of the stage.
        attention: Name of the attention, as in `lctrain.patch_model`.
        options: Options of the attention, keyword arguments of `lctrain.patch_model`.
        rope: Entries of the config's `rope_parameters` that the stage changes; None changes none.
    """

    step: int
    attention: str = "flash"
    options: Mapping[str, Any] = field(default_factory=dict)
    rope: Mapping[str, Any] | None = None

    @classmethod
    def read(cls, step: Any, description: Any) -> AttentionStage:
        """Builds a stage from one entry of the schedule.

        Args:
            step: First optimizer step of the stage.
            description: Mapping with `attention`, the attention's options, and `rope`.

        Raises:
            ValueError: if the step, the attention, an option or `rope` is not valid.
        """
        if not isinstance(step, int) or isinstance(step, bool) or step < 0:
            raise ValueError(
                f"stages must begin at optimizer steps of at least 0, got {step!r}. Use "
                "{0: {'attention': 'flash'}, 1000: {'attention': 'dual_chunk'}}."
            )
        if not isinstance(description, Mapping):
            raise ValueError(
                f"the stage at step {step} must be a mapping, got {description!r}. Use for example "
                "{'attention': 'dual_chunk', 'chunk_size': 8192}."
            )
        options = dict(description)
        attention, rope = options.pop("attention", "flash"), options.pop("rope", None)
        try:
            swaps = ("fused", "loss", "unpad")
            make_spec(attention, **{k: v for k, v in options.items() if k not in swaps})
            if rope is not None:
                check_rope(rope)
        except (AttributeError, ValueError) as error:
            raise ValueError(f"the stage at step {step} does not fit: {error}") from error
        return cls(step, attention, options, rope)

    def __str__(self) -> str:
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        rope = "" if self.rope is None else f", rope={dict(self.rope)}"
        return f"{self.attention}{options}{rope}"


class AttentionSchedule(Patching):
    """Patches models as PatchAttention does, and changes the options at given optimizer steps.

        AttentionSchedule({
            0: {"attention": "flash", "sliding_window": 1024, "dropout": 0.1},
            1000: {"attention": "flash", "rope": {"rope_type": "yarn", "factor": 4.0}},
            2000: {"attention": "dual_chunk", "chunk_size": 8192},
        })

    The optimizer step alone decides the stage, so a resumed run gives the same bits as an
    uninterrupted one. Before training, every stage is applied to the models once, so that errors
    appear early. Each change of stage is logged. The metric `attention/stage`, logged at logging
    steps, is the first step of the current stage. A schedule with `models` has a state and a metric
    of its own, such as `attention/stage/policy.model`. Validation, test and prediction use the
    run's current stage, or the stage that a checkpoint stores; otherwise they use the first stage.

    Checkpoints, and the model after the run, keep the original config. If the last stage changes
    RoPE, update `model.config.rope_parameters` with `final_rope` before you export the model.

    Args:
        stages: Mapping from the first optimizer step of a stage to the stage. A stage is a mapping
            with `attention` and its options, as in `lctrain.patch_model`, and `rope`, entries to
            change in the config's `rope_parameters`. One stage must start at step 0.
        models: Attribute paths of the models to patch; None for all models.

    Attributes:
        stages: The stages, in the order of their first steps.
        stage: The current stage.

    Raises:
        ValueError: if a stage is not valid. In the run, before data are prepared: if a model cannot
            be patched for one of the stages.
    """

    def __init__(self, stages: dict[int, dict[str, Any]], *, models: Paths = None) -> None:
        super().__init__(models)
        if not isinstance(stages, Mapping) or 0 not in stages:
            got = sorted(stages) if isinstance(stages, Mapping) else type(stages).__name__
            raise ValueError(
                f"stages must be a mapping with a stage at step 0, got {got}. Add "
                "0: {'attention': 'flash'}."
            )
        read = [AttentionStage.read(step, what) for step, what in stages.items()]
        self.stages = tuple(sorted(read, key=lambda stage: stage.step))
        self.stage = self.stages[0]
        self._ropes: list[RopeSwap] = []

    @property
    def final_rope(self) -> dict[str, Any] | None:
        """Entries that the last stage changes in `rope_parameters`; None if it changes none."""
        rope = self.stages[-1].rope
        return None if rope is None else dict(rope)

    def stage_at(self, step: int) -> AttentionStage:
        """Returns the stage of an optimizer step."""
        return [stage for stage in self.stages if stage.step <= step][-1]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Enters the stage of the optimizer step at which the run starts or resumes."""
        self._enter(self.stage_at(trainer.global_step))

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Changes the attention if a new stage begins at this optimizer step."""
        stage = self.stage_at(trainer.global_step)
        if stage is not self.stage:
            self._enter(stage)
            if Topology.of(trainer).is_first:
                say(f"Attention from step {trainer.global_step} on: {stage}\n{self.patches!r}")

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Logs the first step of the current stage, at logging steps."""
        if at_log_step(trainer):
            name = "/".join(["attention/stage", *self._paths])
            pl_module.log(name, float(self.stage.step), batch_size=1)

    @property
    def state_key(self) -> str:
        """Key of the callback's state in a checkpoint; it contains the paths of the models."""
        if not self._paths:
            return super().state_key
        return self._generate_state_key(models=self._paths)

    @property
    def _paths(self) -> list[str]:
        return [self.models] if isinstance(self.models, str) else list(self.models or ())

    def state_dict(self) -> dict[str, Any]:
        """Returns the first step of the current stage, for the checkpoint to restore the stage."""
        return {"stage": self.stage.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Enters the stage that a checkpoint stores."""
        self._enter(self.stage_at(state_dict["stage"]))

    def release(self) -> None:
        """Restores the models, their rotary embeddings, and the module's `configure_model`."""
        self._restore_rope()
        super().release()

    def _enter(self, stage: AttentionStage) -> None:
        if stage is self.stage:
            return
        self.stage = stage
        models = {path: handle.model for path, handle in self.patches.handles.items()}
        self._restore_rope()
        self.patches.unpatch()
        self.patches.handles = {path: self._apply(stage, model) for path, model in models.items()}

    def _patch_one(self, model: Any) -> PatchHandle:
        """Applies every stage to the model once, to find errors, then applies the current stage."""
        for stage in self.stages:
            try:
                handle = self._apply(stage, model)
            except ValueError as error:
                raise ValueError(f"the stage at step {stage.step} does not fit: {error}") from error
            handle.unpatch()
            if stage.rope is not None:
                self._ropes.pop().restore()
        return self._apply(self.stage, model)

    def _apply(self, stage: AttentionStage, model: Any) -> PatchHandle:
        handle = patch_model(model, stage.attention, **stage.options)
        if stage.rope is not None:
            try:
                self._ropes.append(RopeSwap(model, stage.rope))
            except ValueError:
                handle.unpatch()
                raise
        return handle

    def _restore_rope(self) -> None:
        for rope in reversed(self._ropes):
            rope.restore()
        self._ropes = []
