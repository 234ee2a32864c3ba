"""Turns oneDNN off in each process that imports torch with this folder on its PYTHONPATH.

It is an entry point of the group torch.backends, which torch loads at the end of its import.
"""


def turn_off() -> None:
    """Turns oneDNN off for the rest of the process."""
    import torch

    torch.backends.mkldnn.enabled = False
