"""The schemas themselves; what Hydra makes of them is in tests/configs."""

import pytest
from omegaconf import OmegaConf

from lctrain.config import AttentionConfig, OptimConfig, TrainConfig, to_dataclass


def test_attention_options_are_those_of_patch_model():
    options = AttentionConfig(dropout=0.0, backend="triton", deterministic=True).options()
    assert options == {"dropout": 0.0, "backend": "triton", "deterministic": True}
    assert "dropout" not in AttentionConfig().options()


def test_root_must_be_the_schema():
    with pytest.raises(ValueError, match="config must be built on TrainConfig, got OptimConfig"):
        to_dataclass(OmegaConf.structured(OptimConfig), TrainConfig)


def test_dataclasses_are_frozen():
    config = to_dataclass(OmegaConf.structured(OptimConfig), OptimConfig)
    with pytest.raises(AttributeError):
        config.learning_rate = 1.0
