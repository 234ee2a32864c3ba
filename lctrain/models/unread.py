"""mark_unread: finds the weights of a model on device meta in safetensors files.

The names, the conversions and the reports of missing and unexpected weights are transformers' own.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from lctrain.distributed.stored import StoredTensor, mark_stored
from lctrain.warn import warn_once

log = logging.getLogger(__name__)

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class WholeOnlyError(Exception):
    """Raised if only transformers can load a model's weights, which then are whole on one rank."""


def safetensors_files(name: str, revision: str | None) -> dict[str, Path]:
    """Returns the file of every weight of a pretrained model, by the weight's name in the file.

    Files of the Hugging Face hub are downloaded.

    Args:
        name: Folder, or name on the hub.
        revision: Revision on the hub; None for the newest.

    Raises:
        WholeOnlyError: if the weights are not in safetensors files, or are those of adapters.
        OSError: if a file cannot be read or downloaded.
        RuntimeError: if the index of the files is damaged.
    """
    from safetensors import safe_open
    from transformers.utils import cached_file

    def find(file: str, is_needed: bool = False) -> Path | None:
        found = cached_file(
            name,
            file,
            revision=revision or "main",
            _raise_exceptions_for_missing_entries=is_needed,
        )
        return None if found is None else Path(found)

    if find("adapter_config.json") is not None:
        raise WholeOnlyError("its folder holds adapters")
    if (single := find(SINGLE)) is not None:
        with safe_open(single, framework="pt") as file:
            return dict.fromkeys(file.keys(), single)
    if (index := find(INDEX)) is None:
        raise WholeOnlyError("its weights are not in safetensors files")
    try:
        places: dict[str, str] = json.loads(index.read_text())["weight_map"]
        names = sorted({str(file) for file in places.values()})
    except (ValueError, KeyError, TypeError, AttributeError):
        raise RuntimeError(f"{INDEX} does not name the file of every weight") from None
    files = {file: find(file, is_needed=True) for file in names}
    return {weight: path for weight, file in places.items() if (path := files[file]) is not None}


def mark_unread(model: Any, files: Mapping[str, Path], name: str) -> list[str]:
    """Marks every parameter with its place in the files, and reads the buffers.

    Args:
        model: A transformers model, built from its configuration, with parameters on device meta.
        files: File of every stored weight, by its name in the file.
        name: Name of the model, for the log.

    Returns:
        Names of the weights that the files lack, sorted.

    Raises:
        WholeOnlyError: if transformers converts weights other than by their names and dtypes.
        RuntimeError: if a stored tensor has another shape than the model's, or is not there.
    """
    _check_convertible(model)
    places, unexpected = _own_names(model, files)
    shapes = _shapes(files)
    buffers = dict(model.named_buffers())
    by_parameter: dict[int, list[str]] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for own, parameter in parameters.items():
        by_parameter.setdefault(id(parameter), []).append(own)
    missing = []
    for own in model.state_dict():
        tied = by_parameter[id(parameters[own])] if own in parameters else [own]
        found = [places[alias] for alias in tied if alias in places]
        if len(found) > 1:
            raise WholeOnlyError(f"it stores the tied weight {tied[0]} twice")
        if not found:
            missing.append(own)
            continue
        (stored,) = found
        value = parameters[own] if own in parameters else buffers[own]
        if tuple(value.shape) != shapes[stored]:
            raise RuntimeError(
                f"{own} has shape {list(shapes[stored])} in the files, {list(value.shape)} in the "
                "model"
            )
        if own in parameters:
            mark_stored(parameters[own], StoredTensor(files[stored], stored))
        else:
            _read_buffer(value, files[stored], stored)
    ignored = _pattern(model._keys_to_ignore_on_load_missing)
    for own in [own for own in missing if ignored.search(own)]:
        if own in parameters:
            raise WholeOnlyError(f"transformers initializes its weight {own}")
        missing.remove(own)
    _report(model, unexpected, name)
    return sorted(missing)


def _check_convertible(model: Any) -> None:
    """Raises WholeOnlyError if transformers loads a model in a way of its own."""
    from transformers import PreTrainedModel

    config = model.config
    loaders = [vars(kind).get("from_pretrained") for kind in type(model).__mro__]
    if next(filter(None, loaders)) is not vars(PreTrainedModel)["from_pretrained"]:
        raise WholeOnlyError(f"{type(model).__name__} has a way of its own to load")
    if type(model).is_remote_code():
        raise WholeOnlyError("it has code of its own")
    if getattr(config, "quantization_config", None) is not None:
        raise WholeOnlyError("its weights are quantized")
    if getattr(config, "transformers_weights", None) or getattr(type(config), "extra_files", ()):
        raise WholeOnlyError("its configuration names further files")
    if config.dtype is None or model._get_dtype_plan(config.dtype):
        raise WholeOnlyError("its weights have several dtypes")


def _own_names(model: Any, stored: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """Returns the stored name of each weight of the model, and stored names that it does not have.

    Raises:
        WholeOnlyError: if a weight is made from several stored ones, or by a computation.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )
    except ImportError:
        raise WholeOnlyError("this release of transformers is unknown") from None
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    prefix, own = model.base_model_prefix, model.state_dict()
    places: dict[str, str] = {}
    unexpected = []
    for name in sorted(stored, key=dot_natural_key):
        found, source = rename_source_key(name, renamings, converters, prefix, own)
        if found not in own and name in own:
            found, source = rename_source_key(name, [], [], prefix, own)
        if found not in own:
            unexpected.append(found)
        elif source is not None or found in places:
            raise WholeOnlyError(f"its weight {found} is made from several stored ones")
        else:
            places[found] = name
    # transformers reads this when it saves the model, to restore the names of the files.
    model._weight_conversions = [entry for entry in mapping if entry.was_used()]
    return places, unexpected


def _shapes(files: Mapping[str, Path]) -> dict[str, tuple[int, ...]]:
    from safetensors import safe_open

    shapes = {}
    for path in sorted(set(files.values())):
        with safe_open(path, framework="pt") as file:
            held = set(file.keys())
            for name in [name for name, place in files.items() if place == path]:
                if name not in held:
                    raise RuntimeError(f"{path.name} does not hold {name}, which its index names")
                shapes[name] = tuple(file.get_slice(name).get_shape())
    return shapes


@torch.no_grad()
def _read_buffer(buffer: torch.Tensor, path: Path, name: str) -> None:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        buffer.copy_(file.get_tensor(name))


def _pattern(patterns: Iterable[str] | None) -> re.Pattern[str]:
    """Returns a pattern that finds what one of several patterns finds; nothing for none."""
    return re.compile("|".join(f"({pattern})" for pattern in patterns or ()) or r"(?!)")


def _report(model: Any, unexpected: list[str], name: str) -> None:
    """Warns of stored weights that the model does not have and transformers does not expect."""
    patterns = list(model._keys_to_ignore_on_load_unexpected or ())
    names = [name for name, _ in model.named_buffers()]
    if any(buffer.endswith("rotary_emb.inv_freq") for buffer in names):
        patterns.append(r"rotary_emb\.inv_freq")  # old files hold it for every layer
    if any(buffer.endswith("position_ids") for buffer in names):
        patterns.append(r"(^|\.)position_ids$")
    ignored = _pattern(patterns)
    unused = sorted(weight for weight in unexpected if not ignored.search(weight))
    if unused:
        warn_once(
            log,
            "%s holds %d weights that %s does not have, %s among them; they are not read.",
            name,
            len(unused),
            type(model).__name__,
            unused[0],
        )


def read_generation_config(model: Any, name: str, revision: str | None) -> None:
    """Reads a pretrained model's generation config, as `from_pretrained` does.

    Args:
        model: A transformers model.
        name: Folder, or name on the hub.
        revision: Revision on the hub; None for the newest.
    """
    from transformers import GenerationConfig

    if not model.can_generate():
        return
    options: dict[str, Any] = {"revision": revision or "main"}
    try:
        model.generation_config = GenerationConfig.from_pretrained(name, **options)
    except OSError:
        with suppress(OSError):
            model.generation_config = GenerationConfig.from_pretrained(
                name, config_file_name="config.json", _from_model_config=True, **options
            )
