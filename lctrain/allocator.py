"""expand_segments: sets torch's allocator of GPU memory before torch is loaded."""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping

VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
EXPANDABLE = "expandable_segments:True"


def expand_segments(
    environment: MutableMapping[str, str] | None = None, platform: str = sys.platform
) -> bool:
    """Makes torch's allocator use expandable segments, unless the user has configured it.

    With fixed segments, a tensor that a layer keeps is often placed into the freed block of a
    larger temporary tensor. The rest of the block is too small for the next temporary tensor, which
    gets a new block. So the allocator reserves more than the tensors take, once for each kept
    tensor. An expandable segment has no such borders. Values do not change.

    Torch reads the variable when it is loaded, and the processes of other ranks inherit it. Only
    Linux has expandable segments.

    Args:
        environment: Environment variables, which are changed; None for those of the process.
        platform: Name of the platform, as in `sys.platform`.

    Returns:
        Whether the variable was set.
    """
    environment = os.environ if environment is None else environment
    if platform != "linux" or any(environment.get(name) for name in VARIABLES):
        return False
    environment[VARIABLES[0]] = EXPANDABLE
    return True


def has_expandable_segments() -> bool:
    """Returns whether the environment asks torch's allocator for expandable segments."""
    return any(EXPANDABLE in os.environ.get(name, "") for name in VARIABLES)
