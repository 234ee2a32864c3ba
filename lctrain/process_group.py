"""leave_at_exit: destroys the process group of a rank when its process ends."""

import atexit
import time

import torch.distributed


def leave_at_exit() -> None:
    """Registers a function that destroys a gloo process group before the interpreter ends.

    Otherwise the thread of gloo runs while Python shuts down, which sometimes aborts a process that
    has finished (torch 2.13). Lightning does the same for NCCL.
    """
    atexit.register(_leave)


def _leave() -> None:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    if torch.distributed.get_backend() == "gloo":
        # While this thread sleeps, gloo's thread gets the interpreter lock and finishes its work.
        time.sleep(0.1)
        torch.distributed.destroy_process_group()
