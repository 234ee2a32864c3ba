"""AttentionSchedule: another attention, window, dropout or RoPE from a step of training on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl

from lctrain.attention import make_spec
from lctrain.callbacks.patching import Patching, say
from lctrain.log_steps import at_log_step
from lctrain.models.patch import PatchHandle, patch_model
from lctrain.models.rope import RopeSwap, check_rope
from lctrain.models.within import Paths


@dataclass(frozen=True)
class AttentionStage:
    """Attention of a model from one optimizer step on.

    Attributes:
        step: Optimizer step from which on it holds.
        attention: First argument of `lctrain.patch_model` after the model.
        options: Its other arguments.
        rope: Entries of the config's `rope_parameters` that differ, or None.
    """

    step: int
    attention: str = "flash"
    options: Mapping[str, Any] = field(default_factory=dict)
    rope: Mapping[str, Any] | None = None

    @classmethod
    def read(cls, step: Any, description: Any) -> AttentionStage:
        """Makes a stage of one entry of the schedule. Raises ValueError if it does not fit."""
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
            swaps = ("fused", "loss")
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
    """Patches the models as PatchAttention does, with other options from given optimizer steps on.

        AttentionSchedule({
            0: {"attention": "flash", "sliding_window": 1024, "dropout": 0.1},
            1000: {"attention": "flash", "rope": {"rope_type": "yarn", "factor": 4.0}},
            2000: {"attention": "dual_chunk", "chunk_size": 8192},
        })

    The stage is a function of the optimizer step, so a resumed run goes on in its stage, to the
    bit. Every stage is tried on the models before training. A change is logged; `attention/stage`,
    the step at which the stage began, is logged at logging steps. Validation, test and
    prediction use the newest stage of the run or of the checkpoint; without either the first.

    A checkpoint and the model after the run have the original config. If the last stage changes
    RoPE, set `model.config.rope_parameters` to what `final_rope` says before you export the model.

    Args:
        stages: A stage by its first optimizer step. A stage has `attention`, the options of
            `lctrain.patch_model` for it, and `rope`, entries of the config's `rope_parameters`.
            One stage must start at step 0.
        models: Attribute paths of the models; None for all.

    Attributes:
        stages: The stages, by rising step.
        stage: The current stage.

    Raises:
        ValueError: if a stage is wrong; before data are prepared as PatchAttention, for any stage.
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
        """Entries of `rope_parameters` that the last stage changes; None if it changes none."""
        rope = self.stages[-1].rope
        return None if rope is None else dict(rope)

    def stage_at(self, step: int) -> AttentionStage:
        """The stage of an optimizer step."""
        return [stage for stage in self.stages if stage.step <= step][-1]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Enters the stage of the step that the run starts or resumes at."""
        self._enter(self.stage_at(trainer.global_step))

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Changes the attention if the next optimizer step is in another stage."""
        stage = self.stage_at(trainer.global_step)
        if stage is not self.stage:
            self._enter(stage)
            if trainer.is_global_zero:
                say(f"Attention from step {trainer.global_step} on: {stage}\n{self.patches!r}")

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Logs the stage at logging steps."""
        if at_log_step(trainer):
            pl_module.log("attention/stage", float(self.stage.step), batch_size=1)

    def state_dict(self) -> dict[str, Any]:
        """Returns the first step of the stage, for a validation of the checkpoint."""
        return {"stage": self.stage.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Enters the stage of a checkpoint."""
        self._enter(self.stage_at(state_dict["stage"]))

    def release(self) -> None:
        """See Patching; rotary embeddings are given back as well."""
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
        """Tries every stage, then patches for the current one."""
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
