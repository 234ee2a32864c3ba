"""LongContextModule: trains any causal LM on packed batches, every token with the same weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from lctrain.attention import is_patched
from lctrain.batch import IGNORE_INDEX, PackedBatch
from lctrain.config import AttentionConfig, OptimConfig
from lctrain.data.resume import resume_order
from lctrain.dropout_seed import seed_micro_batch
from lctrain.log_steps import at_log_step
from lctrain.loss import causal_lm_loss
from lctrain.loss.causal_lm import token_losses
from lctrain.loss.token_window import TokenWindow
from lctrain.models import patch_model
from lctrain.models.adapters import inside_adapters
from lctrain.models.from_config import describe, model_from
from lctrain.optim import build_optimizer, build_scheduler, follow_schedule

ModelFactory = Callable[[pl.LightningDataModule], nn.Module]
ModelSource = nn.Module | str | dict[str, Any] | ModelFactory

STATE_KEY = "lctrain"  # in the checkpoint
HYPER_PARAMETERS = pl.LightningModule.CHECKPOINT_HYPER_PARAMS_KEY  # from them Lightning builds it


class LongContextModule(pl.LightningModule):
    """A causal LM, its packed loss, its optimizer and its schedule.

    The loss of an optimizer step is (sum of the token losses) / (number of valid tokens), over all
    micro-batches of the accumulation window and over all ranks. To that end every micro-batch
    back-propagates its loss *sum*; when the window closes, the gradients are multiplied once by
    1 / (tokens of the window), before any hook, the clipping or the optimizer sees them. The token
    counts live on the CPU, and one small all-reduce per window joins the ranks: no host sync.

    Dropout is reproducible across interruptions: torch's generators are seeded before every
    micro-batch from (seed, rank, index of the micro-batch), so a resumed run draws the same masks,
    whatever else has drawn random numbers in between.

    A checkpoint holds what builds the module: `load_from_checkpoint(path)` needs nothing else,
    unless the model is wrapped or not of transformers.

    Args:
        model: A causal LM, also inside PEFT's adapters; or the name or path of a pretrained one; or
            its transformers configuration as a mapping with `model_type`; or a function that builds
            the model from the trainer's data module. All but the first are built on every rank once
            the data are ready: a vocabulary size may depend on them.
        optim: Optimizer and schedule; a mapping holds the fields of OptimConfig.
        attention: Options for patching the model's attention; None leaves the model unchanged. A
            model that is already patched is not changed either. A mapping holds the fields of
            AttentionConfig.
        seed: Seeds the model's initialisation and dropout.

    Attributes:
        model: The causal LM; None until the trainer has built it, if `model` is a function.
        first_loss: Training loss of the first optimizer step, 0-dim float64 tensor, or None.
        last_loss: The same of the newest closed window.
        gradient_norm: Norm before clipping, 0-dim float32 tensor; None without clipping.
        held_out_losses: [(optimizer step, held-out loss)] of every validation so far.
    """

    def __init__(
        self,
        model: ModelSource,
        optim: OptimConfig | dict[str, Any] | None = None,
        attention: AttentionConfig | dict[str, Any] | None = AttentionConfig(),  # noqa: B008
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not (isinstance(model, (nn.Module, str, Mapping)) or callable(model)):
            raise ValueError(
                "model must be a module, a name, a mapping with model_type or a function, got "
                f"{type(model).__name__}. Pass for example a LlamaForCausalLM."
            )
        self.model: Any = model if isinstance(model, nn.Module) else None
        self._source: Any = None if isinstance(model, nn.Module) else model
        self.optim = _as_dataclass("optim", OptimConfig, {} if optim is None else optim)
        self.attention = (
            None if attention is None else _as_dataclass("attention", AttentionConfig, attention)
        )
        self.seed = seed
        self.patch_handle: Any = None
        self.first_loss: Tensor | None = None
        self.last_loss: Tensor | None = None
        self.gradient_norm: Tensor | None = None
        self.held_out_losses: list[tuple[int, float]] = []
        self._window = TokenWindow()
        self._learning_rate = 0.0
        self._held_out_sum: Tensor | None = None
        self._held_out_tokens = 0

    def setup(self, stage: str) -> None:
        """Raises for precisions in which a sum over a long pack overflows."""
        if str(self.trainer.precision).startswith(("16", "transformer-engine-float16")):
            raise ValueError(
                f"trainer.precision must be 32-true, bf16-mixed or bf16-true, got "
                f"{self.trainer.precision!r}. A loss summed over a long pack overflows float16; "
                "use bf16-mixed."
            )

    def configure_model(self) -> None:
        """Builds the model if a function was given, and patches its attention, once."""
        if self.model is None:
            torch.manual_seed(self.seed)
            self.model = self._build()
        if self.patch_handle is None and self.attention is not None and not is_patched(self.model):
            self.patch_handle = patch_model(
                inside_adapters(self.model),
                attention=self.attention.name,
                fused=self.attention.fused,
                **self.attention.options(),
            )
        self.model.train()

    def _build(self) -> nn.Module:
        datamodule = None if self._trainer is None else getattr(self.trainer, "datamodule", None)
        if isinstance(self._source, (str, Mapping)):
            return model_from(self._source, _vocab_size(datamodule))
        model: nn.Module = self._source(datamodule)
        return model

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW with decay groups and the schedule, stepped once per optimizer step."""
        total_steps = self.trainer.estimated_stepping_batches
        if total_steps == float("inf"):
            raise ValueError(
                "trainer.max_steps must be set for a stream of unknown length, got none. The "
                "learning-rate schedule needs the length of the run."
            )
        optimizer = build_optimizer(self.model, self.optim)
        scheduler = build_scheduler(optimizer, self.optim, int(total_steps))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def on_train_start(self) -> None:
        """Applies the learning rates and the order of the data of this run, also after a resume."""
        resume_order(self.trainer)
        for config in self.trainer.lr_scheduler_configs:
            if isinstance(config.scheduler, LambdaLR):
                follow_schedule(config.scheduler)

    def on_train_batch_start(self, batch: PackedBatch, batch_idx: int) -> None:
        """Seeds dropout from (seed, rank, micro-batch): see the class."""
        seed_micro_batch(self.trainer, self.seed)

    def training_step(self, batch: PackedBatch, batch_idx: int) -> Tensor:
        """Returns the summed loss of one micro-batch, 0-dim float32."""
        loss_sum, _ = causal_lm_loss(self.model, batch)
        self._window.add(loss_sum, batch.num_valid_tokens)
        return loss_sum

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Back-propagates the sum; divides by the window's tokens when the window closes."""
        loss.backward(*args, **kwargs)
        if not self.trainer.fit_loop._should_accumulate():
            averaged = self.trainer.accumulate_grad_batches * self.trainer.world_size
            self._window.close(self.parameters(), averaged, self.trainer.world_size)
            self.last_loss = self._window.last_loss
            if self.first_loss is None:
                self.first_loss = self.last_loss

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips like Lightning, keeps the norm, and also clips for fused optimizers."""
        self._learning_rate = optimizer.param_groups[0]["lr"]
        if gradient_clip_val is None or gradient_clip_val <= 0:
            return
        # In the optimizer's order, as Lightning does: the norm has the same bits.
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if gradient_clip_algorithm == "value":
            nn.utils.clip_grad_value_(parameters, gradient_clip_val)
        else:
            self.gradient_norm = nn.utils.clip_grad_norm_(parameters, gradient_clip_val)

    def on_train_batch_end(self, outputs: Any, batch: PackedBatch, batch_idx: int) -> None:
        """Logs the window's loss, the gradient norm and the learning rate, at logging steps."""
        if not at_log_step(self.trainer):
            return
        assert self.last_loss is not None
        self.log("train/loss", self.last_loss.float())
        self.log("train/learning_rate", self._learning_rate)
        if self.gradient_norm is not None:
            self.log("train/gradient_norm", self.gradient_norm)

    def on_validation_epoch_start(self) -> None:
        """Starts a new sum of the held-out loss."""
        self._start_held_out()

    def validation_step(self, batch: PackedBatch, batch_idx: int) -> None:
        """Adds the loss of one held-out pack."""
        self._add_held_out(batch)

    def on_validation_epoch_end(self) -> None:
        """Logs held-out loss and perplexity: one mean over the tokens of all ranks."""
        loss = self._log_held_out("val")
        if not self.trainer.sanity_checking:
            self.held_out_losses.append((self.global_step, loss.item()))

    def on_test_epoch_start(self) -> None:
        """Starts a new sum of the held-out loss."""
        self._start_held_out()

    def test_step(self, batch: PackedBatch, batch_idx: int) -> None:
        """Adds one pack of the test data."""
        self._add_held_out(batch)

    def on_test_epoch_end(self) -> None:
        """Logs `test/loss` and `test/perplexity`, as validation does."""
        self._log_held_out("test")

    def predict_step(self, batch: PackedBatch, batch_idx: int) -> Tensor:
        """Returns the loss of every token: [T] float32 on the CPU, 0 where a token has no target.

        Position t holds -log p of the token that follows position t in its document.
        """
        labels = batch.labels.flatten()
        positions = (labels != IGNORE_INDEX).nonzero().flatten()
        losses = token_losses(self.model, batch.model_kwargs(), positions, labels[positions])
        scores = torch.zeros(len(labels), dtype=torch.float32, device=labels.device)
        return scores.index_copy(0, positions, losses.float()).cpu()

    def _start_held_out(self) -> None:
        self._held_out_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        self._held_out_tokens = 0

    def _add_held_out(self, batch: PackedBatch) -> None:
        assert self._held_out_sum is not None
        loss_sum, _ = causal_lm_loss(self.model, batch)
        self._held_out_sum += loss_sum
        self._held_out_tokens += batch.num_valid_tokens

    def _log_held_out(self, stage: str) -> Tensor:
        """Sums over the ranks, logs, and returns the loss per token, 0-dim float64."""
        assert self._held_out_sum is not None
        tokens = self._held_out_sum.new_full((), float(self._held_out_tokens))
        totals = torch.stack([self._held_out_sum, tokens])
        if self.trainer.world_size > 1:
            dist.all_reduce(totals)
        loss = totals[0] / totals[1].clamp(min=1.0)
        # Every rank has the same value, whose bits a maximum keeps. Without a reduction Lightning
        # would warn.
        same: dict[str, Any] = {"batch_size": 1, "sync_dist": True, "reduce_fx": "max"}
        self.log(f"{stage}/loss", loss.float(), prog_bar=True, **same)
        self.log(f"{stage}/perplexity", loss.exp().float(), **same)
        return loss

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Stores what builds the module, and the first losses of the run for its report."""
        description = describe(self.model)
        if description is not None:
            checkpoint[HYPER_PARAMETERS] = {
                "model": description,
                "optim": asdict(self.optim),
                "attention": None if self.attention is None else asdict(self.attention),
                "seed": self.seed,
            }
        checkpoint[STATE_KEY] = {
            "optim": asdict(self.optim),
            "first_loss": None if self.first_loss is None else self.first_loss.item(),
            "held_out_losses": list(self.held_out_losses),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores what `on_save_checkpoint` kept.

        Raises:
            ValueError: if training resumes with other optimizer options, which the restored
                optimizer would ignore; the message names them.
        """
        state = checkpoint.get(STATE_KEY)
        if state is None:
            return
        if self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING:
            check_same_options(self.optim, state.get("optim", {}))
        if state["first_loss"] is not None:
            self.first_loss = torch.tensor(state["first_loss"], dtype=torch.float64)
        self.held_out_losses = [tuple(pair) for pair in state["held_out_losses"]]


def check_same_options(now: OptimConfig, then: Mapping[str, Any]) -> None:
    """Raises ValueError naming the optimizer options that a resumed run has changed.

    Args:
        now: Options of this run.
        then: Options of the checkpoint, by name; options that are not in it are not compared.
    """
    values = asdict(now)
    changes = [
        f"optim.{name} was {value!r}, is {values[name]!r}"
        for name, value in then.items()
        if name in values and values[name] != value
    ]
    if changes:
        raise ValueError(
            "a resumed run must have the optimizer options of its checkpoint, got others: "
            f"{'; '.join(changes)}. Restore them, or start a new run without ckpt_path."
        )


def _as_dataclass(name: str, schema: type[Any], value: Any) -> Any:
    """Returns a frozen dataclass unchanged, or builds it from the mapping of its fields."""
    if isinstance(value, schema):
        return value
    if not isinstance(value, Mapping):
        raise ValueError(
            f"{name} must be a {schema.__name__} or a mapping of its fields, got "
            f"{type(value).__name__}. Pass {schema.__name__}(...)."
        )
    known = [field.name for field in fields(schema)]
    unknown = sorted(set(value) - set(known))
    if unknown:
        raise ValueError(
            f"{name} must have fields of {schema.__name__} ({', '.join(known)}), got "
            f"{', '.join(unknown)}. Check the spelling."
        )
    return schema(**value)


def _vocab_size(datamodule: Any) -> int | None:
    """Tokens of the data module's tokenizer, if it has one."""
    tokenizer = getattr(datamodule, "tokenizer", None)
    return None if tokenizer is None or isinstance(tokenizer, str) else len(tokenizer)
