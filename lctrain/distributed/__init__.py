"""Several GPUs: ranks and their roles, and parameters that are divided over ranks."""

from lctrain.distributed.topology import Topology

__all__ = ["Topology"]
