"""The settings of the loggers, each with the class or function that it builds."""

from __future__ import annotations

from dataclasses import dataclass

from lctrain.config.paths import expand_paths
from lctrain.config.schema import MISSING


@dataclass(frozen=True)
class CsvLoggerConfig:
    """`lctrain.loggers.MetricsCSV`: metrics.csv in the run's folder.

    Attributes:
        save_dir: Folder of the file.
    """

    _target_: str = "lctrain.loggers.MetricsCSV"
    save_dir: str = MISSING

    def __post_init__(self) -> None:
        expand_paths(self, "logger.csv.", "save_dir")


@dataclass(frozen=True)
class WandbLoggerConfig:
    """Weights and Biases; offline by default, without a key or network.

    Attributes:
        save_dir: Folder of the run's files.
        project: Project name.
        name: Name of the run.
        offline: Keep everything on this machine; `wandb sync` sends it later.
        id: Id of the run. None takes the id in run.json, so that a resumed run continues the same
            run.
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
    """TensorBoard, which the extra lctrain[tensorboard] installs.

    Attributes:
        save_dir: Parent folder of the folder `tensorboard`.
    """

    _target_: str = "lctrain.loggers.tensorboard_logger"
    save_dir: str = MISSING

    def __post_init__(self) -> None:
        expand_paths(self, "logger.tensorboard.", "save_dir")
