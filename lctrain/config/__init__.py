"""The schemas of every Hydra config group: frozen dataclasses, converted once at the entry point.

A key that a schema does not have, or a value of the wrong type, is an error that names it.
`lctrain.schemas` puts them into Hydra's ConfigStore as `<group>/<name>_schema`; the YAML files in
`configs/` build on them and fill in values. Library code receives the dataclasses, never a
DictConfig.
"""

from lctrain.config.attention import AttentionConfig
from lctrain.config.callbacks import (
    AttentionScheduleConfig,
    BestCheckpointConfig,
    CheckpointConfig,
    EarlyStoppingConfig,
    IsolationConfig,
    LengthPerplexityConfig,
    NonFiniteGuardConfig,
    ProgressBarConfig,
    ThroughputConfig,
)
from lctrain.config.data import DataConfig, DataOptions, DataSettings
from lctrain.config.eval import EvalConfig, PasskeyConfig
from lctrain.config.evaluation import EvaluationConfig
from lctrain.config.loggers import CsvLoggerConfig, TensorBoardLoggerConfig, WandbLoggerConfig
from lctrain.config.model import ModelConfig, PretrainedModelConfig, ScratchModelConfig
from lctrain.config.optim import SCHEDULES, OptimConfig
from lctrain.config.paths import PathsConfig
from lctrain.config.schema import MISSING, store_schema, to_dataclass
from lctrain.config.train import TrainConfig
from lctrain.config.trainer import STRATEGIES, TrainerConfig

__all__ = [
    "MISSING",
    "SCHEDULES",
    "STRATEGIES",
    "AttentionConfig",
    "AttentionScheduleConfig",
    "BestCheckpointConfig",
    "CheckpointConfig",
    "CsvLoggerConfig",
    "DataConfig",
    "DataOptions",
    "DataSettings",
    "EarlyStoppingConfig",
    "EvalConfig",
    "EvaluationConfig",
    "IsolationConfig",
    "LengthPerplexityConfig",
    "ModelConfig",
    "NonFiniteGuardConfig",
    "OptimConfig",
    "PasskeyConfig",
    "PathsConfig",
    "PretrainedModelConfig",
    "ProgressBarConfig",
    "ScratchModelConfig",
    "TensorBoardLoggerConfig",
    "ThroughputConfig",
    "TrainConfig",
    "TrainerConfig",
    "WandbLoggerConfig",
    "store_schema",
    "to_dataclass",
]
