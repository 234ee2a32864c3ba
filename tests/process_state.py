"""Keeps state of the whole process, so that no test sees what the tests before it have left."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Variables that are not restored: pytest's own, and the address of the service that W&B starts once
# in a process.
LEFT_ALONE = {"PYTEST_CURRENT_TEST", "WANDB_SERVICE"}


@contextmanager
def process_state_kept() -> Iterator[None]:
    """Restores what libraries change in a process and do not restore themselves.

    - Environment variables: Lightning's seed_everything and W&B set some, and `Dataset.map` with
      several processes replaces the object `os.environ`.
    - Levels and handlers of loggers: Hydra and lctrain-train set them.
    - The hook for uncaught exceptions: torch.distributed and W&B replace it.
    - The configuration that Hydra keeps of its last command.
    - torch's default dtype, deterministic algorithms and number of threads.
    """
    environment = os.environ
    variables = {name: text for name, text in environment.items() if name not in LEFT_ALONE}
    root, excepthook = logging.getLogger(), sys.excepthook
    handlers, levels = list(root.handlers), {root: root.level} | _levels()
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        yield
    finally:
        os.environ = environment  # noqa: B003 - the same object as before
        for name in os.environ.keys() - variables.keys() - LEFT_ALONE:
            del os.environ[name]
        os.environ.update(variables)
        for handler in list(root.handlers):
            if handler not in handlers and not type(handler).__module__.startswith("_pytest"):
                root.removeHandler(handler)
        for logger, level in levels.items():
            if logger.level != level:  # setting a level takes as long as there are loggers
                logger.setLevel(level)
        sys.excepthook = excepthook
        if "hydra.core.hydra_config" in sys.modules:
            sys.modules["hydra.core.hydra_config"].HydraConfig.instance().cfg = None
        torch.set_default_dtype(dtype)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        if torch.are_deterministic_algorithms_enabled() != deterministic:
            torch.use_deterministic_algorithms(deterministic)


def _levels() -> dict[logging.Logger, int]:
    """Returns the levels of all loggers that there are."""
    found = logging.root.manager.loggerDict.values()
    return {logger: logger.level for logger in found if isinstance(logger, logging.Logger)}
