"""Sharded checkpoints: folders in which every rank has written its shards, complete or absent.

A folder holds the files of torch.distributed.checkpoint, with weights and optimizer states;
`meta.pt`, with the rest of Lightning's checkpoint; and `manifest.json`, with a hash of every file.
Lightning reads such a folder, too.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from lctrain.distributed import Topology
from lctrain.run.checkpoint_file import WRITING, AtomicCheckpointIO, read_checkpoint
from lctrain.run.seal import META, digest_of, remove, write_manifest


class AnyCheckpointIO(AtomicCheckpointIO):
    """Lightning plugin that also reads sharded checkpoints, for strategies that do not shard."""

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
        OSError: on all ranks, if a shard cannot be written; on rank 0, if another file cannot.
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
        dcp.save(state, storage_writer=dcp.FileSystemWriter(folder))
    except CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        raise next((c for c in causes if isinstance(c, OSError)), OSError(str(error))) from error
    mine = sorted(folder.glob(f"__{ranks.rank}_*"))
    hashes = ranks.gather({file.name: digest_of(file) for file in mine})
    if not ranks.is_first:
        return
    AtomicCheckpointIO().save_checkpoint(rest, folder / META)
    known = {name: digest for of_rank in hashes for name, digest in of_rank.items()}
    for name in (META, ".metadata"):
        known[name] = digest_of(folder / name)
    write_manifest(folder, known)
    remove(path)
    os.replace(folder, path)


def read_whole(path: Path) -> dict[str, Any]:
    """Returns a sharded checkpoint as the single file would hold it, in the memory of this process.

    Args:
        path: Folder of the checkpoint.
    """
    state: dict[str, Any] = {}
    _load_state_dict(
        state,
        storage_reader=dcp.FileSystemReader(path),
        planner=_EmptyStateDictLoadPlanner(),
        no_dist=True,
    )
    checkpoint = read_checkpoint(path / META, map_location="cpu")
    checkpoint["state_dict"] = state.pop("state_dict")
    numbers = sorted(int(name.removeprefix("optimizer_")) for name in state)
    checkpoint["optimizer_states"] = [_by_number(state[f"optimizer_{n}"]) for n in numbers]
    return checkpoint


def _by_number(optimizer: dict[str, Any]) -> dict[str, Any]:
    """Returns an optimizer's state with numbers for parameters, as torch's `state_dict` has them.

    Args:
        optimizer: State with the names of parameters.
    """
    names = [name for group in optimizer["param_groups"] for name in group["params"]]
    number = {name: index for index, name in enumerate(names)}
    groups = [
        {**group, "params": [number[name] for name in group["params"]]}
        for group in optimizer["param_groups"]
    ]
    return {
        "state": {number[name]: value for name, value in optimizer["state"].items()},
        "param_groups": groups,
    }


def load_file_into_shards(
    path: Path, module: nn.Module, optimizers: Sequence[Optimizer]
) -> dict[str, Any]:
    """Loads a checkpoint that is one file into a sharded module and its optimizers.

    Every rank reads its own shards from the file.

    Args:
        path: The file.
        module: Module whose parameters are DTensors.
        optimizers: Optimizers of the module's parameters, in the order of the checkpoint.

    Returns:
        The checkpoint without weights and optimizer states.
    """
    checkpoint = read_checkpoint(path, map_location="cpu", mmap=True)
    own = module.state_dict()
    weights = checkpoint.pop("state_dict")
    module.load_state_dict(
        {name: _like(own[name], value) if name in own else value for name, value in weights.items()}
    )
    for optimizer, saved in zip(optimizers, checkpoint.pop("optimizer_states"), strict=True):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        state = {
            number: {key: _like(parameters[number], value) for key, value in entry.items()}
            for number, entry in saved["state"].items()
        }
        optimizer.load_state_dict({"state": state, "param_groups": saved["param_groups"]})
    return checkpoint


def _like(own: Any, value: Any) -> Any:
    """Returns a whole tensor as a DTensor with the shards of `own`; other values as they are."""
    if not isinstance(own, DTensor) or not isinstance(value, Tensor) or own.shape != value.shape:
        return value
    whole = value.to(own.device)
    return distribute_tensor(whole, own.device_mesh, own.placements, src_data_rank=None)
