"""Turns oneDNN off in every process that has this folder on its PYTHONPATH and imports torch.

torch loads the entry points of the group torch.backends at the end of its import.
"""


def turn_off() -> None:
    """Computes without oneDNN from now on."""
    import torch

    torch.backends.mkldnn.enabled = False
