"""LongContextModule: a LightningModule that trains any causal LM on packed batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from lctrain.attention import is_patched
from lctrain.batch import IGNORE_INDEX, PackedBatch
from lctrain.config import AttentionConfig, MemoryConfig, OptimConfig
from lctrain.config.memory import check_tiles
from lctrain.data.own_tokenizer import require_own_tokenizer
from lctrain.data.resume import resume_order
from lctrain.distributed import Topology
from lctrain.distributed.sharding import built_to_be_sharded, through_root, whole_value
from lctrain.distributed.strategy import ShardedStrategy, check_strategy
from lctrain.dropout_seed import seed_micro_batch
from lctrain.log_steps import at_log_step
from lctrain.loss.held_out import HeldOutLoss
from lctrain.loss.task import task_of
from lctrain.loss.token_window import TokenWindow
from lctrain.memory.policy import apply_config
from lctrain.micro_batches import most_scheduled
from lctrain.models import patch_model
from lctrain.models.adapters import inside_adapters
from lctrain.models.from_config import model_from, vocab_size_of
from lctrain.models.low_rank import (
    has_reloaded_base,
    leave_casts_to_autocast,
    restore_casts,
)
from lctrain.models.mismatch import reasons
from lctrain.module_state import restore_module, save_module
from lctrain.optim import build_optimizer, build_scheduler, follow_schedule
from lctrain.optimizers import check_optimizer
from lctrain.options import as_dataclass

ModelFactory = Callable[[pl.LightningDataModule], nn.Module]
ModelSource = nn.Module | str | dict[str, Any] | ModelFactory


class LongContextModule(pl.LightningModule):
    """A LightningModule that holds a causal LM, its loss on packs, its optimizer and its schedule.

    The loss of an optimizer step is (sum of the token losses) / (number of valid tokens), over the
    micro-batches of the step and all ranks, so every token has the same weight. Each micro-batch
    back-propagates its summed loss. After the last micro-batch of the step, the gradients are
    divided once by the number of tokens, before any hook, the clipping or the optimizer reads them.
    This takes one small all-reduce per step and no synchronisation with the device.

    A resumed run draws the same dropout masks as an uninterrupted one: torch's generators are
    seeded before every micro-batch from (seed, rank, index of the micro-batch).

    A checkpoint holds the arguments of the module, so `load_from_checkpoint(path)` needs no others.
    Exceptions are models with PEFT adapters or other wrappers, and models that are not from
    transformers.

    Args:
        model: The causal LM, in one of four forms: a module, which may have PEFT adapters; the name
            or path of a pretrained model; a transformers configuration as a mapping with
            `model_type`; or a function that builds the model from the trainer's data module. In the
            last three forms, every rank builds the model after the data are prepared, since the
            vocabulary size may depend on the data.
        optim: Options of optimizer and schedule: an OptimConfig, or a mapping of its fields; None
            takes the defaults.
        attention: Options for patching the model's attention: an AttentionConfig, or a mapping of
            its fields. None leaves the model unpatched. A model that is patched already keeps its
            patch.
        seed: Seed of the model's initialisation and of dropout.
        memory: Memory policy: which activations the layers keep, offload or recompute. A
            MemoryConfig, or a mapping of its fields. None leaves the model as it is.
        task: "causal", or "mlm" for a masked language model on packs of `lctrain.data.MaskTokens`.

    Attributes:
        model: The causal LM; None until `configure_model` has built it.
        first_loss: Training loss per token of the first optimizer step, 0-dim float64 tensor; None
            before that step.
        last_loss: Training loss per token of the last optimizer step, 0-dim float64 tensor; None
            before the first.
        gradient_norm: Gradient norm before clipping, 0-dim float32 tensor; None without clipping.
        held_out_losses: Pairs (optimizer step, held-out loss per token), one per validation.
        held_out_set_losses: The same pairs for each held-out set, by the set's name, if there are
            several sets.
        converts_progress: True: this module converts a checkpoint's batch counts if a run resumes
            with other numbers of ranks and accumulated packs. PackedDataModule reads it.
    """

    converts_progress = True

    def __init__(
        self,
        model: ModelSource,
        optim: OptimConfig | dict[str, Any] | None = None,
        attention: AttentionConfig | dict[str, Any] | None = AttentionConfig(),  # noqa: B008
        seed: int = 0,
        memory: MemoryConfig | dict[str, Any] | None = None,
        task: str = "causal",
    ) -> None:
        super().__init__()
        if not (isinstance(model, (nn.Module, str, Mapping)) or callable(model)):
            raise ValueError(
                "model must be a module, a name, a mapping with model_type or a function, got "
                f"{type(model).__name__}. Pass for example a LlamaForCausalLM."
            )
        self.model: Any = model if isinstance(model, nn.Module) else None
        self._source: Any = None if isinstance(model, nn.Module) else model
        self.optim = as_dataclass("optim", OptimConfig, {} if optim is None else optim)
        check_optimizer(self.optim)
        self.attention = (
            None if attention is None else as_dataclass("attention", AttentionConfig, attention)
        )
        self.memory = None if memory is None else as_dataclass("memory", MemoryConfig, memory)
        self.seed = seed
        self.task, self._losses = task, task_of(task)
        self.memory_handle: Any = None
        self._has_policy = False  # whether a memory policy was applied
        self.patch_handle: Any = None
        self._uncast: list[Any] = []  # layers whose inputs autocast casts, instead of peft
        self.first_loss: Tensor | None = None
        self.last_loss: Tensor | None = None
        self.gradient_norm: Tensor | None = None
        self.held_out_losses: list[tuple[int, float]] = []
        self._window = TokenWindow()
        self._learning_rate = 0.0
        self.held_out_set_losses: dict[str, list[tuple[int, float]]] = {}
        self._held_out = HeldOutLoss()

    def setup(self, stage: str) -> None:
        """Checks the trainer's precision and strategy.

        Raises:
            ValueError: if the precision is float16, in which a loss summed over a long pack
                overflows; or if the strategy does not support this module or its memory policy.
        """
        if str(self.trainer.precision).startswith(("16", "transformer-engine-float16")):
            raise ValueError(
                f"trainer.precision must be 32-true, bf16-mixed or bf16-true, got "
                f"{self.trainer.precision!r}. A loss summed over a long pack overflows float16; "
                "use bf16-mixed."
            )
        is_sharded = isinstance(self.trainer.strategy, ShardedStrategy)
        check_tiles(self.memory, str(self.trainer.precision), is_sharded=is_sharded)
        check_strategy(self.trainer.strategy, self.task)

    def configure_model(self) -> None:
        """Builds the model if needed, patches it, applies its memory policy, and shards it.

        With ShardedStrategy no rank needs the memory of the whole model if it is pretrained and its
        weights are safetensors. Otherwise rank 0 does, on the CPU.
        """
        if self.model is None:
            torch.manual_seed(self.seed)
            ranks = Topology.of(self._trainer)
            with ExitStack() as stack:
                if ranks.is_sharded:  # a rank that goes on alone waits for parameters of rank 0
                    stack.enter_context(ranks.failing_together())
                    stack.enter_context(built_to_be_sharded(ranks.is_first))
                self.model = self._build()
        if self.patch_handle is None and self.attention is not None and not is_patched(self.model):
            self.patch_handle = patch_model(
                inside_adapters(self.model),
                attention=self.attention.name,
                fused=self.attention.fused,
                **self.attention.options(),
            )
        if self.memory is not None and not self._has_policy:
            self._has_policy = True
            self.memory_handle = apply_config(self.model, self.memory, **self._memory_facts())
        self.model.train()
        strategy = None if self._trainer is None else self.trainer.strategy
        if isinstance(strategy, ShardedStrategy):
            strategy.shard(self.model)

    def _memory_facts(self) -> dict[str, Any]:
        """Returns what the trainer knows and the memory plan needs: precision, device and ranks."""
        optimizer = {"optimizer": self.optim._target_}
        if self._trainer is None:
            return optimizer
        facts = {
            **optimizer,
            "tokens": getattr(getattr(self.trainer, "datamodule", None), "max_tokens", None),
            "precision": self._precision(),
            "device": self.trainer.strategy.root_device,
            "ranks": self.trainer.num_devices,
            "micro_batches": self._micro_batches(),
        }
        ranks = Topology.of(self.trainer)
        return facts | ({"shards": ranks.shards, "least": ranks.least} if ranks.is_sharded else {})

    def _micro_batches(self) -> int:
        """Returns the most micro-batches of an optimizer step; by hand, at least 2."""
        least = 1 if self.automatic_optimization else 2
        scheduled = most_scheduled(self.trainer.callbacks)  # type: ignore[attr-defined]
        return max(least, scheduled, self.trainer.accumulate_grad_batches)

    def _precision(self) -> str:
        mixed = self._trainer is not None and self.trainer.precision == "bf16-mixed"
        return "bf16-mixed" if mixed else "true"

    @property
    def pretrained_name(self) -> str | None:
        """Name or path of the pretrained model that is still to be loaded; None for others."""
        return self._source if self.model is None and isinstance(self._source, str) else None

    def _build(self) -> nn.Module:
        datamodule = None if self._trainer is None else getattr(self.trainer, "datamodule", None)
        if isinstance(self._source, (str, Mapping)):
            return model_from(self._source, vocab_size_of(datamodule), self.task)
        model: nn.Module = self._source(datamodule)
        if getattr(datamodule, "trains_tokenizer", False):
            require_own_tokenizer(model)
        return model

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Returns the optimizer and a learning-rate schedule that advances once per optimizer step.

        Raises:
            ValueError: if the length of the run is unknown.
        """
        total_steps = self.trainer.estimated_stepping_batches
        if total_steps == float("inf"):
            raise ValueError(
                "trainer.max_steps must be set for a stream of unknown length, got none. The "
                "learning-rate schedule needs the length of the run."
            )
        if self.optim.matrices_only and Topology.of(self.trainer).is_sharded:
            raise ValueError(
                "optim.matrices_only must be false with trainer.strategy=fsdp2, got true. It "
                "updates whole matrices: use optim=adamw, or trainer.strategy=ddp."
            )
        optimizer = build_optimizer(self.model, self.optim)
        # Without training batches Lightning estimates -1 steps.
        scheduler = build_scheduler(optimizer, self.optim, max(int(total_steps), 0))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def on_train_start(self) -> None:
        """Prepares the model for bf16 autocast, and a resumed run for its schedule and its data.

        After a resume, the learning rates become those of this run's schedule at the restored step,
        and the data continue at the first row that the saved run did not train on.
        """
        if self._precision() == "bf16-mixed":
            self._uncast = leave_casts_to_autocast(self.model)
        resume_order(self.trainer)
        for config in self.trainer.lr_scheduler_configs:
            if isinstance(config.scheduler, LambdaLR):
                follow_schedule(config.scheduler)

    def on_train_end(self) -> None:
        """Lets adapters cast their inputs again, for a model that is used without autocast."""
        restore_casts(self._uncast)

    def on_train_batch_start(self, batch: PackedBatch, batch_idx: int) -> None:
        """Seeds dropout from (seed, rank, index of the micro-batch), and frees old gradients.

        Lightning frees those of the last step after the first forward of the next one. A plan of
        memory counts on their room. A module with manual optimization frees its gradients itself.
        """
        seed_micro_batch(self.trainer, self.seed)
        first = batch_idx % self.trainer.accumulate_grad_batches == 0
        if self.automatic_optimization and first:
            for optimizer in self.trainer.optimizers:
                self.optimizer_zero_grad(self.current_epoch, batch_idx, optimizer)

    def training_step(self, batch: PackedBatch, batch_idx: int) -> Tensor:
        """Returns the summed loss of one micro-batch, 0-dim float32."""
        loss_sum, _ = through_root(self.trainer, self._losses.pack_loss, self.model, batch)
        self._window.add(loss_sum, batch.num_valid_tokens)
        return loss_sum

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Back-propagates the summed loss of a micro-batch.

        After the last micro-batch of an optimizer step, divides the gradients by the tokens of the
        step.
        """
        loss.backward(*args, **kwargs)
        if not self.trainer.fit_loop._should_accumulate():
            ranks = Topology.of(self.trainer)
            averaged = self.trainer.accumulate_grad_batches * ranks.size
            self._window.close(self.parameters(), averaged, ranks)
            self.last_loss = self._window.last_loss
            if self.first_loss is None:
                self.first_loss = self.last_loss

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips gradients as Lightning does, and keeps their norm in `gradient_norm`.

        Unlike Lightning, it also clips for fused optimizers under mixed precision.
        """
        self._learning_rate = float(optimizer.param_groups[0]["lr"])
        if gradient_clip_val is None or gradient_clip_val <= 0:
            return
        # Lightning sums the norm in the optimizer's order of parameters. Another order would round
        # differently.
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if gradient_clip_algorithm == "value":
            nn.utils.clip_grad_value_(parameters, gradient_clip_val)
        else:
            self.gradient_norm = whole_value(
                nn.utils.clip_grad_norm_(parameters, gradient_clip_val)
            )

    def on_train_batch_end(self, outputs: Any, batch: PackedBatch, batch_idx: int) -> None:
        """Logs the step's loss, its gradient norm and learning rate, at logging steps."""
        if not at_log_step(self.trainer):
            return
        assert self.last_loss is not None
        self.log("train/loss", self.last_loss.float())
        self.log("train/learning_rate", self._learning_rate)
        if self.gradient_norm is not None:
            self.log("train/gradient_norm", self.gradient_norm)

    def on_validation_epoch_start(self) -> None:
        """Sets the sums of the held-out losses to 0."""
        self._held_out = HeldOutLoss()

    def validation_step(self, batch: PackedBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Adds the loss of one held-out pack to the sum of its set."""
        self._add_held_out(batch, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        """Logs `val/loss`, the mean over the held-out tokens of all ranks, and `val/perplexity`.

        With several held-out sets, it also logs `val/NAME/loss` and `val/NAME/perplexity` of each.
        """
        losses = self._held_out.log(self, "val")
        if not self.trainer.sanity_checking:
            self.held_out_losses.append((self.global_step, losses.pop("")))
            for name, loss in losses.items():
                self.held_out_set_losses.setdefault(name, []).append((self.global_step, loss))

    def on_test_epoch_start(self) -> None:
        """Sets the sums of the test losses to 0."""
        self._held_out = HeldOutLoss()

    def test_step(self, batch: PackedBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Adds the loss of one pack of test data to the sum of its set."""
        self._add_held_out(batch, dataloader_idx)

    def on_test_epoch_end(self) -> None:
        """Logs `test/loss`, the mean over the test tokens of all ranks, and `test/perplexity`."""
        self._held_out.log(self, "test")

    def predict_step(self, batch: PackedBatch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Returns the loss at every position of a pack, [T] float32 on the CPU.

        Entry t is -log p of the token after position t in the same document; 0 where position t has
        no target. Ranks that share a pack all return the losses of the whole pack.
        """
        labels = batch.labels.flatten()
        positions = (labels != IGNORE_INDEX).nonzero().flatten()
        losses = through_root(
            self._trainer,
            self._losses.losses,
            self.model,
            batch.model_kwargs(),
            positions,
            labels[positions],
        )
        scores = torch.zeros(len(labels), dtype=torch.float32, device=labels.device)
        scores = scores.index_copy(0, positions, losses.float())
        return (scores if batch.share is None else batch.share.gather(scores)).cpu()

    def _add_held_out(self, batch: PackedBatch, number: int) -> None:
        """Adds the loss of a batch to the sum of a held-out set."""
        loss_sum, _ = through_root(self.trainer, self._losses.pack_loss, self.model, batch)
        self._held_out.add(number, loss_sum, batch.num_valid_tokens)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Stores the module's arguments, its optimizer options, and the losses for the report.

        The losses are `first_loss` and `held_out_losses`. If lctrain has added adapters to a
        pretrained model, the checkpoint holds only the adapters' weights.
        """
        save_module(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores `first_loss` and `held_out_losses`, and compares the run with its checkpoint.

        Warns if the checkpoint has already taken all steps of the run.

        Raises:
            ValueError: if training resumes with changed optimizer options, which the restored
                optimizer would ignore, or with fewer steps than the checkpoint has taken.
        """
        restore_module(self, checkpoint)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Loads weights as torch does.

        Raises:
            ValueError: if names or shapes differ from the model's; the message names them.
        """
        if has_reloaded_base(self.model) and not state_dict:
            return super().load_state_dict({}, strict=False)
        try:
            return super().load_state_dict(state_dict, *args, **kwargs)
        except RuntimeError as error:
            raise ValueError(
                f"checkpoint must hold the weights of this model, got others: {reasons(error)}. "
                "Use a checkpoint of this model, or build the model that the checkpoint is of."
            ) from error
