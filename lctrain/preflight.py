"""Checks the attention, model, files and folders of a command before torch is imported.

The config schemas have already checked keys, types and ranges. Checks that need the model or the
texts run later, when these are loaded.
"""

from __future__ import annotations

import importlib.util
import os
import re
import tempfile
import zipfile
from collections.abc import Collection, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lctrain.attention.spec import ATTENTION_NAMES, make_spec
from lctrain.config import TASKS, PretrainedModelConfig, ScratchModelConfig
from lctrain.limits import (
    check_lengths,
    check_longppl,
    check_methods,
    check_passkeys,
    check_windows,
    named,
    require,
)
from lctrain.local_paths import SCHEME, cache_folder
from lctrain.model_names import (
    check_arguments,
    check_family,
    check_model_name,
    check_tokenizer_name,
    looks_like_path,
)
from lctrain.run.identity import identity_of
from lctrain.run.resume import check_named, checkpoints_in, newest_directory
from lctrain.run.seal import is_checkpoint

if TYPE_CHECKING:
    from lctrain.config import (
        AttentionConfig,
        DataConfig,
        EvalConfig,
        EvaluationConfig,
        HarnessConfig,
        MemoryConfig,
        ModelConfig,
        TrainConfig,
    )

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICE = r"auto|(cpu|cuda|mps|xpu)(:\d+)?"


def check_attention(config: AttentionConfig | None) -> None:
    """Raises ValueError if an attention does not exist, or does not have one of its options."""
    if config is None:
        return
    require(
        config.name in ATTENTION_NAMES,
        f"attention.name must be one of {', '.join(ATTENTION_NAMES)}, got {config.name!r}. Check "
        "the spelling.",
    )
    try:
        make_spec(config.name, **config.options())
    except ValueError as error:
        option = str(error).partition(" ")[0]
        prefix = "attention." if option in {field.name for field in fields(config)} else ""
        raise ValueError(f"{prefix}{error}") from error


def check_data_files(config: DataConfig) -> None:
    """Raises ValueError if a file or glob matches nothing, or the cache cannot be written.

    Args:
        config: Settings of the data, with any source.
    """
    from lctrain.data.mix import sources_of

    for place, source in sources_of(config).items():
        _check_files(source, f"{place}.")
    from_environment = config.cache_dir is None and os.environ.get("LCTRAIN_CACHE")
    name = "LCTRAIN_CACHE" if from_environment else "data.cache_dir"
    check_folder(cache_folder(config.cache_dir), name)


def _check_files(source: Any, prefix: str) -> None:
    """Raises ValueError if a source names no file, or a file or glob that matches nothing.

    Args:
        source: Source of documents.
        prefix: Text before the names in messages.
    """
    from lctrain.data.readers import match_files

    for name in ("files", "held_out_files"):
        patterns = getattr(source, name, ())
        from_hub = bool(getattr(source, "dataset", ""))
        if name == "files" and hasattr(source, "files") and not patterns and not from_hub:
            raise ValueError(
                f"{prefix}files must name at least one file or glob, got none. Write for example "
                "'data.files=[books/*.txt]', with the quotes."
            )
        if patterns:
            with named(prefix) if name == "files" else named(f"{prefix}held_out_"):
                match_files(patterns)


def check_model(config: ModelConfig, tokenizer: str | None) -> None:
    """Raises ValueError if a model's family, argument or folder, or the tokenizer, does not exist.

    Args:
        config: Settings of a model with random weights, or of a pretrained model.
        tokenizer: Name or folder of the tokenizer; None for the default.
    """
    check_tokenizer_name(tokenizer)
    if isinstance(config, PretrainedModelConfig):
        check_model_name(config.name_or_path)
    elif isinstance(config, ScratchModelConfig):
        check_family(config.model_type)
        check_arguments(config.model_type, config.config)


def check_chat_tokenizer(data: DataConfig, model: ModelConfig) -> None:
    """Raises ValueError if conversations come without a tokenizer, and so without a chat template.

    Args:
        data: Settings of the data.
        model: Settings of the model. A pretrained model has a tokenizer of its own.
    """
    from lctrain.data.mix import sources_of

    require(
        not any(hasattr(source, "train_on") for source in sources_of(data).values())
        or data.tokenizer is not None
        or isinstance(model, PretrainedModelConfig),
        "data.tokenizer must be given for conversations, got null. Name the tokenizer of an "
        "instruct model, which has a chat template.",
    )


def check_reference(memory: MemoryConfig) -> None:
    """Raises ValueError if a place is set for a reference model, which lctrain-train has not.

    Args:
        memory: Settings of memory.
    """
    require(
        memory.reference is None,
        f"memory.reference must be null for lctrain-train, which has no reference model, got "
        f"{memory.reference}. Leave it out.",
    )


def check_passkey_model(config: EvaluationConfig) -> None:
    """Raises ValueError if the model of the passkey test is a path that is not a folder.

    Args:
        config: Settings of the evaluation at the end of a training run.
    """
    name = config.passkey_model
    require(
        name is None or bool(name.strip()),
        "evaluation.passkey_model must be shipped, a folder or a name on the Hugging Face hub, got "
        f"{name!r}. null tests the trained model.",
    )
    require(
        name is None or not looks_like_path(name) or Path(name).expanduser().is_dir(),
        "evaluation.passkey_model must be shipped, a folder or a name on the Hugging Face hub, got "
        f"{name}, which does not exist. null tests the trained model.",
    )


def check_checkpoint(config: TrainConfig) -> None:
    """Raises ValueError if `ckpt_path` is not a file, or "last" finds no earlier checkpoint.

    The content of the checkpoint is not read.
    """
    ckpt_path = config.ckpt_path
    if ckpt_path is None:
        return
    if ckpt_path == "last":
        _check_last(config)
        return
    path = Path(ckpt_path)
    if path.is_dir() and not is_checkpoint(path):
        inside = sorted(path.rglob("*.ckpt"))
        remedy = f"Name a file in it, such as {inside[-1]}" if inside else "It holds no checkpoint"
        raise ValueError(
            f"ckpt_path must be a checkpoint file or last, got {ckpt_path!r}, which is a folder. "
            f"{remedy}."
        )
    if not is_checkpoint(path):
        raise ValueError(
            f"ckpt_path must be a checkpoint file or last, got {ckpt_path!r}, which is not there. "
            "Leave it out to start afresh."
        )
    if path.is_file() and not zipfile.is_zipfile(path):
        check_named(path, None)  # raises an error that names an intact checkpoint


def _check_last(config: TrainConfig) -> None:
    """Raises ValueError if this run has no earlier checkpoint."""
    own = [Path(config.paths.output_dir) / "checkpoints"]
    for callback in config.callbacks.values():
        directory = getattr(callback, "directory", None)
        own += [] if directory is None else [Path(directory)]
    if any(checkpoints_in(directory) for directory in own):
        return
    identity = identity_of(config)
    if config.trainer.precision == "auto":  # only torch can tell which precision this is
        del identity["trainer.precision"]
    newest_directory(Path(config.paths.runs_dir), identity)


def check_folder(folder: Path, name: str) -> None:
    """Raises ValueError if no file can be created in a folder. Creates the folder if needed.

    Args:
        folder: Path of the folder.
        name: Name of the setting, for the message.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"{name} must be a folder that can be written, got {folder} ({error.strerror}). Choose "
            "another one."
        ) from error


def check_logger_folders(configs: Any, output_dir: str) -> None:
    """Raises ValueError if the folder of a logger cannot be written.

    Args:
        configs: Settings of the loggers by name; None for a logger that is switched off.
        output_dir: Folder of the run, which is checked with the checkpoints.
    """
    for name, config in configs.items():
        get = getattr(config, "get", None)
        folder = get("save_dir") if get is not None else getattr(config, "save_dir", None)
        if isinstance(folder, str) and folder != output_dir and not SCHEME.match(folder):
            check_folder(Path(folder).expanduser(), f"logger.{name}.save_dir")


def check_targets(group: str, configs: Any) -> None:
    """Raises ValueError if a component of a group has no `_target_`, or its package does not exist.

    Args:
        group: Name of the group: "callbacks" or "logger".
        configs: Settings of the components by name; None for a component that is switched off.
    """
    for name, config in configs.items():
        if config is None:
            continue
        get = getattr(config, "get", None)
        target = get("_target_") if get is not None else getattr(config, "_target_", None)
        if not isinstance(target, str) or "." not in target:
            raise ValueError(
                f"{group}.{name} must have a _target_, got {config!r}. Give the class to build, or "
                f"set {group}.{name}=null."
            )
        require(
            importlib.util.find_spec(target.partition(".")[0]) is not None,
            f"{group}.{name}._target_ must be a class of a package that is there, got {target!r}. "
            "Check the spelling; the folder of a file of your own belongs in PYTHONPATH.",
        )


def check_evaluation(config: EvalConfig) -> None:
    """Raises ValueError if a setting of lctrain-eval is wrong. It does not import torch."""
    check_lengths(config.lengths, config.forward_tokens())
    if config.tasks is not None:
        check_tasks(config.tasks, config.own_tasks)
    check_targets("own_tasks", config.own_tasks)
    check_methods(config.methods)
    check_task_methods(config)
    check_task_settings(config)
    check_passkeys(
        config.passkey.depths, config.passkey.keys_per_cell, config.passkey.seed, "passkey."
    )
    check_windows(config.overlap, config.min_context, config.stride, min(config.lengths))
    for name, known in (("split", ("held_out", "all")), ("dtype", DTYPES)):
        value = getattr(config, name)
        require(
            value in known, f"{name} must be one of {', '.join(known)}, got {value!r}. Correct it."
        )
    require(
        config.documents is None or config.documents >= 1,
        f"documents must be at least 1, got {config.documents}. Use null for all of them.",
    )
    require(
        re.fullmatch(DEVICE, config.device) is not None,
        f"device must be auto, cpu, cuda or cuda:1 for instance, got {config.device!r}. Try auto.",
    )
    check_model_name(config.model.name_or_path)
    check_attention(config.attention)
    check_data_files(config.data)
    check_targets("logger", config.logger)
    check_logger_folders(config.logger, config.paths.output_dir)


def check_task_methods(config: EvalConfig) -> None:
    """Raises ValueError if the methods of a single task do not exist."""
    for field in fields(config):
        methods = getattr(getattr(config, field.name), "methods", None)
        check_methods(methods or (), f"{field.name}.methods")


def check_task_settings(config: EvalConfig) -> None:
    """Raises ValueError if the window, or lengths or settings of a task in `tasks`, do not fit."""
    require(
        config.window is None or config.window >= 2,
        f"window must be at least 2, got {config.window}. It is the number of tokens that the "
        "model was trained on.",
    )
    tasks = config.tasks or []
    for name in tasks:
        settings = getattr(config, name, None)
        own = getattr(settings, "lengths", None)
        if own is not None:
            check_lengths(own, config.forward_tokens(), f"{name}.")
        require(
            getattr(settings, "by", None) != "generation"
            or "intra_chunk" not in (getattr(settings, "methods", None) or config.methods),
            f"methods must not name intra_chunk for {name} by generation. Leave it out, or "
            f"set {name}.by=likelihood.",
        )
    require(
        "context_gain" not in tasks or len(set(config.lengths)) > 1,
        f"lengths must name at least two for context_gain, got {list(config.lengths)}. Add a "
        "shorter one.",
    )
    longest = max(config.lengths)
    require(
        "sliding_perplexity" not in tasks or (config.document_tokens or longest) >= longest,
        f"document_tokens must be at least the longest length, {longest}, for sliding_perplexity, "
        f"got {config.document_tokens}. Raise it, or leave that length out.",
    )
    if "longppl" in tasks:
        o = config.longppl
        check_longppl(o.short_context, o.step, o.lengths or config.lengths)
        evaluator = o.evaluator
        require(
            evaluator is None
            or not looks_like_path(evaluator)
            or Path(evaluator).expanduser().is_dir(),
            "longppl.evaluator must be a folder or a name on the Hugging Face hub, got "
            f"{evaluator}, which does not exist. null takes the model itself.",
        )
    if "harness" in tasks:
        check_harness(config.harness)


def check_harness(config: HarnessConfig) -> None:
    """Raises ValueError if the task harness lacks tasks, its package or its folder."""
    require(
        len(config.tasks) > 0,
        "harness.tasks must name at least one task of lm-evaluation-harness, got none. Name "
        "some, or leave harness out of tasks.",
    )
    require(
        importlib.util.find_spec("lm_eval") is not None,
        "harness must have the package lm_eval, got none. Install it: pip install lm_eval.",
    )
    require(
        config.include_path is None or Path(config.include_path).expanduser().is_dir(),
        f"harness.include_path must be a folder with tasks, got {config.include_path}, which is "
        "not there. Check the path.",
    )


def check_tasks(tasks: Sequence[str], own: Collection[str] = ()) -> None:
    """Raises ValueError unless `tasks` names at least one task, and only tasks that there are.

    Args:
        tasks: Names of the tasks to run.
        own: Names of the user's own tasks.
    """
    known = [*TASKS, *own]
    if not tasks or not set(tasks) <= set(known):
        raise ValueError(
            f"tasks must be some of {', '.join(known)}, got {list(tasks)}. Leave "
            "tasks out for perplexity."
        )
