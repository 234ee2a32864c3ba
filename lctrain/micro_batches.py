"""Says how many micro-batches an optimizer step may have under GradientAccumulationScheduler."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lightning.pytorch.callbacks import GradientAccumulationScheduler


def most_scheduled(callbacks: Iterable[Any]) -> int:
    """Returns the most micro-batches of a step that the schedules among callbacks name, else 1.

    Args:
        callbacks: Callbacks of a run, of any class.
    """
    schedulers = [one for one in callbacks if isinstance(one, GradientAccumulationScheduler)]
    return max((count for one in schedulers for count in one.scheduling.values()), default=1)


def most_configured(configs: Mapping[str, Any]) -> int:
    """Returns what `most_scheduled` would, from the settings of the callbacks.

    No other callback is built.

    Args:
        configs: Settings by name: a dataclass or dictionary with `_target_`, or None.

    Raises:
        ValueError: if a `_target_` cannot be imported.
    """
    from hydra.utils import get_object, instantiate

    schedulers = []
    for name, config in configs.items():
        is_mapping = isinstance(config, Mapping)
        target = config.get("_target_") if is_mapping else getattr(config, "_target_", None)
        if target is None:
            continue
        try:
            kind = get_object(target)
        except (ImportError, ValueError) as error:
            raise ValueError(
                f"callbacks.{name}._target_ must name a class that can be imported, got "
                f"{target!r}: {str(error).splitlines()[0]} Correct the name, or set "
                f"callbacks.{name}=null."
            ) from error
        if isinstance(kind, type) and issubclass(kind, GradientAccumulationScheduler):
            schedulers.append(instantiate(config, _convert_="object"))
    return most_scheduled(schedulers)
