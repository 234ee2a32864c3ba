"""machine: what a recipe's record says of the machine and the day on which it was made."""

from __future__ import annotations

import platform
import time
from importlib.metadata import version

import torch


def machine(accelerator: str = "auto") -> dict[str, str]:
    """Returns device, day and versions.

    Args:
        accelerator: `trainer.accelerator` of the training. With "cpu", the device is no GPU.
    """
    on_gpu = torch.cuda.is_available() and accelerator != "cpu"
    return {
        "device": torch.cuda.get_device_name() if on_gpu else "CPU",
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }
