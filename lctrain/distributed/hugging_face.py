"""save_weights: writes an FSDP2 model as Hugging Face safetensors, each rank its own shards."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.tensor import DTensor

from lctrain.distributed.sharding import whole_value
from lctrain.distributed.topology import Topology

SINGLE = "model.safetensors"
FILE_BYTES = 5 * 10**9  # largest file of weights, unless one tensor is larger


def is_sharded(model: Any) -> bool:
    """Whether a parameter of the model is a DTensor."""
    return any(isinstance(parameter.data, DTensor) for parameter in model.parameters())


def save_weights(model: Any, folder: Path, ranks: Topology, *, only_trained: bool = False) -> None:
    """Writes a sharded model's weights, so that `from_pretrained` loads them. All ranks call it.

    Every rank writes its shards, and rank 0 joins the files; no rank holds the whole model. There
    are two exceptions: the model has adapters, or transformers stores the weights of its family
    under other names or shapes. Then rank 0 gathers the weights on its CPU, and transformers writes
    them.

    Args:
        model: A transformers model whose parameters are DTensors.
        folder: Folder to write into.
        ranks: Ranks of the run.
        only_trained: Whether to write only parameters that are trained, such as those of adapters.
    """
    kept = model.state_dict()
    weights = {name: value for name, value in model.named_buffers() if name in kept}
    weights |= {name: parameter.data for name, parameter in model.named_parameters()}
    if only_trained:
        weights = {n: p.data for n, p in model.named_parameters() if p.requires_grad}
    is_first = ranks.is_first
    # Only the model of rank 0 was loaded from files, whose form transformers remembers.
    gathers = is_first and (hasattr(model, "get_base_model") or _is_converted(model, weights))
    if ranks.of_first(gathers):
        gathered = {}
        for name, value in weights.items():
            whole = whole_value(value.detach())
            if is_first:
                gathered[name] = whole.cpu()
        if is_first:
            model.save_pretrained(folder, state_dict=gathered)
        return
    files = _files(weights)
    writer = dcp.HuggingFaceStorageWriter(
        str(folder), fqn_to_index_mapping=files, save_distributed=True, enable_consolidation=True
    )
    dcp.save(weights, storage_writer=writer)
    if is_first:
        shutil.rmtree(folder / "sharded")
        only = folder / "model-00001-of-00001.safetensors"
        if only.exists():
            only.replace(folder / SINGLE)
            (folder / "model.safetensors.index.json").unlink(missing_ok=True)


def _is_converted(model: Any, weights: dict[str, Tensor]) -> bool:
    """Whether transformers saves a model's weights under other names than the model's own.

    Args:
        model: A transformers model.
        weights: The model's weights by name.
    """
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:
        return True  # unknown in this release: let transformers write the weights
    empty = {
        name: torch.empty(value.shape, dtype=value.dtype, device="meta")
        for name, value in weights.items()
    }
    return set(revert_weight_conversion(model, dict(empty))) != set(empty)


def _files(weights: dict[str, Tensor]) -> dict[str, int]:
    """Returns, for each weight, the number of the safetensors file that holds it, from 1."""
    number, size = 1, 0
    files: dict[str, int] = {}
    for name, value in weights.items():
        size += value.numel() * value.element_size()
        if size > FILE_BYTES and files:
            number, size = number + 1, value.numel() * value.element_size()
        files[name] = number
    return files
