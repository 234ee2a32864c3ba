"""The settings of the loggers. Each schema names a class or function in `_target_`."""

from __future__ import annotations

from dataclasses import dataclass

from lctrain.config.paths import expand_paths
from lctrain.config.schema import MISSING


@dataclass(frozen=True)
class CsvLoggerConfig:
    """Settings of `lctrain.loggers.MetricsCSV`, which writes metrics.csv into the run's folder.

    Attributes:
        save_dir: Folder of metrics.csv.
    """

    _target_: str = "lctrain.loggers.MetricsCSV"
    save_dir: str = MISSING

    def __post_init__(self) -> None:
        expand_paths(self, "logger.csv.", "save_dir")


@dataclass(frozen=True)
class WandbLoggerConfig:
    """Settings of the Weights and Biases logger. The default is offline: no key and no network.

    Attributes:
        save_dir: Folder of the logger's files.
        project: Name of the project in Weights and Biases.
        name: Name of the run in Weights and Biases.
        offline: Whether to keep all metrics on this machine; `wandb sync` uploads them later.
        id: Id of the run in Weights and Biases. None takes the id in run.json, so that a resumed
            run continues the same one.
    """

    _target_: str = "lctrain.loggers.wandb_logger"
    save_dir: str = MISSING
    project: str = "lctrain"
    name: str | None = None
    offline: bool = True
    id: str | None = None

    def __post_init__(self) -> None:
        expand_paths(self, "logger.wandb.", "save_dir")


@dataclass(frozen=True)
class TensorBoardLoggerConfig:
    """Settings of the TensorBoard logger, which the extra lctrain[tensorboard] installs.

    Attributes:
        save_dir: Folder in which the folder `tensorboard` is created.
    """

    _target_: str = "lctrain.loggers.tensorboard_logger"
    save_dir: str = MISSING

    def __post_init__(self) -> None:
        expand_paths(self, "logger.tensorboard.", "save_dir")
