"""Training on several GPUs: ranks, sharded parameters (FSDP2), and packs divided over ranks."""

from lctrain.distributed.topology import Topology

__all__ = ["Topology"]
