"""Kills ranks with SIGKILL at chosen points of a sharded save; checkpoint_ranks.py calls it.

A rank dies before its n-th operation on the files of the checkpoints, whatever the machine's speed.
If the operation is a flush, half of the file's bytes are left.
"""

import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from lctrain.callbacks import StepCheckpoint
from lctrain.distributed import Topology
from lctrain.run.resume import find_checkpoint
from lctrain.run.sharded_checkpoint import read_whole, save_sharded
from tests.distributed.ranks import fork_ranks

OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink"}


class FileOperations:
    """Counts the operations of this process on files of a folder, and dies before one of them.

    Args:
        folder: The folder.
        last: Number of the operation that is not done, from 1; 0 for none.
    """

    def __init__(self, folder: Path, last: int) -> None:
        self.folder, self.last = str(folder), last
        self.done: list[str] = []
        self.fsync = os.fsync
        os.fsync = self.flush
        sys.addaudithook(self.hook)

    def hook(self, event, arguments):
        in_folder = event == "os.remove" and arguments[1] != -1  # shutil.rmtree opens the folder
        if event in OPERATIONS and (in_folder or self.folder in os.path.abspath(str(arguments[0]))):
            self.count(event)

    def flush(self, file):
        if len(self.done) + 1 == self.last:
            os.ftruncate(file, os.fstat(file).st_size // 2)
        self.count("fsync")
        self.fsync(file)

    def count(self, name):
        self.done.append(name)
        if len(self.done) == self.last:
            os.kill(os.getpid(), signal.SIGKILL)


def weights(step: int) -> torch.Tensor:
    """Returns the weights at a step."""
    return torch.arange(12.0).reshape(4, 3) + step


def checkpoint(step: int, mesh) -> dict:
    """Returns a checkpoint of training with sharded weights."""
    value = distribute_tensor(weights(step), mesh, [Shard(0)])
    optimizer = {"state": {"a": {"exp_avg": value}}, "param_groups": [{"lr": 1, "params": ["a"]}]}
    rest = {"loops": {"fit_loop": {}}, "lr_schedulers": [{}], "pytorch-lightning_version": "2.6"}
    return {
        "state_dict": {"a": value},
        "optimizer_states": [optimizer],
        "global_step": step,
        **rest,
    }


class Saves:
    """Saves one checkpoint after another on two ranks, and kills one of them.

    Args:
        folder: Folder of the run.
    """

    def __init__(self, folder: Path) -> None:
        self.directory = folder / "checkpoints"
        self.directory.mkdir(parents=True)

    def main(self, rank: int, size: int, folder: Path) -> None:
        """Saves the checkpoint of `step`, and writes what this rank has done to files."""
        mesh = init_device_mesh("cpu", (size,))
        trainer = SimpleNamespace(
            callbacks=[],
            fast_dev_run=False,
            global_rank=rank,
            world_size=size,
            global_step=self.step,
            save_checkpoint=lambda path: save_sharded(
                checkpoint(self.step, mesh), Path(path), Topology(rank, size)
            ),
        )
        callback = StepCheckpoint(self.directory, keep=1)
        callback.setup(trainer, None, "fit")
        torch.distributed.barrier()
        operations = FileOperations(self.directory, self.last if rank == self.killed else 0)
        callback.save(trainer)
        callback.complete(trainer)
        (folder / f"done_{rank}").write_text("\n".join(operations.done))

    def save(self, name: str, step: int, killed: int = 0, last: int = 0) -> dict:
        """Saves once, and returns which checkpoint a run would resume from.

        Args:
            name: Name of the group of ranks.
            step: Step of the checkpoint.
            killed: Rank that is killed.
            last: Number of the operation before which it dies; 0 if it does not die.
        """
        self.step, self.killed, self.last = step, killed, last
        folder = self.directory.parent / name
        folder.mkdir()
        try:
            fork_ranks(self.main, 2, folder)
            died = False
        except SystemExit:
            died = True
        names = sorted(path.name for path in self.directory.iterdir())
        newest = find_checkpoint("last", [self.directory], self.directory.parent)
        read = read_whole(newest)
        found = read["global_step"]
        values = (read["state_dict"]["a"], read["optimizer_states"][0]["state"][0]["exp_avg"])
        return {
            "died": died,
            "step": step,
            "found": found,
            "is_intact": all(torch.equal(value, weights(found)) for value in values),
            "names": names,
        }


def kill_saves(folder: Path) -> dict:
    """Saves twice, then kills a rank in one save after the other, at every second operation.

    These are the flushes of shards, metadata and manifest, the renames, the link and deletions.
    """
    saves = Saves(folder)
    before = [saves.save(f"whole_{step}", step) for step in (1, 2)]
    counts = [len((folder / "whole_2" / f"done_{rank}").read_text().split()) for rank in (0, 1)]
    step, kills = 3, []
    for rank, count in enumerate(counts):
        for last in range(2, count + 1, 2):
            kills.append(saves.save(f"kill_{rank}_{last}", step, rank, last))
            step = kills[-1]["found"] + 1
    return {"before": before, "kills": kills, "after": saves.save("after", step)}
