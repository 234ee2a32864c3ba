"""The schemas of every Hydra config group, as frozen dataclasses.

An unknown key, or a value of the wrong type, raises an error that names the key. `lctrain.schemas`
registers the schemas in Hydra's ConfigStore as `<group>/<name>_schema`. The YAML files in
`configs/` extend the schemas and set values. The console scripts convert the composed configuration
to these dataclasses, so library code never receives a DictConfig.
"""

from lctrain.config.adapter import AdapterConfig
from lctrain.config.attention import AttentionConfig
from lctrain.config.callbacks import (
    AttentionScheduleConfig,
    BestCheckpointConfig,
    CheckpointConfig,
    EarlyStoppingConfig,
    IsolationConfig,
    LengthPerplexityConfig,
    LengthScheduleConfig,
    LongContextEvalConfig,
    NonFiniteGuardConfig,
    ProgressBarConfig,
    ThroughputConfig,
)
from lctrain.config.data import DataConfig, DataOptions, DataSettings
from lctrain.config.eval import EvalConfig
from lctrain.config.evaluation import EvaluationConfig
from lctrain.config.loggers import CsvLoggerConfig, TensorBoardLoggerConfig, WandbLoggerConfig
from lctrain.config.memory import MemoryConfig
from lctrain.config.model import ModelConfig, PretrainedModelConfig, ScratchModelConfig
from lctrain.config.optim import SCHEDULES, OptimConfig
from lctrain.config.paths import PathsConfig
from lctrain.config.schema import MISSING, store_schema, to_dataclass
from lctrain.config.tasks import (
    DEFAULT_TASKS,
    TASKS,
    HarnessConfig,
    LongPerplexityConfig,
    NeedleConfig,
    PasskeyConfig,
    RulerConfig,
)
from lctrain.config.train import TrainConfig
from lctrain.config.trainer import STRATEGIES, TrainerConfig

__all__ = [
    "DEFAULT_TASKS",
    "MISSING",
    "SCHEDULES",
    "STRATEGIES",
    "TASKS",
    "AdapterConfig",
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
    "HarnessConfig",
    "IsolationConfig",
    "LengthPerplexityConfig",
    "LengthScheduleConfig",
    "LongContextEvalConfig",
    "LongPerplexityConfig",
    "MemoryConfig",
    "ModelConfig",
    "NeedleConfig",
    "NonFiniteGuardConfig",
    "OptimConfig",
    "PasskeyConfig",
    "PathsConfig",
    "PretrainedModelConfig",
    "ProgressBarConfig",
    "RulerConfig",
    "ScratchModelConfig",
    "TensorBoardLoggerConfig",
    "ThroughputConfig",
    "TrainConfig",
    "TrainerConfig",
    "WandbLoggerConfig",
    "store_schema",
    "to_dataclass",
]
