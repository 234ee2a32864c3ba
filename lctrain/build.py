"""Builds a run's objects from its configuration: data, model, callbacks, loggers and trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import Logger
from torch import nn

from lctrain.attention import make_spec
from lctrain.config import (
    AdapterConfig,
    AttentionConfig,
    DataConfig,
    DataSettings,
    ModelConfig,
    PretrainedModelConfig,
    ScratchModelConfig,
    TrainConfig,
    TrainerConfig,
)
from lctrain.data import PackedDataModule
from lctrain.data.masking import DEFAULT_FRACTION
from lctrain.data.mix import named_sets
from lctrain.data.vocabulary import vocabulary_size
from lctrain.distributed.strategy import ShardedStrategy
from lctrain.eval.extension import check_supported
from lctrain.memory.plan import Plan
from lctrain.memory.policy import plan_for
from lctrain.micro_batches import most_configured
from lctrain.model_names import unknown_argument, unknown_family
from lctrain.models import patch_model
from lctrain.models.low_rank import add_adapter, quantization_of, require_trainable_weights
from lctrain.models.positions import require_positions
from lctrain.models.pretrained import auto_class, load_architecture, load_pretrained
from lctrain.models.shared_attention import heads_group
from lctrain.models.tokenizer import tokenizer_for
from lctrain.run.sharded_checkpoint import AnyCheckpointIO
from lctrain.schemas import source_of


def build_datamodule(
    config: DataConfig, model: ModelConfig | None = None, task: str = "causal"
) -> PackedDataModule:
    """Builds the data module, without reading data.

    Args:
        config: Settings of the data, with a source.
        model: Settings of the model. The tokenizer of a pretrained model is the default tokenizer:
            see `tokenizer_for`.
        task: "causal"; "mlm" masks tokens, by default 0.15 of them.

    Raises:
        ValueError: if there is no source, a setting is out of range, or the tokenizer differs from
            that of the pretrained model.
    """
    settings = {field.name: getattr(config, field.name) for field in fields(DataSettings)}
    if task == "mlm" and config.mask_fraction is None:
        settings["mask_fraction"] = DEFAULT_FRACTION
    tokenizer = config.tokenizer if model is None else tokenizer_for(model, config.tokenizer)
    sets = named_sets(config.held_out_sets)
    return PackedDataModule(source_of(config), tokenizer, held_out=sets or None, **settings)


def build_model(
    config: ModelConfig,
    vocab_size: int,
    adapter: AdapterConfig | None = None,
    task: str = "causal",
) -> nn.Module:
    """Builds a transformers language model on torch's default device, the GPU in Lightning.

    Args:
        config: Settings of a model with random weights, or of a pretrained model.
        vocab_size: Size of the tokenizer's vocabulary.
        adapter: Settings of adapters on a pretrained model; None for none.
        task: "causal", or "mlm" for a masked language model.

    Returns:
        The model, in training mode; with adapters, a PeftModel.

    Raises:
        ValueError: if the model family, a key of its configuration or the pretrained model is
            unknown, the model has fewer embeddings than the tokenizer has tokens, or adapters
            cannot be added (see `add_adapter`).
    """
    dtype = _dtype(config, adapter)
    if isinstance(config, ScratchModelConfig):
        model = _from_scratch(config, vocab_size, getattr(torch, dtype), task)
    elif isinstance(config, PretrainedModelConfig):
        model = load_pretrained(
            config, dtype, quantization_of(adapter), task, is_whole=adapter is not None
        )
        require_trainable_weights(model.config, adapter is not None)
    else:
        raise _no_model_config(config)
    known = vocabulary_size(model)
    if known < vocab_size:
        raise ValueError(
            f"model must have at least the tokenizer's {vocab_size} embeddings, got {known}. Use "
            "the model's own tokenizer (data.tokenizer) or leave model.config.vocab_size out."
        )
    if adapter is not None:
        model = add_adapter(model, adapter)
    return model.train()


def check_model(
    config: ModelConfig,
    attention: AttentionConfig | None,
    lengths: Mapping[str, int] | None = None,
    methods: Sequence[str] = (),
    adapter: AdapterConfig | None = None,
    trainer: TrainerConfig | None = None,
    task: str = "causal",
) -> None:
    """Checks a model and its attention by building and patching the model without its weights.

    Args:
        config: Settings of a model with random weights, or of a pretrained model.
        attention: Settings of the attention; None leaves the model unpatched.
        lengths: Longest document in tokens that an option allows, by the option's name. It is
            checked against a model's table of learned positions.
        methods: Methods of reading beyond the trained window (see `lctrain.eval.extension`) that
            the closing evaluation compares.
        adapter: Settings of adapters; None for none.
        trainer: Settings of the Trainer, whose ranks may share packs; None for one rank.
        task: "causal", or "mlm" for a masked language model.

    Raises:
        ValueError: if the model cannot be built (see `build_model`) or patched (see `patch_model`),
            a length exceeds the table of positions, the model does not support a method or takes no
            adapters, or ranks cannot share its packs.
    """
    if attention is not None:
        make_spec(attention.name, **attention.options())
    model = _without_weights(config, adapter, LARGE_VOCABULARY, task)
    for option, tokens in (lengths or {}).items():
        require_positions(
            model, tokens, option, "Shorten it, or choose a model with more positions."
        )
    try:
        check_supported(model, methods)
    except ValueError as error:
        raise ValueError(
            f"evaluation.methods must be methods that the model supports, got {list(methods)}: "
            f"{error}"
        ) from error
    if attention is not None:
        patch_model(model, attention=attention.name, **attention.options())
    if trainer is not None and trainer.context_parallel > 1:
        on_machine = trainer.devices_per_machine()
        heads_group(model, trainer.context_parallel, trainer.context_exchange, on_machine)
    if adapter is not None:
        add_adapter(model, adapter)


def _without_weights(
    config: ModelConfig, adapter: AdapterConfig | None, vocab_size: int, task: str = "causal"
) -> Any:
    """Returns the model of `build_model` on device meta, before adapters are added."""
    with torch.device("meta"):
        if isinstance(config, ScratchModelConfig):
            return _from_scratch(config, vocab_size, task=task)
        if isinstance(config, PretrainedModelConfig):
            model = load_architecture(config, task=task)
            require_trainable_weights(model.config, adapter is not None)
            return model
    raise _no_model_config(config)


def plan_memory(config: TrainConfig) -> Plan:
    """Returns the memory plan of a run, without reading its data or weights, and without a GPU.

    Args:
        config: Settings of the run. A model with random weights gets data.vocab_size embeddings.

    Raises:
        ValueError: if the model cannot be built, patched or planned.
    """
    model = _without_weights(config.model, config.adapter, config.data.vocab_size, config.task)
    precision = config.trainer.precision
    if precision == "auto":  # without a GPU here, the plan is for a run on a GPU
        precision = "32-true" if config.trainer.accelerator == "cpu" else "bf16-mixed"
    model = model.to(getattr(torch, _dtype(config.model, config.adapter)))
    if config.attention is not None:
        options = config.attention.options()
        patch_model(model, config.attention.name, fused=config.attention.fused, **options)
    if config.adapter is not None:
        model = add_adapter(model, config.adapter)
    if precision == "bf16-true":  # Lightning casts all weights, those of adapters too
        model = model.to(torch.bfloat16)
    tokens = config.memory.tokens or config.data.max_tokens
    mixed = "bf16-mixed" if precision == "bf16-mixed" else "true"
    quantize = None if config.adapter is None else config.adapter.quantize
    optimizer = config.optim._target_
    ranks = _ranks(config.trainer)
    shards = None
    if config.trainer.strategy == "fsdp2":
        shards = max(ranks * config.trainer.num_nodes // config.trainer.replicas, 1)
    return plan_for(
        model,
        config.memory,
        tokens,
        mixed,
        torch.device("cpu") if config.trainer.accelerator == "cpu" else None,
        ranks=ranks,
        quantize=quantize,
        optimizer=optimizer,
        shards=shards,
        micro_batches=max(
            most_configured(config.callbacks), config.trainer.accumulate_grad_batches
        ),
    )


def _ranks(config: TrainerConfig) -> int:
    """Returns the number of ranks that a run has on each machine."""
    ranks = config.devices_per_machine()
    if ranks is None:  # as many as there are
        ranks = 1 if config.accelerator == "cpu" else max(torch.cuda.device_count(), 1)
    return ranks


def _dtype(config: ModelConfig, adapter: AdapterConfig | None) -> str:
    """Returns the name of the weights' dtype."""
    return config.dtype or ("float32" if adapter is None else "bfloat16")


LARGE_VOCABULARY = 2**20  # above any special token's id; on the meta device it takes no memory


def _no_model_config(config: Any) -> ValueError:
    return ValueError(
        f"model must be a ScratchModelConfig or a PretrainedModelConfig, got "
        f"{type(config).__name__}. Choose model=llama_5m or model=hf, or build on one of them."
    )


def _from_scratch(
    config: ScratchModelConfig,
    vocab_size: int,
    dtype: torch.dtype = torch.float32,
    task: str = "causal",
) -> Any:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING

    from lctrain.models.differential_configs import differential_config
    from lctrain.models.registration import register_families

    if config.model_type not in CONFIG_MAPPING:
        raise unknown_family(config.model_type, list(CONFIG_MAPPING), "model.model_type")
    config_class = CONFIG_MAPPING[config.model_type]
    known = vars(config_class())
    for key in config.config:
        if key not in known:
            raise unknown_argument(key, config_class.__name__, known)
    settings = {"vocab_size": vocab_size, **config.config}
    try:
        model_config = config_class(**settings)
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise ValueError(f"model.config must fit {config_class.__name__}: {error}") from error
    if config.differential == 2:
        register_families()
        model_config = differential_config(model_config)
    try:
        return auto_class(task).from_config(model_config, dtype=dtype)
    except AssertionError as error:  # torch's, of a padding token outside of the vocabulary
        raise ValueError(
            f"model.config must fit a vocabulary of {settings['vocab_size']}: {error}. Set "
            "model.config.pad_token_id=null."
        ) from error
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        raise ValueError(
            f"model.model_type must be a family that can be trained with task={task}, got "
            f"{config.model_type}. Choose for example {'modernbert' if task == 'mlm' else 'llama'}."
        ) from error


def model_factory(
    config: ModelConfig, adapter: AdapterConfig | None = None, task: str = "causal"
) -> Callable[[pl.LightningDataModule], nn.Module]:
    """Returns the function by which LongContextModule builds its model from the data module."""

    def build(datamodule: pl.LightningDataModule) -> nn.Module:
        return build_model(config, datamodule.vocab_size, adapter, task)

    return build


BASES: dict[str, type] = {"callbacks": pl.Callback, "logger": Logger}
"""Base class of the components of each group."""


def instantiate_all(group: str, configs: Mapping[str, Any]) -> dict[str, Any]:
    """Builds every component of a config group, such as the callbacks.

    Args:
        group: Name of the group.
        configs: Settings by name: a dataclass or dictionary with `_target_`, or None for a
            component that is switched off.

    Returns:
        The built objects by name, in the same order.

    Raises:
        ValueError: if an entry has no `_target_`, or the built object is not of the group's base
            class.
    """
    from hydra.utils import instantiate

    built = {}
    for name, config in configs.items():
        if config is None:
            continue
        target = (
            config.get("_target_")
            if isinstance(config, Mapping)
            else getattr(config, "_target_", None)
        )
        if target is None:
            raise ValueError(
                f"{group}.{name} must have a _target_, got {config!r}. Give the class to build, or "
                f"set {group}.{name}=null."
            )
        built[name] = made = instantiate(config, _convert_="object")
        if not isinstance(made, BASES.get(group, object)):
            raise ValueError(
                f"{group}.{name}._target_ must be a {BASES[group].__name__} of Lightning, got "
                f"{target!r}, which makes a {type(made).__name__}. Name another class, or set "
                f"{group}.{name}=null."
            )
    return built


def build_trainer(
    config: TrainerConfig,
    callbacks: list[pl.Callback],
    loggers: list[Any],
    root_dir: str,
) -> pl.Trainer:
    """Builds Lightning's Trainer.

    Args:
        config: Settings of the Trainer.
        callbacks: All callbacks of the run, the progress bar included.
        loggers: Loggers of the run.
        root_dir: Folder of the run.

    Raises:
        ValueError: if neither max_steps nor max_epochs is set, a callback that has a state is given
            twice, or a callback monitors validations and the run has none.
    """
    if config.max_steps < 0 and config.max_epochs < 0:
        raise ValueError(
            "trainer.max_steps or trainer.max_epochs must be set, got neither. A run needs an end."
        )
    if config.validate_every_n_steps is None:
        _refuse_monitors(callbacks)
    _refuse_twins(callbacks)
    has_bar = any(isinstance(callback, pl.callbacks.ProgressBar) for callback in callbacks)
    if not config.enable_progress_bar:
        callbacks = [c for c in callbacks if not isinstance(c, pl.callbacks.ProgressBar)]
    batches = config.accumulate_grad_batches
    every = config.validate_every_n_steps
    return pl.Trainer(
        accelerator=config.accelerator,
        devices=int(config.devices) if config.devices.isdigit() else config.devices,
        num_nodes=config.num_nodes,
        strategy=build_strategy(config),
        precision=resolve_precision(config),  # type: ignore[arg-type]
        max_steps=config.max_steps,
        max_time=config.max_time,
        max_epochs=config.max_epochs,
        accumulate_grad_batches=batches,
        gradient_clip_val=config.gradient_clip_val,
        log_every_n_steps=config.log_every_n_steps,
        val_check_interval=None if every is None else every * batches,
        check_val_every_n_epoch=NEVER if every is None else None,
        limit_val_batches=config.limit_val_batches,
        num_sanity_val_steps=0,
        deterministic=config.deterministic,
        enable_progress_bar=config.enable_progress_bar and has_bar,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(c, pl.callbacks.Checkpoint) for c in callbacks),
        inference_mode=False,  # buffers created in validation are used in training, too
        use_distributed_sampler=False,  # PackedDataModule gives every rank its packs
        plugins=[AnyCheckpointIO()],
        callbacks=callbacks,
        logger=loggers or False,
        default_root_dir=root_dir,
    )


def build_strategy(config: TrainerConfig) -> Any:
    """Returns the strategy of Lightning's Trainer: its name, or a ShardedStrategy for fsdp2.

    Args:
        config: Settings of the Trainer.
    """
    if config.strategy != "fsdp2":
        return config.strategy
    return ShardedStrategy(
        config.replicas,
        context_parallel=config.context_parallel,
        context_exchange=config.context_exchange,
    )


def _refuse_monitors(callbacks: list[pl.Callback]) -> None:
    """Raises ValueError if a callback monitors a validation metric; this run has no validations."""
    for callback in callbacks:
        if str(getattr(callback, "monitor", None)).startswith("val/"):
            raise ValueError(
                f"trainer.validate_every_n_steps must be set for {type(callback).__name__} with "
                f"monitor={callback.monitor}, got null. Set it, or monitor train/loss."
            )


def _refuse_twins(callbacks: list[pl.Callback]) -> None:
    """Raises ValueError if two callbacks would save their state under the same key."""
    keys = [c.state_key for c in callbacks if type(c).state_dict is not pl.Callback.state_dict]
    for key in dict.fromkeys(keys):
        if keys.count(key) > 1:
            remedy = "Remove the others, or trainer.budget_s, which adds a StepBudget."
            raise ValueError(
                f"callbacks must hold one {key}, got {keys.count(key)}. "
                + (remedy if key == "StepBudget" else "Remove the others.")
            )


NEVER = 10**9  # epochs between two validations that Lightning would start by itself


def resolve_precision(config: TrainerConfig) -> str:
    """Returns Lightning's precision for a config.

    "auto" becomes bf16-mixed on a GPU that supports bfloat16, and 32-true otherwise.
    """
    if config.precision != "auto":
        return config.precision
    on_gpu = config.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return "bf16-mixed" if on_gpu and torch.cuda.is_bf16_supported() else "32-true"
