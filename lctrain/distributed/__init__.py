"""Several GPUs: ranks and their roles, sharded parameters, and packs shared by several ranks."""

from lctrain.distributed.topology import Topology

__all__ = ["Topology"]
