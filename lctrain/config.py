"""The schemas of every Hydra config group: frozen dataclasses, converted once at the entry point.

A key that a schema does not have, or a value of the wrong type, is an error that names it.
`lctrain.schemas` puts them into Hydra's ConfigStore as `<group>/<name>_schema`; the YAML files in
`configs/` build on them and fill in values. Library code receives the dataclasses, never a
DictConfig.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, TypeVar

from lctrain.config_errors import explain_config_error
from lctrain.limits import (
    SPECIAL_TOKENS,
    check_backend,
    check_data,
    check_lengths,
    check_loading,
    check_methods,
    check_model_sizes,
    check_seed,
    check_trainer,
    check_warmup,
    named,
)
from lctrain.limits import require as _require
from lctrain.local_paths import check_run_name, local_path

if TYPE_CHECKING:
    from omegaconf import DictConfig

Schema = TypeVar("Schema")

MISSING: Any = "???"  # OmegaConf's mark of a mandatory value
SCHEDULES = ("cosine", "linear", "constant", "warmup_stable_decay")
STRATEGIES = (
    "auto",
    "single_device",
    "ddp",
    "ddp_find_unused_parameters_false",
    "ddp_find_unused_parameters_true",
)


@dataclass(frozen=True)
class DataConfig:
    """How documents are tokenized and packed: see `lctrain.data.PackedDataModule`.

    What is read is added by the classes in `lctrain.schemas`, one for every source.

    Attributes:
        tokenizer: Name or path; None takes a pretrained model's own, and for a model from scratch
            trains a byte-level BPE on the training split, once.
        vocab_size: Size of the tokenizer, if it is trained.
        max_tokens: Capacity of a row.
        max_document_tokens: Tokens of a document in a row; None for all that a row has room for.
        overlong: split, truncate or drop longer documents.
        packing_window: Documents packed at a time.
        balance_window: Steps within which ranks get rows of similar attention work.
        held_out_fraction: Share of the documents to hold out.
        passkey_fraction: Share of every training row that teaches retrieval.
        num_workers: Processes that build batches.
        num_proc: Processes that tokenize; None for one, in which fast tokenizers use all cores.
        seed: Seed of the shuffle.
        cache_dir: Where documents, tokens and the tokenizer are kept.
        special_tokens: What the text of a special token inside a document becomes: text, or the
            token, for documents that are trusted.
    """

    tokenizer: str | None = None
    vocab_size: int = 8192
    max_tokens: int = 4096
    max_document_tokens: int | None = None
    overlong: str = "split"
    packing_window: int = 100_000
    balance_window: int = 256
    held_out_fraction: float = 0.05
    passkey_fraction: float = 0.0
    num_workers: int = 0
    num_proc: int | None = None
    seed: int = 0
    cache_dir: str | None = None
    special_tokens: str = "text"

    def __post_init__(self) -> None:
        _local(self, "data.", "cache_dir")
        check_data(self, "data.")
        check_loading(self, "data.")
        _require(
            self.special_tokens in SPECIAL_TOKENS,
            f"data.special_tokens must be one of {', '.join(SPECIAL_TOKENS)}, got "
            f"{self.special_tokens!r}. text reads them as other text.",
        )
        check_source = getattr(super(), "__post_init__", None)  # the schemas add a source
        if check_source is not None:
            with named("data."):
                check_source()


@dataclass(frozen=True)
class ModelConfig:
    """What every model has. Choose `ScratchModelConfig` or `PretrainedModelConfig`.

    Attributes:
        gradient_checkpointing: Recompute activations in the backward pass.
    """

    gradient_checkpointing: bool = False


@dataclass(frozen=True)
class ScratchModelConfig(ModelConfig):
    """A transformers causal LM with random weights.

    Attributes:
        model_type: Name of the family in transformers, such as "llama" or "qwen3".
        config: Arguments of its configuration class. `vocab_size` is taken from the tokenizer
            unless it is given here.
        differential: 2 makes every head a pair of differential attention, version 2, as
            `lctrain.models.differential.to_differential` does: num_attention_heads is doubled.
            Version 1 is a family, model_type "diffllama".
    """

    model_type: str = MISSING
    config: dict[str, Any] = field(default_factory=dict)
    differential: int | None = None

    def __post_init__(self) -> None:
        _require(
            self.differential in (None, 2),
            f"model.differential must be 2 or null, got {self.differential}. Version 1 is "
            "model=diff_llama.",
        )
        check_model_sizes(self.config)


@dataclass(frozen=True)
class PretrainedModelConfig(ModelConfig):
    """A transformers causal LM with trained weights.

    Attributes:
        name_or_path: Name on the Hugging Face hub, or a folder.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Run the code of model and tokenizer from the hub or the folder.
        allow_other_tokenizer: Take a data.tokenizer whose ids mean other tokens than the model's
            own. What the model knows of its tokens is then lost.
    """

    name_or_path: str = MISSING
    revision: str | None = None
    trust_remote_code: bool = False
    allow_other_tokenizer: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "name_or_path", os.path.expanduser(self.name_or_path))


@dataclass(frozen=True)
class AttentionConfig:
    """How the model's attention is patched.

    Attributes:
        name: First argument of `lctrain.patch_model` after the model.
        dropout: Attention dropout in training; None takes the model's own.
        deterministic: Ask for a backward that gives the same bits in every run.
        backend: Which kernels serve, as in `lctrain.kernels`; a named one never falls back.
        fused: In training, also swap norms, rotary embeddings, MLPs and residual additions.
        sliding_window: Keys that a query sees (flash only); None keeps the model's windows.
        chunk_size: Largest relative position (dual_chunk only, like all below; see
            `lctrain.attention.DualChunkSpec`); None for the trained window - 1.
        local_size: Tokens across a chunk's border that keep exact positions; None for an eighth of
            the window.
        scale: none, or yarn for sharper logits beyond the window.
        scale_coefficient: Strength of yarn.
        window: Tokens that the model was trained on; None for what its configuration says.
    """

    name: str = "flash"
    dropout: float | None = None
    deterministic: bool = False
    backend: str = "auto"
    fused: bool = True
    sliding_window: int | None = None
    chunk_size: int | None = None
    local_size: int | None = None
    scale: str | None = None
    scale_coefficient: float | None = None
    window: int | None = None

    def __post_init__(self) -> None:
        check_backend(self.backend, "attention.backend")

    def options(self) -> dict[str, Any]:
        """The attention's options of `lctrain.patch_model`: what is set, also for another kind."""
        options = {field.name: getattr(self, field.name) for field in fields(self)}
        del options["name"], options["fused"]
        return {name: value for name, value in options.items() if value is not None}


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its learning-rate schedule.

    Attributes:
        learning_rate: Peak learning rate.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        eps: Added to the denominator.
        weight_decay: Decoupled decay of the matrices, embeddings included; biases, norms and
            vectors do not decay.
        schedule: cosine, linear, constant or warmup_stable_decay.
        warmup_steps: Optimizer steps of linear warmup; None takes warmup_fraction.
        warmup_fraction: Share of the run that warms up.
        decay_fraction: Share of the run after warmup that decays (warmup_stable_decay only).
        min_learning_rate_ratio: Last over peak learning rate.
    """

    learning_rate: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    schedule: str = "cosine"
    warmup_steps: int | None = None
    warmup_fraction: float = 0.1
    decay_fraction: float = 0.2
    min_learning_rate_ratio: float = 0.1

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(
                f"optim.schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}. "
                "Check the spelling."
            )
        _require(
            self.learning_rate > 0.0,
            f"optim.learning_rate must be above 0, got {self.learning_rate}. Try 1e-3.",
        )
        for name in ("beta1", "beta2"):
            beta = getattr(self, name)
            _require(
                0.0 <= beta < 1.0,
                f"optim.{name} must be in [0, 1), got {beta}. It is the share of a moment that a "
                "step keeps.",
            )
        for name in ("eps", "weight_decay"):
            value = getattr(self, name)
            _require(
                value >= 0.0,
                f"optim.{name} must be at least 0, got {value}. Leave it out or use 0.",
            )
        _require(
            0.0 <= self.warmup_fraction < 1.0,
            f"optim.warmup_fraction must be in [0, 1), got {self.warmup_fraction}. It is the share "
            "of the steps that warm up.",
        )
        _require(
            self.warmup_steps is None or self.warmup_steps >= 0,
            f"optim.warmup_steps must be at least 0, got {self.warmup_steps}. Use null for a share "
            "of the run, optim.warmup_fraction.",
        )
        _require(
            0.0 < self.decay_fraction <= 1.0,
            f"optim.decay_fraction must be in (0, 1], got {self.decay_fraction}. It is the share "
            "of the steps after the warmup that decay.",
        )
        _require(
            0.0 <= self.min_learning_rate_ratio <= 1.0,
            f"optim.min_learning_rate_ratio must be in [0, 1], got {self.min_learning_rate_ratio}. "
            "It is the last learning rate over the peak.",
        )


@dataclass(frozen=True)
class TrainerConfig:
    """The part of Lightning's Trainer that a run sets.

    Attributes:
        accelerator: auto, cpu or gpu.
        devices: Number of devices, their numbers with commas (0,2), or auto.
        num_nodes: Number of machines.
        strategy: auto, single_device, ddp or one of its variants about unused parameters. The loss
            of a window relies on gradients that every rank holds whole.
        precision: auto (bf16-mixed on a GPU, else 32-true), 32-true, bf16-mixed or bf16-true.
        max_steps: Optimizer steps; -1 for no limit.
        max_time: Stops training after this much time, as days:hours:minutes:seconds; None for no
            limit. The learning rate is scheduled by `max_steps` all the same.
        max_epochs: Passes over the data; -1 for no limit.
        accumulate_grad_batches: Packs per rank and optimizer step.
        gradient_clip_val: Largest gradient norm; None does not clip.
        log_every_n_steps: Optimizer steps between two rows of metrics.
        validate_every_n_steps: Optimizer steps between two held-out losses during training,
            counted in packs: validate_every_n_steps * accumulate_grad_batches of each rank. Where
            an epoch ends with a shorter window, the later validations come inside a window; they
            do not change it. None validates before the first and after the last step only.
        limit_val_batches: Held-out packs per rank and validation; None for all.
        deterministic: Ask torch for deterministic algorithms.
        enable_progress_bar: Show it.
    """

    accelerator: str = "auto"
    devices: str = "1"
    num_nodes: int = 1
    strategy: str = "auto"
    precision: str = "auto"
    max_steps: int = -1
    max_time: str | None = None
    max_epochs: int = -1
    accumulate_grad_batches: int = 1
    gradient_clip_val: float | None = 1.0
    log_every_n_steps: int = 10
    validate_every_n_steps: int | None = None
    limit_val_batches: int | None = None
    deterministic: bool = False
    enable_progress_bar: bool = True

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise ValueError(
                f"trainer.strategy must be one of {', '.join(STRATEGIES)}, got {self.strategy!r}. "
                "Where parameters are sharded, the loss and the clipping of a window would be "
                "wrong: use ddp, and model.gradient_checkpointing=true if memory is short."
            )
        remedies = {
            "num_nodes": "One machine is 1.",
            "accumulate_grad_batches": "1 takes an optimizer step after every pack.",
            "log_every_n_steps": "A large number logs little.",
            "validate_every_n_steps": "Use null to validate before and after training only.",
        }
        for name, remedy in remedies.items():
            value = getattr(self, name)
            _require(
                value is None or value >= 1,
                f"trainer.{name} must be at least 1, got {value}. {remedy}",
            )
        _require(
            self.gradient_clip_val is None or self.gradient_clip_val >= 0.0,
            f"trainer.gradient_clip_val must be at least 0, got {self.gradient_clip_val}. Use null "
            "for no clipping.",
        )
        check_trainer(self)


@dataclass(frozen=True)
class CheckpointConfig:
    """`lctrain.callbacks.StepCheckpoint`.

    Attributes:
        directory: Folder of the checkpoints.
        every_n_steps: Optimizer steps between two checkpoints.
        keep: Number of newest checkpoints that stay on disk.
    """

    _target_: str = "lctrain.callbacks.StepCheckpoint"
    directory: str = MISSING
    every_n_steps: int = 100
    keep: int = 2

    def __post_init__(self) -> None:
        _local(self, "callbacks.checkpoint.", "directory")
        for name in ("every_n_steps", "keep"):
            value = getattr(self, name)
            _require(
                value >= 1,
                f"callbacks.checkpoint.{name} must be at least 1, got {value}. Use "
                "callbacks.checkpoint=null for no checkpoints.",
            )


@dataclass(frozen=True)
class ThroughputConfig:
    """`lctrain.callbacks.ThroughputMonitor`.

    Attributes:
        max_tokens: Capacity of a row, to which the fill refers; None measures no fill.
    """

    _target_: str = "lctrain.callbacks.ThroughputMonitor"
    max_tokens: int | None = None


@dataclass(frozen=True)
class IsolationConfig:
    """`lctrain.callbacks.IsolationCheck`."""

    _target_: str = "lctrain.callbacks.IsolationCheck"


@dataclass(frozen=True)
class NonFiniteGuardConfig:
    """`lctrain.callbacks.NonFiniteLossGuard`.

    Attributes:
        on_batch: At a loss or gradient that is not finite: stop, or skip its optimizer step.
        max_in_a_row: Steps that may be skipped one after the other; one more stops the run.
    """

    _target_: str = "lctrain.callbacks.NonFiniteLossGuard"
    on_batch: str = "stop"
    max_in_a_row: int = 10


@dataclass(frozen=True)
class LengthPerplexityConfig:
    """`lctrain.callbacks.LengthPerplexity`.

    Attributes:
        lengths: Context lengths in tokens.
        every_n_steps: Optimizer steps between two measurements.
        max_tokens: Tokens in a forward pass; None takes the longest length.
        documents: Number of held-out documents, the longest first.
        begin_token: Whether each window begins with the begin token; None where the tokenizer adds
            one to a text.
    """

    _target_: str = "lctrain.callbacks.LengthPerplexity"
    lengths: list[int] = field(default_factory=lambda: [256, 1024, 4096])
    every_n_steps: int = 500
    max_tokens: int | None = None
    documents: int = 16
    begin_token: bool | None = None


@dataclass(frozen=True)
class AttentionScheduleConfig:
    """`lctrain.callbacks.AttentionSchedule`; attention=none leaves the patching to it.

    Attributes:
        stages: From the first optimizer step of a stage to its description: `attention`, its
            options, and `rope`.
    """

    _target_: str = "lctrain.callbacks.AttentionSchedule"
    stages: Any = MISSING


@dataclass(frozen=True)
class BestCheckpointConfig:
    """Lightning's `ModelCheckpoint`, after validations.

    Attributes:
        dirpath: Folder of the checkpoint.
        monitor: Logged metric that decides.
        mode: min or max: which value of the metric is best.
        save_top_k: Number of best checkpoints that stay on disk.
        filename: Name of the file, with the step.
        auto_insert_metric_name: Whether Lightning writes the metric's name into the file's name.
        save_on_train_epoch_end: Whether Lightning saves after a training epoch, too.
    """

    _target_: str = "lightning.pytorch.callbacks.ModelCheckpoint"
    dirpath: str = MISSING
    monitor: str = "val/loss"
    mode: str = "min"
    save_top_k: int = 1
    filename: str = "best-{step:08d}"
    auto_insert_metric_name: bool = False
    save_on_train_epoch_end: bool = False

    def __post_init__(self) -> None:
        _local(self, "callbacks.best_checkpoint.", "dirpath")


@dataclass(frozen=True)
class EarlyStoppingConfig:
    """Lightning's `EarlyStopping`, after validations.

    Attributes:
        monitor: Logged metric that decides.
        mode: min or max: which value of the metric is best.
        patience: Validations without an improvement after which training stops.
        min_delta: Smallest change that counts as an improvement.
        check_on_train_epoch_end: Whether Lightning checks after a training epoch, too.
    """

    _target_: str = "lightning.pytorch.callbacks.EarlyStopping"
    monitor: str = "val/loss"
    mode: str = "min"
    patience: int = 3
    min_delta: float = 0.0
    check_on_train_epoch_end: bool = False


@dataclass(frozen=True)
class ProgressBarConfig:
    """`lctrain.callbacks.TokenProgressBar`.

    Attributes:
        refresh_rate: Optimizer steps between two refreshes; 0 hides the bar.
    """

    _target_: str = "lctrain.callbacks.TokenProgressBar"
    refresh_rate: int = 1


@dataclass(frozen=True)
class CsvLoggerConfig:
    """`lctrain.loggers.MetricsCSV`: metrics.csv in the run's folder.

    Attributes:
        save_dir: Folder of the file.
    """

    _target_: str = "lctrain.loggers.MetricsCSV"
    save_dir: str = MISSING

    def __post_init__(self) -> None:
        _local(self, "logger.csv.", "save_dir")


@dataclass(frozen=True)
class WandbLoggerConfig:
    """Weights and Biases; offline by default, without a key or network.

    Attributes:
        save_dir: Folder of the run's files.
        project: Project name.
        name: Name of the run.
        offline: Keep everything on this machine; `wandb sync` sends it later.
        id: Identifies the run; None takes the one in run.json, with which a resumed run goes on.
    """

    _target_: str = "lctrain.loggers.wandb_logger"
    save_dir: str = MISSING
    project: str = "lctrain"
    name: str | None = None
    offline: bool = True
    id: str | None = None

    def __post_init__(self) -> None:
        _local(self, "logger.wandb.", "save_dir")


@dataclass(frozen=True)
class TensorBoardLoggerConfig:
    """TensorBoard, which the extra lctrain[tensorboard] installs.

    Attributes:
        save_dir: Folder in which the folder `tensorboard` is made.
    """

    _target_: str = "lctrain.loggers.tensorboard_logger"
    save_dir: str = MISSING

    def __post_init__(self) -> None:
        _local(self, "logger.tensorboard.", "save_dir")


@dataclass(frozen=True)
class PathsConfig:
    """Where a run writes: folders of this machine, which a run can lock.

    Attributes:
        root: Folder of all runs.
        runs_dir: Folder of the runs of this name; `ckpt_path=last` looks for this run there.
        output_dir: Folder of this run alone.
    """

    root: str = "outputs"
    runs_dir: str = MISSING
    output_dir: str = MISSING

    def __post_init__(self) -> None:
        _local(self, "paths.", "root", "runs_dir", "output_dir")


@dataclass(frozen=True)
class EvaluationConfig:
    """Perplexity by context length at the end of the run.

    Attributes:
        enabled: Whether to evaluate.
        lengths: Context lengths in tokens.
        documents: Number of held-out documents, the longest first; None for all.
        document_tokens: Tokens of each document, from its beginning; None for all.
        max_tokens: Tokens per forward pass; None takes the longest length.
        methods: Ways to read beyond the window, to compare on the trained model, as in
            lctrain-eval; with none, the model is measured as it was trained.
        stride: Positions that a window scores, with methods; None for half the shortest length.
        begin_token: Whether each window begins with the begin token; None where the tokenizer adds
            one to a text.
    """

    enabled: bool = True
    lengths: list[int] = field(default_factory=lambda: [256, 512, 1024, 2048, 4096])
    documents: int | None = 16
    document_tokens: int | None = None
    max_tokens: int | None = None
    methods: list[str] = field(default_factory=list)
    stride: int | None = None
    begin_token: bool | None = None

    def __post_init__(self) -> None:
        if self.documents is not None and self.documents < 1:
            raise ValueError(
                f"evaluation.documents must be at least 1, got {self.documents}. Use null for all "
                "of them, or evaluation.enabled=false for no evaluation."
            )
        if self.document_tokens is not None and self.document_tokens < 2:
            raise ValueError(
                f"evaluation.document_tokens must be at least 2, got {self.document_tokens}. One "
                "token leaves nothing to predict; use null for whole documents."
            )
        if self.enabled:
            check_lengths(self.lengths, self.max_tokens, "evaluation.")
        check_methods(self.methods, "evaluation.methods")
        _require(
            self.stride is None or 1 <= self.stride <= min(self.lengths),
            f"evaluation.stride must be in [1, shortest length = {min(self.lengths)}], got "
            f"{self.stride}. Use null for half of it.",
        )


@dataclass(frozen=True)
class TrainConfig:
    """Everything that `lctrain-train` does.

    Attributes:
        name: Name of the run; part of its folder.
        seed: Seed of the initialisation, dropout and the order of the data.
        data: What is read, and how it is packed.
        model: What is trained.
        attention: How its attention is patched; None leaves it as transformers has it.
        optim: Optimizer and schedule.
        trainer: Hardware, length of the run, accumulation.
        callbacks: By name, each with a `_target_`; null switches one off.
        logger: By name, each with a `_target_`.
        paths: Where the run writes.
        evaluation: Perplexity by length at the end.
        ckpt_path: Checkpoint to resume from: a path, or "last" for the newest of this run. The run
            goes on in its folder, unless another one is chosen.
        export: Whether to write the trained model for transformers.
    """

    name: str = "default"
    seed: int = 0
    data: DataConfig = MISSING
    model: ModelConfig = MISSING
    attention: AttentionConfig | None = None
    optim: OptimConfig = MISSING
    trainer: TrainerConfig = MISSING
    callbacks: dict[str, Any] = field(default_factory=dict)
    logger: dict[str, Any] = field(default_factory=dict)
    paths: PathsConfig = MISSING
    evaluation: EvaluationConfig = MISSING
    ckpt_path: str | None = None
    export: bool = True

    def __post_init__(self) -> None:
        check_run_name(self.name)
        check_seed(self.seed)
        check_seed(self.data.seed, "data.seed")
        check_warmup(self.optim.warmup_steps, self.trainer.max_steps)
        _local(self, "", "ckpt_path")


def _local(config: Any, group: str, *names: str) -> None:
    """Replaces path options by what `local_path` makes of them: `~` expanded, no URL."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value != MISSING:
            object.__setattr__(config, name, local_path(f"{group}{name}", value))


def store_schema(name: str, schema: Any) -> None:
    """Puts one dataclass into Hydra's ConfigStore as `<name>_schema`.

    OmegaConf marks nodes of frozen dataclasses read-only, and Hydra could then not apply YAML files
    and overrides: the mark is taken off here and the result becomes frozen in `to_dataclass`.

    Args:
        name: "group/name", or "name" for the schema of a primary config.
        schema: A dataclass.
    """
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    node = OmegaConf.structured(schema)
    _allow_overrides(node)
    group, _, leaf = name.rpartition("/")
    ConfigStore.instance().store(group=group or None, name=f"{leaf}_schema", node=node)


def to_dataclass(config: DictConfig, schema: type[Schema]) -> Schema:
    """Converts Hydra's config into the dataclass it was made from, with everything resolved.

    Args:
        config: What Hydra composed on top of a stored schema.
        schema: The dataclass of the root.

    Returns:
        The dataclass; nothing below it is an OmegaConf container.

    Raises:
        ValueError: if a mandatory value is missing, a key is unknown or a type does not fit; the
            message names the key.
    """
    from dataclasses import FrozenInstanceError

    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        result = OmegaConf.to_object(config)
    except FrozenInstanceError as error:  # a key appended with + to a schema without it
        key = str(error).split("'")[1]
        raise ValueError(
            f"{key} must be a key of the configuration, got one that it does not have. Leave it "
            "out."
        ) from error
    except OmegaConfBaseException as error:
        raise ValueError(explain_config_error(error)) from error
    if not isinstance(result, schema):
        raise ValueError(
            f"config must be built on {schema.__name__}, got {type(result).__name__}. List its "
            "schema in the defaults."
        )
    return result


def _allow_overrides(node: DictConfig) -> None:
    """Takes the read-only flag of frozen dataclasses off a node and its children."""
    from omegaconf import DictConfig

    node._set_flag("readonly", None)
    if node._is_none() or node._is_missing():
        return
    for key in node:
        child = node._get_node(key)
        if isinstance(child, DictConfig):
            _allow_overrides(child)
