"""Sharded checkpoints: a folder with the shards of every rank, which is complete or absent.

A folder holds the files of torch.distributed.checkpoint, with weights and optimizer states;
`meta.pt`, with the rest of Lightning's checkpoint; and `manifest.json`, with a hash of every file.
Lightning can also read such a folder.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from lctrain.distributed import Topology
from lctrain.run.checkpoint_file import WRITING, AtomicCheckpointIO, read_checkpoint
from lctrain.run.seal import META, digest_of, remove, write_manifest
from lctrain.run.shard_reader import METADATA, read_all_shards, read_shards, shapes_in


class AnyCheckpointIO(AtomicCheckpointIO):
    """Lightning plugin that also reads sharded checkpoints into a model that is not sharded."""

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Reads a checkpoint, a file or a folder, to the CPU.

        Args:
            path: Checkpoint file, or folder of a sharded checkpoint.
            map_location: As in `AtomicCheckpointIO.load_checkpoint`; not used for a folder.
            weights_only: As in `AtomicCheckpointIO.load_checkpoint`; not used for a folder.

        Raises:
            ValueError: if the file is damaged, or holds an object that is not accepted.
        """
        if Path(path).is_dir():
            return read_whole(Path(path))
        return super().load_checkpoint(path, map_location, weights_only)


def save_sharded(checkpoint: dict[str, Any], path: Path, ranks: Topology) -> None:
    """Writes a checkpoint as a folder. All ranks must call it.

    The folder is written under a temporary name. Rank 0 renames it when all ranks have finished.

    Args:
        checkpoint: Lightning's checkpoint, with DTensors in `state_dict` and `optimizer_states`.
        path: Folder to write; an older one is replaced.
        ranks: Ranks of the run.

    Raises:
        OSError: on all ranks, if a file cannot be written. The unfinished folder is deleted.
    """
    rest = dict(checkpoint)
    state = {"state_dict": rest.pop("state_dict")}
    for index, optimizer in enumerate(rest.pop("optimizer_states", [])):
        state[f"optimizer_{index}"] = optimizer
    folder = path.with_name(path.name + WRITING)
    if ranks.is_first:
        with suppress(OSError):
            remove(folder)
    ranks.of_first(None)
    try:
        hashes = _write_shards(state, folder, ranks)
        error = _finish(rest, folder, path, hashes) if ranks.is_first else None
        if (error := ranks.of_first(error)) is not None:
            raise error
    except OSError:  # raised on all ranks
        if ranks.is_first:
            with suppress(OSError):
                remove(folder)
        raise


def _write_shards(state: dict[str, Any], folder: Path, ranks: Topology) -> dict[str, str]:
    """Writes the shards of all ranks, and returns their hashes by file name.

    Raises:
        OSError: on all ranks, if one of them cannot write or read its shards.
    """
    try:
        dcp.save(state, storage_writer=dcp.FileSystemWriter(folder))
    except CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        raise next((c for c in causes if isinstance(c, OSError)), OSError(str(error))) from error
    mine: dict[str, str] | OSError
    try:
        mine = {file.name: digest_of(file) for file in sorted(folder.glob(f"__{ranks.rank}_*"))}
    except OSError as error:
        mine = _plain(error)
    hashes: dict[str, str] = {}
    for of_rank in ranks.gather(mine):
        if isinstance(of_rank, OSError):
            raise of_rank
        hashes |= of_rank
    return hashes


def _finish(
    rest: dict[str, Any], folder: Path, path: Path, hashes: dict[str, str]
) -> OSError | None:
    """Writes rank 0's files, and gives the folder its final name.

    Args:
        rest: Lightning's checkpoint without weights and optimizer states.
        folder: Folder with the shards.
        path: Final name of the folder.
        hashes: Hashes of the shards of all ranks, by file name.

    Returns:
        The error, for all ranks; None if there is none.
    """
    try:
        missing = [name for name in sorted(hashes) if not (folder / name).is_file()]
        if missing:
            raise OSError(
                f"{missing[0]}, which another rank wrote, is not in {folder}. The folder of the "
                "run must be on a file system that all machines share"
            )
        AtomicCheckpointIO().save_checkpoint(rest, folder / META)
        own = {name: digest_of(folder / name) for name in (META, METADATA)}
        write_manifest(folder, hashes | own)
        remove(path)
        os.replace(folder, path)
    except OSError as error:
        return _plain(error)
    return None


def _plain(error: OSError) -> OSError:
    """Returns an OSError that can be pickled and sent to other ranks."""
    return OSError(*(str(error),) if error.errno is None else (error.errno, error.strerror))


def read_whole(path: Path) -> dict[str, Any]:
    """Reads a sharded checkpoint into memory, in the form of a single-file checkpoint.

    Args:
        path: Folder of the checkpoint.

    Raises:
        ValueError: if the checkpoint holds more than tensors and plain values.
    """
    state = read_all_shards(path)
    checkpoint = read_checkpoint(path / META, map_location="cpu")
    checkpoint["state_dict"] = state.pop("state_dict")
    numbers = sorted(int(name.removeprefix("optimizer_")) for name in state)
    checkpoint["optimizer_states"] = [_by_number(state[f"optimizer_{n}"]) for n in numbers]
    return checkpoint


def _by_number(optimizer: dict[str, Any]) -> dict[str, Any]:
    """Returns an optimizer's state with parameters by number instead of name, as in `state_dict`.

    Args:
        optimizer: State of an optimizer, with parameters by name.
    """
    names = [name for group in optimizer["param_groups"] for name in group["params"]]
    number = {name: index for index, name in enumerate(names)}
    groups = [
        {**group, "params": [number[name] for name in group["params"]]}
        for group in optimizer["param_groups"]
    ]
    return {
        # A folder holds no empty dictionary, such as the states of SGD without momentum.
        "state": {number[name]: value for name, value in optimizer.get("state", {}).items()},
        "param_groups": groups,
    }


def load_folder_into_shards(
    path: Path,
    module: nn.Module,
    optimizers: Sequence[Optimizer],
    strict: bool = True,
    stored: dict[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Loads a folder of shards into a sharded module and its optimizers. All ranks must call it.

    Args:
        path: The folder, which any number of ranks may have written.
        module: Module whose parameters are DTensors.
        optimizers: Optimizers of the module's parameters, in the order of the checkpoint.
        strict: Whether the names of weights must be those of the module.
        stored: DTensors of the module that the checkpoint holds, by their names in it; None for all
            weights of the module.

    Returns:
        The checkpoint without weights and optimizer states.

    Raises:
        ValueError: if the checkpoint holds more than tensors and plain values, or other weights
            than `stored`.
    """
    if stored is None:
        weights: dict[str, Any] = {"state_dict": get_model_state_dict(module)}
        read_shards(path, weights)
        module.load_state_dict(weights["state_dict"], strict=strict)
    else:
        _require_shapes(stored, shapes_in(path, "state_dict."))
        read_shards(path, {"state_dict": stored})
    for number, optimizer in enumerate(optimizers):
        name = f"optimizer_{number}"
        state: dict[str, Any] = {name: get_optimizer_state_dict(module, optimizer)}
        read_shards(path, state)
        set_optimizer_state_dict(
            module, optimizer, state[name], options=StateDictOptions(cpu_offload=True)
        )
    return read_checkpoint(path, map_location="cpu")


def load_file_into_shards(
    path: Path,
    module: nn.Module,
    optimizers: Sequence[Optimizer],
    stored: dict[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Loads a checkpoint that is one file into a sharded module and its optimizers.

    Every rank reads its own shards from the file.

    Args:
        path: The file.
        module: Module whose parameters are DTensors.
        optimizers: Optimizers of the module's parameters, in the order of the checkpoint.
        stored: As in `load_folder_into_shards`.

    Returns:
        The checkpoint without weights and optimizer states.

    Raises:
        ValueError: if the checkpoint holds other weights than `stored`.
    """
    checkpoint = read_checkpoint(path, map_location="cpu", mmap=True)
    own = module.state_dict() if stored is None else stored
    weights = checkpoint.pop("state_dict")
    divided = {
        name: _like(own[name], value) if name in own else value for name, value in weights.items()
    }
    if stored is None:
        module.load_state_dict(divided)
    else:
        _require_shapes(stored, {name: value.shape for name, value in weights.items()})
        for name, tensor in stored.items():
            tensor.copy_(divided[name])
    for optimizer, saved in zip(optimizers, checkpoint.pop("optimizer_states"), strict=True):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        state = {
            number: {key: _like(parameters[number], value) for key, value in entry.items()}
            for number, entry in saved["state"].items()
        }
        optimizer.load_state_dict({"state": state, "param_groups": saved["param_groups"]})
    return checkpoint


def _require_shapes(stored: Mapping[str, Tensor], found: Mapping[str, Any]) -> None:
    """Raises ValueError unless a checkpoint holds the given adapters.

    Args:
        stored: Tensors of the model's adapters, by their names in the checkpoint.
        found: Shapes of the weights of the checkpoint, by name.
    """
    if {name: tuple(x.shape) for name, x in stored.items()} != {
        n: tuple(s) for n, s in found.items()
    }:
        raise ValueError(
            "checkpoint must hold adapters of this model's targets and rank, got others. Use the "
            "adapter options of the checkpoint's run."
        )


def _like(own: Any, value: Any) -> Any:
    """Returns a tensor as a DTensor that is sharded like `own`; other values unchanged."""
    if not isinstance(own, DTensor) or not isinstance(value, Tensor) or own.shape != value.shape:
        return value
    whole = value.to(own.device)
    return distribute_tensor(whole, own.device_mesh, own.placements, src_data_rank=None)
