"""ShardedStrategy: Lightning's strategy for FSDP2, optionally with replicas (HSDP)."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy

from lctrain.config.memory import MemoryConfig, described, suits_shards
from lctrain.distributed.sharding import ShardRoot, shard_model
from lctrain.distributed.topology import Topology
from lctrain.limits import why_refused
from lctrain.run.sharded_checkpoint import (
    load_file_into_shards,
    load_folder_into_shards,
    save_sharded,
)


class ShardedStrategy(ModelParallelStrategy):
    """Divides parameters, gradients and optimizer states over ranks, with torch's FSDP2.

    The ranks form a device mesh (replicas, shards): each replica is one full copy of the
    parameters, divided over its shards. LongContextModule shards its model when it finds this
    strategy. Another module calls `shard` in its `configure_model`, and calls its model by
    `lctrain.distributed.sharding.through_root`.

    Args:
        replicas: Number of copies of the parameters.
        timeout: Time after which a collective fails.

    Raises:
        ValueError: when the ranks are known, if `replicas` does not divide their number.
    """

    def __init__(self, replicas: int = 1, timeout: timedelta | None = default_pg_timeout) -> None:
        super().__init__(save_distributed_checkpoint=True, timeout=timeout)
        self.replicas = replicas
        self.root: ShardRoot | None = None
        self._topology: Topology | None = None

    @property
    def topology(self) -> Topology:
        """The ranks of the run, and what each of them holds."""
        if self._topology is not None:
            return self._topology
        return Topology(self.global_rank, self.world_size, is_sharded=True)

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Arguments of a DistributedSampler: one replica per pack, and the index of this pack."""
        return {"num_replicas": self.topology.data_size, "rank": self.topology.data_rank}

    def setup_environment(self) -> None:
        """Joins the ranks, and builds their mesh once."""
        self._setup_distributed()
        if self._device_mesh is None:
            self._build_mesh()
        assert self.lightning_module is not None
        self.lightning_module._device_mesh = self._device_mesh

    def _build_mesh(self) -> None:
        ranks = Topology(self.global_rank, self.world_size, self.replicas, is_sharded=True)
        self._device_mesh = init_device_mesh(
            self.root_device.type,
            (self.replicas, ranks.shards),
            mesh_dim_names=("replicate", "shard"),
        )
        self._topology = ranks

    def shard(self, model: nn.Module) -> ShardRoot:
        """Divides a model's parameters over the ranks, and returns the root that calls the model.

        Args:
            model: The model, with its weights on rank 0; see `shard_model`.
        """
        mesh: DeviceMesh = self.device_mesh
        model = self.precision_plugin.convert_module(model)
        self.root = shard_model(
            model, mesh if self.replicas > 1 else mesh["shard"], self.root_device, self._policy()
        )
        return self.root

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        """Writes a checkpoint as a folder that is complete or does not exist: see `save_sharded`.

        Args:
            checkpoint: State to write.
            filepath: Folder to write.
            storage_options: Not used.

        Raises:
            OSError: if a file cannot be written.
        """
        path = Path(self.broadcast(str(filepath)))
        save_sharded(checkpoint, path, self.topology)

    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Loads a checkpoint, a folder or one file, into the model and the optimizers.

        Args:
            checkpoint_path: The checkpoint, of this strategy or another one, and of any number of
                ranks.
            weights_only: Whether to accept only tensors and plain values; None does. False runs
                the code that a folder may hold.

        Returns:
            The checkpoint without weights and optimizer states.

        Raises:
            ValueError: if the checkpoint holds more than tensors and plain values.
        """
        path = Path(self.broadcast(str(checkpoint_path)))
        if path.is_dir() and weights_only is False:
            return super().load_checkpoint(path, weights_only)
        module = self.lightning_module
        assert module is not None
        if path.is_dir():
            assert self.model is not None
            return load_folder_into_shards(path, self.model, self.optimizers, module.strict_loading)
        return load_file_into_shards(path, module, self.optimizers)

    def _policy(self) -> MixedPrecisionPolicy:
        """Returns the dtypes of gathered parameters and of the reduction of gradients."""
        if not str(self.precision_plugin.precision).startswith("bf16"):
            return MixedPrecisionPolicy(cast_forward_inputs=False)
        return MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )


def check_strategy(strategy: Any, memory: MemoryConfig | None = None) -> None:
    """Raises ValueError for a strategy that would give a LongContextModule wrong gradients.

    Args:
        strategy: Strategy of Lightning's Trainer.
        memory: What the layers keep for the backward; None for everything.
    """
    name = type(strategy).__name__
    is_sharded = isinstance(strategy, ShardedStrategy)
    reason = None if is_sharded else why_refused(name)
    if reason is not None:
        raise ValueError(
            f"strategy must be ShardedStrategy (trainer.strategy=fsdp2), ddp or a single device, "
            f"got {name}: {reason}. Use lctrain.distributed.strategy.ShardedStrategy()."
        )
    if is_sharded and memory is not None and not suits_shards(memory):
        raise ValueError(
            f"memory must be none or checkpoint with ShardedStrategy, got {described(memory)}. "
            "Choose memory=checkpoint."
        )
