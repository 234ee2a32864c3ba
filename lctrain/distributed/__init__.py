"""Training on several GPUs: ranks, sharded parameters (FSDP2), and packs divided over ranks."""

from lctrain.distributed.topology import ONE_RANK, Topology

__all__ = ["ONE_RANK", "Topology"]
