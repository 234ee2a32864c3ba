"""The settings of the command lctrain-train."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lctrain.config.adapter import AdapterConfig
from lctrain.config.attention import AttentionConfig
from lctrain.config.data import DataConfig
from lctrain.config.evaluation import EvaluationConfig
from lctrain.config.memory import MemoryConfig, check_tiles
from lctrain.config.model import ModelConfig, PretrainedModelConfig
from lctrain.config.optim import HOST_ADAMW, OptimConfig
from lctrain.config.paths import PathsConfig, expand_paths
from lctrain.config.schema import MISSING
from lctrain.config.trainer import TrainerConfig
from lctrain.limits import TASKS, check_seed, check_shared_task, check_warmup, require
from lctrain.local_paths import check_run_name


@dataclass(frozen=True)
class TrainConfig:
    """Settings of `lctrain-train`, which trains a model.

    Attributes:
        name: Name of the run; part of the name of its folder.
        task: "causal" trains a model to predict the next token, "mlm" an encoder to predict masked
            tokens.
        seed: Seed of the initial weights, dropout and the order of the data.
        data: Source of the documents, and how they are packed.
        model: The model to train.
        adapter: Adapters that are trained instead of the model's weights; None trains the weights.
        attention: Attention that replaces the model's own; None replaces nothing.
        memory: Memory policy: which activations the layers keep, offload or recompute.
        optim: Optimizer and learning-rate schedule.
        trainer: Hardware, length of the run and gradient accumulation.
        callbacks: Callbacks by name, each with a `_target_`; null switches one off.
        logger: Loggers by name, each with a `_target_`.
        paths: Folders of the run.
        evaluation: Evaluation at the end of the run.
        ckpt_path: Checkpoint to resume from: a path, or "last" for the newest checkpoint of this
            run. The run continues in the checkpoint's folder, unless another folder is set.
        export: Whether to save the trained model in the format of transformers.
        show: Number of training documents to print, with the tokens to train on in colour, instead
            of training. 0 trains.
    """

    name: str = "default"
    task: str = "causal"
    seed: int = 0
    data: DataConfig = MISSING
    model: ModelConfig = MISSING
    adapter: AdapterConfig | None = None
    attention: AttentionConfig | None = None
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    optim: OptimConfig = MISSING
    trainer: TrainerConfig = MISSING
    callbacks: dict[str, Any] = field(default_factory=dict)
    logger: dict[str, Any] = field(default_factory=dict)
    paths: PathsConfig = MISSING
    evaluation: EvaluationConfig = MISSING
    ckpt_path: str | None = None
    export: bool = True
    show: int = 0

    def __post_init__(self) -> None:
        check_run_name(self.name)
        check_seed(self.seed)
        check_seed(self.data.seed, "data.seed")
        require(
            not getattr(self.data, "endless", False) or self.trainer.max_steps > 0,
            f"trainer.max_steps must be set for a stream without an end, got "
            f"{self.trainer.max_steps}. It has no epochs that could be counted.",
        )
        require(
            self.adapter is None or isinstance(self.model, PretrainedModelConfig),
            "adapter must be none for a model with random weights, whose frozen weights would stay "
            "random, got adapters. Choose model=hf and model.name_or_path, or leave adapter out.",
        )
        require(
            self.show >= 0,
            f"show must be at least 0, got {self.show}. It is a number of documents; 0 trains.",
        )
        require(
            self.task in TASKS,
            f"task must be one of {', '.join(TASKS)}, got {self.task!r}. mlm trains an encoder.",
        )
        if self.task != "causal":
            check_shared_task(self.trainer.context_parallel, f"task={self.task}")
        self._check_masked() if self.task == "mlm" else self._check_causal()
        is_sharded = self.trainer.strategy == "fsdp2"
        check_tiles(self.memory, self.trainer.precision, is_sharded=is_sharded)
        require(
            self.trainer.context_parallel == 1 or self.attention is not None,
            "attention must be flash, dual_chunk or differential with trainer.context_parallel="
            f"{self.trainer.context_parallel}, got none: the model's own attention sees one rank's "
            "tokens only. Choose attention=flash.",
        )
        if is_sharded:
            quantize = None if self.adapter is None else self.adapter.quantize
            require(
                quantize is None,
                f"adapter.quantize must be null with trainer.strategy=fsdp2, got {quantize}: "
                "shards of packed weights would lose their scales. Leave it out, so that the "
                "frozen weights are divided in bfloat16, or use trainer.strategy=ddp.",
            )
            require(
                not self.optim.matrices_only,
                "optim.matrices_only must be false with trainer.strategy=fsdp2, which divides the "
                "matrices, got true. Use optim=adamw, or trainer.strategy=ddp.",
            )
            require(
                self.optim._target_ != HOST_ADAMW,
                "optim must not be adamw_host with trainer.strategy=fsdp2, which divides the "
                "weights that it updates as a whole, got adamw_host. Use optim=adamw, or "
                "trainer.strategy=ddp.",
            )
        check_warmup(self.optim.warmup_steps, self.trainer.max_steps)
        expand_paths(self, "", "ckpt_path")

    def _check_causal(self) -> None:
        """Raises ValueError if a setting belongs to masked language models only."""
        require(
            self.data.mask_fraction is None,
            f"data.mask_fraction must be null with task=causal, got {self.data.mask_fraction}. Set "
            "task=mlm to predict masked tokens.",
        )

    def _check_masked(self) -> None:
        """Raises ValueError if a setting does not fit masked language models."""
        attention = getattr(self.attention, "name", "flash")
        unfit: dict[str, Any] = {
            "attention must be flash or none": None if attention == "flash" else attention,
            "evaluation.methods must be empty": self.evaluation.methods,
            "evaluation.passkey_lengths must be empty": self.evaluation.passkey_lengths,
            "data.passkey_fraction must be 0": self.data.passkey_fraction,
            "data must not be conversations": "data=chat" if any(_conversations(self.data)) else "",
        }
        for name, callback in self.callbacks.items():
            target = (getattr(callback, "_target_", None) or "").rpartition(".")[2]
            causal = target in ("LengthPerplexity", "LongContextEval")
            unfit[f"callbacks.{name} must be null"] = target if causal else ""
        for rule, value in unfit.items():
            remedy = "Leave it at its default, or set task=causal."
            require(not value, f"{rule} with task=mlm, got {value}. {remedy}")


def _conversations(data: DataConfig) -> list[bool]:
    """Returns for the data, every source of a mix and every held-out set if it is conversations."""
    given = [data, *(getattr(data, "sources", None) or []), *(data.held_out_sets or {}).values()]
    return [
        one.get("kind") == "chat" if isinstance(one, Mapping) else hasattr(one, "train_on")
        for one in given
    ]
