"""ShardedStrategy: Lightning's strategy for FSDP2, optionally with replicas and shared packs."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from lctrain.batch import PackedBatch
from lctrain.data.same_pack import SamePacks
from lctrain.data.share import share_pack
from lctrain.distributed.sharding import ShardRoot, shard_model
from lctrain.distributed.shared_pack import ContextGroups
from lctrain.distributed.topology import Topology
from lctrain.limits import check_exchange, check_machines, check_shared_task, why_refused
from lctrain.memory.quantized import is_quantized
from lctrain.models.sharded_adapters import checkpoint_weights
from lctrain.models.shared_attention import heads_group
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

    With `context_parallel` above 1, consecutive ranks form a context group and share one pack. A
    batch on the device is then only this rank's share of the pack. In the layers, the attention of
    a patched model exchanges heads or keys with the other ranks of the group.

    Args:
        replicas: Number of copies of the parameters.
        timeout: Time after which a collective fails.
        context_parallel: Number of ranks that share one pack.
        context_exchange: What these ranks exchange in attention: heads, keys, or auto for heads
            among as many ranks of a machine as divide the key/value heads, and keys between these
            groups.

    Raises:
        ValueError: if `context_exchange` is unknown. Once the number of ranks is known: if
            `replicas` * `context_parallel` does not divide it, or a context group would have a part
            of a machine's ranks and ranks of another machine.
    """

    def __init__(
        self,
        replicas: int = 1,
        timeout: timedelta | None = default_pg_timeout,
        *,
        context_parallel: int = 1,
        context_exchange: str = "auto",
    ) -> None:
        super().__init__(save_distributed_checkpoint=True, timeout=timeout)
        check_exchange(context_exchange, context_parallel)
        self.replicas = replicas
        self.context_parallel = context_parallel
        self.context_exchange = context_exchange
        self._same_packs = SamePacks()
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
        """Arguments by which a DistributedSampler gives each context group one pack.

        `num_replicas` is the number of packs that all ranks compute at the same time, `rank` the
        index of this rank's pack among them.
        """
        return {"num_replicas": self.topology.data_size, "rank": self.topology.data_rank}

    def setup_environment(self) -> None:
        """Joins the ranks, and builds their mesh once."""
        self._setup_distributed()
        if self._device_mesh is None:
            self._build_mesh()
        assert self.lightning_module is not None
        self.lightning_module._device_mesh = self._device_mesh

    def _build_mesh(self) -> None:
        ranks = Topology(
            self.global_rank,
            self.world_size,
            self.replicas,
            self.context_parallel,
            is_sharded=True,
        )
        check_machines(self.context_parallel, self.num_processes, self.num_nodes)
        device = self.root_device.type
        self._device_mesh = init_device_mesh(
            device, (self.replicas, ranks.shards), mesh_dim_names=("replicate", "shard")
        )
        self._topology = ranks

    def batch_to_device(
        self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0
    ) -> Any:
        """Moves a batch to the device, and makes it this rank's share of the pack.

        Args:
            batch: The whole pack, or this rank's share of it.
            device: The device; None for that of this rank.
            dataloader_idx: Number of the data loader.

        Raises:
            ValueError: if ranks share a pack, and the batch is not a PackedBatch, or the ranks of a
                context group got different packs. On a GPU, a difference after the first batch is
                found when the next batch is moved.
        """
        batch = super().batch_to_device(batch, device, dataloader_idx)
        ranks = self.topology
        if ranks.context == 1:
            return batch
        if not isinstance(batch, PackedBatch):
            raise ValueError(
                f"batches must be PackedBatches with context_parallel={ranks.context}, got "
                f"{type(batch).__name__}. Use lctrain.data.PackCollator, or context_parallel=1."
            )
        self._same_packs.compare(batch, ranks)
        if batch.share is None:
            batch = share_pack(batch, ranks.context, ranks.context_rank, ranks.heads)
        assert batch.share is not None
        share = batch.share.shared_by(ranks.context_groups, batch.document_ids)
        return replace(batch, share=share)

    def shard(self, model: nn.Module) -> ShardRoot:
        """Divides a model's parameters over the ranks, and returns the root that calls the model.

        If the strategy's root already has this model, nothing changes. Another model replaces it.

        Args:
            model: The model, with its weights on rank 0; see `shard_model`.

        Raises:
            ValueError: if weights are quantized or the model is already sharded by another call,
                or ranks share a pack, and the model's attention cannot be exchanged.
        """
        if self.root is not None and self.root.model is model:
            return self.root
        if any(isinstance(parameter.data, DTensor) for parameter in model.parameters()):
            raise ValueError(
                "model must not be sharded yet with this ShardedStrategy, got DTensors: another "
                "fit has sharded it. Fit one module per strategy, or load its checkpoint into a "
                "new model."
            )
        quantized = [n for n, p in model.named_parameters() if is_quantized(p)]
        if quantized:
            raise ValueError(
                f"model must have dense weights with ShardedStrategy, got quantized ones, such as "
                f"{quantized[0]}: shards of packed weights would lose their scales. Load them in "
                "bfloat16, or use 'ddp'."
            )
        mesh: DeviceMesh = self.device_mesh
        if self.context_parallel > 1:
            self._share_attention(model)
        model = self.precision_plugin.convert_module(model)
        self.root = shard_model(
            model, mesh if self.replicas > 1 else mesh["shard"], self.root_device, self._policy()
        )
        return self.root

    def _share_attention(self, model: nn.Module) -> None:
        """Decides which ranks exchange heads, and makes the process groups. All ranks call it."""
        ranks = self.topology
        heads = heads_group(model, ranks.context, self.context_exchange, self.num_processes)
        whole = None
        for first in range(0, ranks.size, ranks.context):
            group = torch.distributed.new_group(range(first, first + ranks.context))
            whole = group if first <= ranks.rank < first + ranks.context else whole
        groups = ContextGroups.of(ranks.context, heads, whole)
        self._topology = replace(ranks, heads=heads, context_groups=groups)

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
        adapters = checkpoint_weights(getattr(module, "model", None), "model.")
        if path.is_dir():
            assert self.model is not None
            return load_folder_into_shards(
                path, self.model, self.optimizers, module.strict_loading, adapters
            )
        return load_file_into_shards(path, module, self.optimizers, adapters)

    def _policy(self) -> MixedPrecisionPolicy:
        """Returns the dtypes of gathered parameters and of the reduction of gradients."""
        if not str(self.precision_plugin.precision).startswith("bf16"):
            return MixedPrecisionPolicy(cast_forward_inputs=False)
        return MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )


def check_strategy(strategy: Any, task: str = "causal") -> None:
    """Raises ValueError for a strategy that would give a LongContextModule wrong gradients.

    Args:
        strategy: Strategy of Lightning's Trainer.
        task: What the model is trained for; see `lctrain.loss.task`.
    """
    name = type(strategy).__name__
    is_sharded = isinstance(strategy, ShardedStrategy)
    reason = None if is_sharded else why_refused(name)
    if reason is not None:
        raise ValueError(
            f"strategy must be ShardedStrategy (trainer.strategy=fsdp2), ddp or a single device, "
            f"got {name}: {reason}. Use lctrain.distributed.strategy.ShardedStrategy()."
        )
    if is_sharded and task != "causal":
        check_shared_task(strategy.context_parallel, f"task={task}")
