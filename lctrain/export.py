"""export_model: writes a trained model in transformers' format, with a model card."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lctrain.attention import AttentionSpec, DualChunkSpec
from lctrain.distributed import Topology
from lctrain.distributed.hugging_face import is_sharded, save_weights
from lctrain.model_card import model_card
from lctrain.models.adapters import inside_adapters
from lctrain.models.differential_configs import CONFIGS
from lctrain.models.low_rank import has_reloaded_base, resolve_base
from lctrain.models.sharded_adapters import merge_shards
from lctrain.module import LongContextModule

KEY = "trained_as"
"""Key of an exported config that holds the trained length, the attention, and the version of
differential attention."""
_OF_A_RUN = ("backend", "deterministic", "batch_invariant")
"""Attention options that are not part of the model."""

_OF_ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
"""Files of peft's adapters."""

_OF_A_MODEL = ("config.json", "generation_config.json", "model*.safetensors*")
"""Files of a whole model that an export writes."""

_FREE_ROPE = ("default", "linear", "llama3")  # RoPE types that ignore max_position_embeddings


def export_model(
    module: LongContextModule,
    tokenizer: Any,
    folder: Path,
    trained_length: int | None = None,
    *,
    merge: bool = False,
    writes: bool = True,
) -> Path:
    """Writes model, tokenizer and a model card, so that transformers loads them without lctrain.

    If the model has PEFT adapters, only the adapters are written, unless `merge` is true.

    Args:
        module: Module with the trained model. Its attention is unpatched during the export. If the
            model is sharded, all ranks must call this function.
        tokenizer: Tokenizer of the run.
        folder: Folder to create.
        trained_length: Length of the longest document in training, in tokens; None if unknown.
        merge: Whether to add PEFT adapters to the weights, by peft, and to write a whole model. The
            module then holds the merged model.
        writes: Whether this rank writes the files. A rank with a copy of the model that does not
            write changes the module in the same way. All ranks with shards write.

    Returns:
        The folder.
    """
    spec, folder = None, Path(folder).expanduser()
    if is_sharded(module.model):
        return _export_shards(module, tokenizer, folder, trained_length, merge)
    if module.patch_handle is not None:
        spec = module.patch_handle.spec
        module.patch_handle.unpatch()
        module.patch_handle = None
    if merge and hasattr(module.model, "merge_and_unload"):
        module.model = module.model.merge_and_unload(safe_merge=True)
    if writes:
        model = module.model.cpu()
        if inside_adapters(model) is model:
            _delete_adapters(folder)
        else:
            resolve_base(model)
            _delete_whole_model(folder, model)
        model.save_pretrained(folder)
        _save_description(model, tokenizer, folder, spec, trained_length)
    module.configure_model()
    return folder


def _export_shards(
    module: LongContextModule,
    tokenizer: Any,
    folder: Path,
    trained_length: int | None,
    merge: bool,
) -> Path:
    """Writes a sharded model as `export_model` does. All ranks call it; the model stays patched."""
    spec = None if module.patch_handle is None else module.patch_handle.spec
    ranks = Topology.of(module.trainer)
    if merge and hasattr(module.model, "merge_and_unload"):
        module.model = merge_shards(module.model)
    adapters = inside_adapters(module.model) is not module.model
    if adapters:
        resolve_base(module.model)
    if ranks.is_first:
        if adapters:
            _delete_whole_model(folder, module.model)
        else:
            _delete_adapters(folder)
    save_weights(module.model, folder, ranks, only_trained=has_reloaded_base(module.model))
    if ranks.is_first:
        _save_description(module.model, tokenizer, folder, spec, trained_length)
    return folder


def _delete_adapters(folder: Path) -> None:
    """Deletes adapters of an earlier export, which transformers would load with the whole model."""
    for name in _OF_ADAPTERS:
        (folder / name).unlink(missing_ok=True)


def _delete_whole_model(folder: Path, model: Any) -> None:
    """Deletes the whole model of an earlier export, whose files adapters do not overwrite.

    A model that lctrain did not export, or that the adapters are for, is kept.
    """
    bases = {config.base_model_name_or_path for config in model.peft_config.values()}
    if any(base and Path(base).absolute() == folder.absolute() for base in bases):
        return
    try:
        is_ours = KEY in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    if is_ours:
        for path in [found for pattern in _OF_A_MODEL for found in folder.glob(pattern)]:
            path.unlink()


def _save_description(
    model: Any, tokenizer: Any, folder: Path, spec: AttentionSpec | None, trained_length: int | None
) -> None:
    """Writes the config, the tokenizer and the model card into the folder of the weights."""
    adapters = (folder / "adapter_config.json").exists()
    if not adapters:
        config = exported_config(model.config, spec, trained_length)
        config.architectures = [type(model).__name__.removeprefix("FSDP")]
        config.dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        config.save_pretrained(folder)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(
        model_card(
            inside_adapters(model),
            spec,
            trained_length,
            differential_version(model.config),
            adapters=adapters,
        ),
        encoding="utf-8",
    )


def exported_config(config: Any, spec: AttentionSpec | None, trained_length: int | None) -> Any:
    """Returns a copy of a config that states the trained length and the attention.

    `max_position_embeddings` is set to the trained length: for a model trained from random weights
    always, and for a pretrained model if the trained length is larger. It is not changed if outputs
    depend on it (learned positions, RoPE types that scale by it), or with dual chunk attention,
    where it is the window.

    Args:
        config: Configuration of a transformers model.
        spec: Attention used in training; None for that of transformers.
        trained_length: Length of the longest document in training, in tokens; None if unknown.
    """
    config = copy.deepcopy(config)
    options = {} if spec is None else {"name": spec.kind, **spec.options()}
    stated: dict[str, Any] = {
        "trained_length": trained_length,
        "attention": {name: options[name] for name in options if name not in _OF_A_RUN} or None,
    }
    version = differential_version(config)
    if version is not None:
        stated["differential_version"] = version
    setattr(config, KEY, stated)
    text = config.get_text_config()
    if isinstance(spec, DualChunkSpec):
        text.dual_chunk_attention_config = {
            "chunk_size": spec.chunk_size,
            "local_size": spec.local_size,
            "original_max_position_embeddings": spec.window,
        }
    elif trained_length is not None and _length_is_free(text):
        known = getattr(config, "_name_or_path", "") != ""  # the model was pretrained
        least = text.max_position_embeddings if known else 0
        text.max_position_embeddings = max(trained_length, least)
    return config


def differential_version(config: Any) -> int | None:
    """Returns the version of a model's differential attention, 1 or 2; None if it has none."""
    if config.model_type == "diffllama":
        return 1
    return 2 if config.model_type in {c.model_type for c in CONFIGS.values()} else None


def _length_is_free(config: Any) -> bool:
    """Whether a model's outputs are independent of its config's max_position_embeddings."""
    parameters = getattr(config, "rope_parameters", None)
    if not parameters or not hasattr(config, "max_position_embeddings"):
        return False
    groups = [p for p in parameters.values() if isinstance(p, Mapping)] or [parameters]
    return all(group.get("rope_type", "default") in _FREE_ROPE for group in groups)
